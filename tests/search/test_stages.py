import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.search import EvolveOptions, count_parameters, evolve
from weightsmith.search.gan import (
    DISCRIMINATOR_SPACE,
    GENERATOR_SPACE,
    OBJECTIVES,
    Discriminator,
    Generator,
    Reference,
    ScoreGenerator,
    StageOne,
    StageOptions,
    StageTwo,
    TrainOptions,
    discriminator_parameters,
    generator_parameters,
    partners,
    train_gan,
    train_stand_in,
)

SMALL = {"channels": 2, "bottom": 1, "latent": 6, "image_channels": 1}
QUICK = StageOptions(warm_up=2, steps=4, dis_batch=4, gen_batch=4, lr_g=1e-3, lr_d=1e-3)
EVOLVE = EvolveOptions(population=4, generations=3)
IMAGES = torch.randint(0, 255, (200, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SHALLOW = ((3, 0, 3, 0, 2, -1, -1),) * 3


@pytest.fixture(scope="module")
def judge():
    return ScoreGenerator(Reference.of(IMAGES, train_stand_in(IMAGES, torch.arange(200) % 4)), samples=80)


def made(seed=0):
    torch.manual_seed(seed)
    generator, discriminator = Generator(**SMALL), Discriminator(SHALLOW, channels=2, image_channels=1)
    return generator, StageOne(discriminator, IMAGES, QUICK)


def first_stage(judge, **more):
    generator, stage = made()
    return evolve(GENERATOR_SPACE, judge, OBJECTIVES, model=generator, trainer=stage, options=EVOLVE, **more)


def history(found):
    return [[(one.genotype, one.values) for one in generation.scored] for generation in found.generations]


def test_stage_one_counts_parameters_of_stand_alone_networks(judge):
    found = first_stage(judge)
    for one in found.generations[-1].scored:
        assert one.values["parameters"] == generator_parameters(one.genotype, **SMALL)
        assert math.isfinite(one.values["distance"])


@pytest.mark.parametrize("stage", ["first", "second"])
def test_a_stage_that_was_stopped_goes_on_to_the_same_end(judge, tmp_path, stage):
    search = first_stage if stage == "first" else second_stage
    left = 6

    class Stops:
        def __call__(self, model, individual):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return judge(model, individual)

    with pytest.raises(KeyboardInterrupt):
        search(Stops(), folder=tmp_path)
    left = 1000
    assert history(search(Stops(), folder=tmp_path)) == history(search(judge))


def second_stage(judge, reset=True, **more):
    torch.manual_seed(1)
    generator, discriminator = Generator("G*", **SMALL), Discriminator(channels=2, image_channels=1)
    space = without_downsampling()
    stage = StageTwo(discriminator, IMAGES, QUICK, reset=reset)
    return evolve(space, judge, OBJECTIVES, model=partners(generator, 4), trainer=stage, options=EVOLVE, **more)


def without_downsampling():
    from dataclasses import replace

    from weightsmith.search import Gene

    genes = (*DISCRIMINATOR_SPACE.genes[:5], Gene("down on 2", -1, -1), Gene("down on 3", -1, -1))
    return replace(DISCRIMINATOR_SPACE, genes=genes)


def test_training_one_partner_leaves_the_others_bit_identical():
    torch.manual_seed(0)
    models = partners(Generator("G*", **SMALL), 3)
    stage = StageTwo(Discriminator(channels=2, image_channels=1), IMAGES, QUICK)
    stage._prepare(models)
    before = copy.deepcopy(models.state_dict())
    stage._burst(1, SHALLOW, models.of(1), stage._g_optimizers[1])
    after = models.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"1"}


@pytest.mark.parametrize("reset", [True, False])
def test_weight_resetting_copies_the_best_partner_with_its_optimizer(reset):
    torch.manual_seed(0)
    models = partners(Generator("G*", **SMALL), 3)
    stage = StageTwo(Discriminator(channels=2, image_channels=1), IMAGES, QUICK, reset=reset)
    stage.train(models, [SHALLOW] * 3, 0)
    best = copy.deepcopy(models.of(1).state_dict())
    stage.selected(models, 1)
    same = [all(torch.equal(model.state_dict()[name], best[name]) for name in best) for model in models]
    assert same == ([True] * 3 if reset else [False, True, False])
    if reset:
        states = [optimizer.state_dict()["state"] for optimizer in stage._g_optimizers]
        assert all(torch.equal(state[0]["exp_avg_sq"], states[1][0]["exp_avg_sq"]) for state in states)
        stage._burst(0, SHALLOW, models.of(0), stage._g_optimizers[0])
        assert all(torch.equal(models.of(2).state_dict()[name], best[name]) for name in best)


def test_a_single_partner_is_shared_by_all_slots():
    models = partners(Generator("G*", **SMALL), 1)
    assert models.of(0) is models.of(5)


def test_stage_two_reports_the_size_of_the_discriminator(judge):
    from dataclasses import replace

    sized = replace(judge, size=lambda g: discriminator_parameters(g, channels=2, image_channels=1))
    found = second_stage(sized)
    one = found.generations[-1].scored[0]
    assert one.values["parameters"] == discriminator_parameters(one.genotype, channels=2, image_channels=1)


class Explodes(nn.Module):
    """Scores that are not finite for images of one candidate."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.broken = inner, False

    def forward(self, x):
        return self.inner(x) * (math.nan if self.broken else 1.0)


def test_a_loss_that_is_not_finite_skips_the_step_and_marks_the_individual():
    generator, _ = made()
    discriminator = Explodes(Discriminator(SHALLOW, channels=2, image_channels=1))
    stage = StageOne(discriminator, IMAGES, QUICK)
    population = [GENERATOR_SPACE.sample(np.random.default_rng(i)) for i in range(4)]
    stage.train(generator, population, 0)
    assert stage.failed == frozenset()
    before = copy.deepcopy(generator.state_dict())
    discriminator.broken = True
    stage.train(generator, population, 1)
    assert stage.failed
    assert sum(stage.skipped.values()) == QUICK.steps
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())


def test_a_broken_generator_is_scored_as_the_worst(judge):
    generator, _ = made()
    with torch.no_grad():
        generator.rgb.bias.fill_(math.nan)
    found = evolve(GENERATOR_SPACE, judge, OBJECTIVES, model=generator, options=EvolveOptions(4, 1))
    assert all(one.failed and one.values["distance"] == 1e9 for one in found.generations[0].scored)


def test_several_subnets_per_step_average_their_gradients():
    from dataclasses import replace

    generator, _ = made()
    stage = StageOne(Discriminator(SHALLOW, channels=2, image_channels=1), IMAGES, replace(QUICK, subnets_per_step=2))
    stage.warm_up(generator, GENERATOR_SPACE, 0)
    stage.train(generator, [GENERATOR_SPACE.sample(np.random.default_rng(i)) for i in range(4)], 0)
    with pytest.raises(UsageError, match="subnets_per_step must divide"):
        StageOptions(dis_batch=4, gen_batch=6, subnets_per_step=4).check()


def test_unsampled_operations_keep_weights_and_optimizer_state():
    generator, stage = made()
    one, other = ((0, 0, 2, 2, 2, 2, 2),) * 3, ((1, 1, 3, 3, 3, 3, 3),) * 3
    stage.train(generator, [one] * 4, 0)
    kept = copy.deepcopy(generator.cell0.e2.op2.weight)
    stage.train(generator, [other] * 4, 1)
    assert torch.equal(generator.cell0.e2.op2.weight, kept)


@pytest.mark.parametrize("folder", [True, False])
def test_full_training_resumes_and_keeps_the_best(tmp_path, folder):
    def train(steps_to_live=None):
        torch.manual_seed(0)
        pair = Generator("G*", **SMALL), Discriminator(SHALLOW, channels=2, image_channels=1)
        distances = iter([3.0, 1.0, 2.0, 4.0])
        calls = []

        def judge(generator):
            calls.append(generator)
            if steps_to_live is not None and len(calls) > steps_to_live:
                raise KeyboardInterrupt
            return float(generator.bn.weight.sum()) if folder else next(distances)

        options = TrainOptions(
            steps=12, dis_batch=4, gen_batch=4, n_critic=2, ema=0.9, judge_every=3, save_every=3, clip_norm=50.0
        )
        return train_gan(
            *pair, IMAGES, options, judge=judge, folder=tmp_path / "run" if steps_to_live or folder else None
        )

    if not folder:
        found = train()
        assert found.distance == 1.0
        assert [row["distance"] for row in found.rows] == [3.0, 1.0, 2.0, 4.0]
        return
    with pytest.raises(KeyboardInterrupt):
        train(2)
    resumed = train()
    (tmp_path / "run" / "gan.pt").unlink()
    unbroken = train()
    assert resumed.rows == unbroken.rows
    for name, value in unbroken.generator.state_dict().items():
        assert torch.equal(resumed.generator.state_dict()[name], value)


def test_a_state_that_cannot_be_judged_is_never_the_best():
    distances = iter([math.nan, 3.0, math.inf, 2.0])
    pair = Generator("G*", **SMALL), Discriminator(SHALLOW, channels=2, image_channels=1)
    options = TrainOptions(steps=8, dis_batch=4, gen_batch=4, judge_every=1, judge_after=5)
    found = train_gan(*pair, IMAGES, options, judge=lambda generator: next(distances))
    assert [row["step"] for row in found.rows] == [5, 6, 7, 8]
    assert found.distance == 2.0


def test_a_training_is_not_resumed_with_other_networks_or_from_a_damaged_file(tmp_path):
    def train(channels=2, **more):
        sizes = SMALL | {"channels": channels}
        pair = Generator("G*", **sizes), Discriminator(SHALLOW, channels=2, image_channels=1)
        options = TrainOptions(steps=1, dis_batch=4, gen_batch=4)
        return train_gan(*pair, IMAGES, options, folder=tmp_path, **more)

    train()
    with pytest.raises(UsageError, match="cannot be read as a training of a GAN"):
        train(channels=3)
    with pytest.raises(UsageError, match="of a training with other settings"):
        train(judge=lambda generator: 0.0)
    file = tmp_path / "gan.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as a training of a GAN.*damaged"):
        train()


def test_the_average_starts_at_the_first_weights_and_leaves_buffers_alone():
    torch.manual_seed(0)
    generator = Generator("G*", **SMALL)
    first = generator.rgb.weight.detach().clone()
    discriminator = Discriminator(SHALLOW, channels=2, image_channels=1)
    options = TrainOptions(steps=1, dis_batch=4, gen_batch=4, ema=0.5)
    found = train_gan(generator, discriminator, IMAGES, options)
    assert torch.allclose(found.generator.rgb.weight, (first + generator.rgb.weight) / 2)
    assert torch.equal(found.generator.bn.running_mean, generator.bn.running_mean)


def test_a_step_that_is_skipped_leaves_running_statistics_as_they_were():
    torch.manual_seed(0)
    generator, calls = Generator("G*", **SMALL), []

    def overflow_once(_, inputs):
        calls.append(1)
        return (inputs[0] * float("inf"),) if len(calls) == 2 else None

    generator.bn.register_forward_pre_hook(overflow_once)
    discriminator = Discriminator(SHALLOW, channels=2, image_channels=1)
    options = TrainOptions(steps=3, dis_batch=4, gen_batch=4, n_critic=1)
    found = train_gan(generator, discriminator, IMAGES, options)
    assert found.skipped == 1
    assert all(torch.isfinite(value).all() for value in found.generator.state_dict().values())


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, 1, 8, 8), IMAGES[0]])
def test_images_must_be_bytes_and_not_empty(images):
    discriminator = Discriminator(SHALLOW, channels=2, image_channels=1)
    with pytest.raises(UsageError, match="images must be uint8"):
        StageOne(discriminator, images, QUICK)
    with pytest.raises(UsageError, match="images must be uint8"):
        train_gan(Generator("G*", **SMALL), discriminator, images, TrainOptions(steps=1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: StageOptions(steps=0).check(), "steps must be at least 1, got 0"),
        (lambda: StageOptions(lr_g=0.0).check(), "learning rates above 0"),
        (lambda: TrainOptions(ema=1.0).check(), "ema must be at least 0 and below 1"),
        (lambda: TrainOptions(n_critic=0).check(), "n_critic must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        options()


def test_the_closed_forms_are_the_counts_of_built_networks():
    rng = np.random.default_rng(0)
    for _ in range(10):
        g, d = GENERATOR_SPACE.sample(rng), DISCRIMINATOR_SPACE.sample(rng)
        assert count_parameters(Generator(g, **SMALL)) == generator_parameters(g, **SMALL)
        built = Discriminator(d, channels=3, image_channels=1)
        assert count_parameters(built) == discriminator_parameters(d, channels=3, image_channels=1)
