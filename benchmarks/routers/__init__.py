"""What a request costs: the scheduler with its Envoy, vllm-router and bare Envoy, side by side in one run.

``python -m benchmarks.routers`` in the clone runs it. ``docs/performance.md`` says how to read its figures.
"""
