"""What engines tell of their KV caches (vLLM's KV events): it corrects what is taken for cached."""

from .message import BadBatch, Cleared, Removed, Stored, read_batch

__all__ = ["BadBatch", "Cleared", "Removed", "Stored", "read_batch"]
