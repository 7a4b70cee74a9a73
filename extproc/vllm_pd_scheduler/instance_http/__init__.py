"""HTTP with instances: a lean client for requests, and what it shares with aiohttp's for health checks."""
