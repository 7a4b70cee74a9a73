"""Buckets of histograms, in seconds."""

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Of prefill legs and waits: from a cached prompt up to ``prefill_timeout``'s default."""

ANSWER_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Of what a client waits for: from an answer of one token up to one of many thousands."""
