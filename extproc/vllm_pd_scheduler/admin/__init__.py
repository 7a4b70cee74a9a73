"""The admin HTTP interface."""

from .server import AdminServer

__all__ = ["AdminServer"]
