"""Where weights start."""

from weightsmith.init import ibp_
from weightsmith.testing import Change

CHANGES = {
    "weightsmith.init.ibp_": [Change(lambda model, x, where=None: ibp_(model, where=where, example=x))],
}
