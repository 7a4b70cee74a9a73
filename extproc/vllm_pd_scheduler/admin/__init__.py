"""The admin HTTP interface: the server, what it saves over a restart, and the gauges of ``/metrics``."""

from .server import AdminServer

__all__ = ["AdminServer"]
