"""Which instances the fleet has: what the sources tell, merged into one set that comes and goes in order."""

from .membership import ADMIN, CONFIG, Membership
from .merge import Member, Merged, merge

__all__ = ["ADMIN", "CONFIG", "Member", "Membership", "Merged", "merge"]
