"""Replays a recorded load with strategies on a simulated fleet, in virtual time.

Nothing is imported here, so that the command line, which reads what is below, starts fast.
"""

DEFAULT_SETUP = "llama-3.3-70b-4xh100"
"""Simulated model and machine: a common size, on half of a node."""

OVERSUBSCRIPTION = 4.0
"""How many times as much the ports of a leaf switch could carry as its cables to the others: a choice.

Data centres build 1 (no bottleneck) to 8. At 1 only the ports of the instances are shared.
"""
