"""Replays a recorded load with strategies on a simulated fleet, in virtual time.

Nothing is imported here, so that the command line, which reads ``DEFAULT_SETUP``, starts fast.
"""

DEFAULT_SETUP = "llama-3.3-70b-4xh100"
"""Simulated model and machine: a common size, on half of a node."""
