from tests.support.stack import client, fleet, session, stack, up

__all__ = ["client", "fleet", "session", "stack", "up"]
