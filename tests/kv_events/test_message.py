"""Batches of KV events, in the forms in which engines write them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.kv_events import BadBatch, Cleared, Removed, Stored, read_batch

STORED = {"block_hashes": [11, 12], "parent_block_hash": 10, "token_ids": [1, 2, 3, 4], "block_size": 2}
AS_ARRAY = ["BlockStored", [11, 12], 10, [1, 2, 3, 4], 2, None, "GPU"]


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def stored(**more: Any) -> bytes:
    return batch({"type": "BlockStored", **STORED, **more})


@pytest.mark.parametrize(
    "data", [stored(), stored(medium="GPU", group_idx=0), batch(AS_ARRAY), batch([*AS_ARRAY, None, None, {}])]
)
def test_maps_and_arrays(data: bytes) -> None:
    assert read_batch(data) == [Stored([11, 12], 10, [1, 2, 3, 4], 2, ("", ""))]


def test_each_kind() -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [b"\1" * 32]}
    found = read_batch(
        batch(removed, ["BlockRemoved", [5], "GPU"], {"type": "AllBlocksCleared"}, ["AllBlocksCleared"])
    )
    assert found == [Removed([b"\1" * 32]), Removed([5]), Cleared(), Cleared()]


def test_what_else_counts_for_a_block() -> None:
    (salted,) = read_batch(stored(extra_keys=[["salt"], None]))
    assert isinstance(salted, Stored)
    assert salted.extra[0]
    assert not salted.extra[1]
    (adapter,) = read_batch(stored(lora_name="sql"))
    assert isinstance(adapter, Stored)
    assert all("sql" in each for each in adapter.extra)


@pytest.mark.parametrize(
    "more",
    [{"medium": "CPU"}, {"kv_cache_spec_kind": "sliding_window"}, {"token_ids": []}, {"type": "BlockMoved"}],
)
def test_left_out(more: dict[str, Any]) -> None:
    """Other tiers, other groups of layers, blocks without tokens, and what newer engines may tell."""
    assert read_batch(stored(**more)) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        batch(7),
        batch(["BlockStored"]),
        msgspec.msgpack.encode({"events": []}),
        msgspec.msgpack.encode([1.0]),
        stored(token_ids=[1, 2, 3]),
        stored(token_ids=[1, 2, 3, -1]),
        stored(token_ids=[1, 2, 3, "4"]),
        stored(block_size=0),
        stored(block_size="2"),
        stored(parent_block_hash=[]),
        stored(block_hashes="11"),
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_bad(data: bytes) -> None:
    with pytest.raises(BadBatch):
        read_batch(data)


@given(st.binary(max_size=64))
def test_any_bytes_are_events_or_bad(data: bytes) -> None:
    with suppress(BadBatch):
        read_batch(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


@given(st.dictionaries(st.sampled_from([*STORED, "medium", "extra_keys", "lora_name"]), JSON))
def test_any_fields_are_an_event_or_bad(more: dict[str, Any]) -> None:
    with suppress(BadBatch):
        assert len(read_batch(stored(**more))) <= 1
