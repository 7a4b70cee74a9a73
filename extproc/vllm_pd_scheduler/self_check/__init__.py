"""The self-check: a request of our own now and then, once split and once whole, with one answer."""

from .checks import CannotCheck, Checked, SelfCheck

__all__ = ["CannotCheck", "Checked", "SelfCheck"]
