"""The stack of the integration tests."""

from tests.integration.conftest import client, fleet, session, stack, up

__all__ = ["client", "fleet", "session", "stack", "up"]
