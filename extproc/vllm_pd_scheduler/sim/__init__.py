"""A simulated vLLM: a model of its engine, an HTTP server like its own, and fleets of such processes.

Nothing is imported here, so that ``engine`` and ``text``, which do no I/O, load without a web framework.
"""
