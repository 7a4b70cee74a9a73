"""Routing layer for vLLM fleets whose prefill and decode run on separate instances."""
