"""Why the scheduler cannot start."""

from __future__ import annotations


class StartupError(Exception):
    """The scheduler cannot start; the message says why and what to do."""
