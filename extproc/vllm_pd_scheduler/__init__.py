"""Routing layer for vLLM fleets whose prefill and decode run on separate instances."""

__version__ = "0.1.0"
