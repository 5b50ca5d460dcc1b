"""Which weights to have: evolutionary search over architectures that share weights."""

from weightsmith.search.space import Gene, SearchSpace
from weightsmith.search.supernet import Choice, SuperNet

__all__ = ["Choice", "Gene", "SearchSpace", "SuperNet"]
