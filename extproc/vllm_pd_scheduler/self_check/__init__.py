"""The self-check: now and then a request of our own, once split and once whole. Both answers must be equal."""

from .checks import CannotCheck, Checked, SelfCheck

__all__ = ["CannotCheck", "Checked", "SelfCheck"]
