"""ext_proc: a stream state machine without I/O, and its gRPC shell."""

from .server import ExtProcService

__all__ = ["ExtProcService"]
