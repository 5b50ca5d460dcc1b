"""Where weights start.

| names | what they do |
|---|---|
| `ibp_` | interval widths that neither explode nor vanish with depth |
"""

from weightsmith.init.ibp import ibp_

__all__ = ["ibp_"]
