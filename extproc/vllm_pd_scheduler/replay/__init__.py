"""Replays a recorded load against strategies on a simulated fleet, in virtual time.

Nothing is imported here, so that the command line starts as fast as without it.
"""

DEFAULT_SETUP = "llama-3.3-70b-4xh100"
