"""Where weights start."""

from weightsmith.init import ibp_
from weightsmith.testing import Change

_DEEP = ("conv-bn", "depthwise", "vit", "llama")  # of the others every layer feeds the output, and stays

CHANGES = {
    "weightsmith.init.ibp_": [Change(lambda model, x, where=None: ibp_(model, where=where, example=x), models=_DEEP)],
}
