"""A simulated vLLM fleet: an engine model, an HTTP server like vLLM's, and a fleet of such processes.

Nothing is imported here, so that the pure parts (`engine`, `text`) load without a web framework.
"""
