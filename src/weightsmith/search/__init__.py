"""Which weights to have: evolutionary search over architectures that share weights.

| name | what it is |
|---|---|
| ``evolve`` | trains, evaluates, selects and varies a population; resumes after a kill; local processes or Ray |
| ``SearchSpace``, ``Gene`` | genotypes: which integers make an architecture |
| ``SuperNet``, ``Choice`` | networks that hold every candidate, and give out stand-alone ones |
| ``Trainer``, ``EvolveOptions``, ``Resources`` | how shared weights are trained, how the search runs, on what |
| ``Individual``, ``SearchResult`` | what an evaluation is given, what a search returns |
| ``cars_selector`` | the selection of EAGAN's released code |
| ``count_parameters`` | for objectives |
| ``gan`` | search spaces, networks, losses, scores and both stages for generative adversarial networks |
"""

from weightsmith.search import gan as gan
from weightsmith.search.evaluation import Individual
from weightsmith.search.evolve import evolve
from weightsmith.search.options import EvolveOptions, Trainer, cars_selector
from weightsmith.search.outcomes import EvaluationFailed
from weightsmith.search.records import Generation, Scored, SearchResult
from weightsmith.search.resources import Resources
from weightsmith.search.space import Gene, SearchSpace
from weightsmith.search.supernet import Choice, SuperNet, count_parameters

__all__ = [
    "Choice",
    "EvaluationFailed",
    "EvolveOptions",
    "Gene",
    "Generation",
    "Individual",
    "Resources",
    "Scored",
    "SearchResult",
    "SearchSpace",
    "SuperNet",
    "Trainer",
    "cars_selector",
    "count_parameters",
    "evolve",
]
