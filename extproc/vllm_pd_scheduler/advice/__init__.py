"""Whether the fleet would serve its own traffic better with another number of P and D."""

from .adviser import Adviser
from .verdict import Advice

__all__ = ["Advice", "Adviser"]
