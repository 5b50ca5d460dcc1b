"""Which weights to have."""

ELSEWHERE = {
    # a whole search, with its state on disk: tests/search stops, kills and resumes it
    "weightsmith.search.evolve",
    "weightsmith.search.EvolveOptions",
    "weightsmith.search.Resources",
    "weightsmith.search.Trainer",
    "weightsmith.search.Individual",
    "weightsmith.search.SearchResult",
    "weightsmith.search.cars_selector",
    # genotypes are integers
    "weightsmith.search.SearchSpace",
    "weightsmith.search.Gene",
    # networks of their own; tests/search holds them to the authors' values
    "weightsmith.search.SuperNet",
    "weightsmith.search.Choice",
    "weightsmith.search.count_parameters",
    "weightsmith.search.gan.Generator",
    "weightsmith.search.gan.Discriminator",
    "weightsmith.search.gan.StageOne",
    "weightsmith.search.gan.StageTwo",
    "weightsmith.search.gan.ScoreGenerator",
    "weightsmith.search.gan.train_gan",
    # in single precision at least, also from half: tests/search/test_networks.py
    "weightsmith.search.gan.discriminator_loss",
    "weightsmith.search.gan.generator_loss",
    # numbers in double precision, whatever comes in
    "weightsmith.search.gan.score",
    "weightsmith.search.gan.inception_score",
    "weightsmith.search.gan.frechet_distance",
    "weightsmith.search.gan.kernel_distance",
}
