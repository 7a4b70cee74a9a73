"""A batch of KV events as vLLM and SGLang publish it, by ``vllm/distributed/kv_events.py``.

A batch is a MessagePack array ``[time, [event, …], rank]``. An event is a map with ``type`` since vLLM 0.26,
and an array before that, and from SGLang: ``[type, …]`` with the same fields in the same order. What comes
after the fields that are known here is not read.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

MAX_BYTES = 16 << 20
"""Of a batch; a prompt of a million tokens takes 5 MB."""
MAX_EVENTS = 100_000
MAX_BLOCK_SIZE = 1 << 16

EngineHash = int | bytes


class BadBatch(ValueError):
    """Bytes that are no batch of KV events; the message says why."""


class Stored(Struct, frozen=True):
    """Blocks that are cached from now on, one after the other in a prompt."""

    hashes: list[EngineHash]
    parent: EngineHash | None
    """The block before the first of them."""
    token_ids: list[int]
    block_size: int
    extra: tuple[str, ...]
    """For each block what counts beside its tokens, empty if nothing does: an adapter, images, a salt."""


class Removed(Struct, frozen=True):
    """Blocks that are cached no more."""

    hashes: list[EngineHash]


class Cleared(Struct, frozen=True):
    """All blocks are cached no more."""


Event = Stored | Removed | Cleared

_FIELDS = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}
_ON_GPU = (None, "GPU")
_FULL = (None, "full_attention")
"""Kinds of a group of layers that keep the whole prompt; others keep a window of it."""

_decode = msgspec.msgpack.Decoder().decode


def read_batch(data: bytes) -> list[Event]:
    """Return the events that are about whole prefixes in the GPU's memory; raise :exc:`BadBatch`.

    Left out are other tiers, groups of layers with a sliding window, blocks without tokens, and kinds of
    events that are not known.
    """
    if len(data) > MAX_BYTES:
        raise BadBatch(f"a batch of {len(data)} bytes: at most {MAX_BYTES} are read")
    try:
        batch = _decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise BadBatch("it is no MessagePack") from None
    if not (isinstance(batch, list) and len(batch) > 1 and isinstance(batch[1], list)):
        raise BadBatch("it is no batch of events")
    if len(batch[1]) > MAX_EVENTS:
        raise BadBatch(f"a batch of {len(batch[1])} events: at most {MAX_EVENTS} are read")
    return [event for each in batch[1] if (event := _event(each)) is not None]


def _event(given: Any) -> Event | None:
    fields = _fields(given)
    kind = fields.get("type")
    if kind not in _FIELDS or fields.get("medium") not in _ON_GPU:
        return None
    if kind == "AllBlocksCleared":
        return Cleared()
    if fields.get("kv_cache_spec_kind") not in _FULL:
        return None
    hashes = fields.get("block_hashes")
    if not isinstance(hashes, list) or not all(isinstance(each, int | bytes) for each in hashes):
        raise BadBatch("an event without block_hashes")
    return Removed(hashes) if kind == "BlockRemoved" else _stored(fields, hashes)


def _fields(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    if isinstance(given, list) and given and isinstance(given[0], str):
        names = _FIELDS.get(given[0], ())
        return {"type": given[0], **dict(zip(names, given[1:], strict=False))}
    raise BadBatch("an event that is neither a map nor an array")


def _stored(fields: dict[str, Any], hashes: list[EngineHash]) -> Stored | None:
    ids, size = fields.get("token_ids") or [], fields.get("block_size")
    parent, keys = fields.get("parent_block_hash"), fields.get("extra_keys")
    if not ids or not hashes:
        return None
    if not isinstance(size, int) or not 0 < size <= MAX_BLOCK_SIZE:
        raise BadBatch("an event whose block_size is no number of tokens")
    if not isinstance(ids, list) or len(ids) != size * len(hashes):
        raise BadBatch("an event with more or fewer tokens than its blocks have")
    if not all(type(each) is int and 0 <= each < 1 << 64 for each in ids):
        raise BadBatch("an event whose token_ids are no token ids")
    if not isinstance(parent, int | bytes | None):
        raise BadBatch("an event whose parent_block_hash is no hash")
    adapter = fields.get("lora_name") or fields.get("lora_id")
    if not isinstance(keys, list) or len(keys) != len(hashes):
        keys = [None] * len(hashes)
    extra = tuple("" if not (each or adapter) else repr((adapter, each)) for each in keys)
    return Stored(hashes, parent, ids, size, extra)
