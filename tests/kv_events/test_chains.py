"""Names of what engines have cached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.kv_events import Cleared, Removed, Stored
from vllm_pd_scheduler.kv_events.chains import MARK_TOKENS, EngineBlocks, marks

SIZE = 16
PROMPT = list(range(1000))


def stored(ids: list[int], first: int, parent: int | None, extra: str = "") -> Stored:
    count = len(ids) // SIZE
    return Stored(list(range(first, first + count)), parent, ids[: count * SIZE], SIZE, (extra,) * count)


def test_marks_are_what_engines_tell() -> None:
    engine = EngineBlocks()
    changes = engine.apply([stored(PROMPT, 100, None)])
    assert changes == [(name, True) for _, name in sorted(marks(PROMPT, SIZE).items())]
    assert sorted(marks(PROMPT, SIZE)) == [256, 512, 768]


@given(st.lists(st.integers(1, 61), max_size=4))
def test_it_does_not_matter_in_how_many_events(cuts: list[int]) -> None:
    whole, engine = EngineBlocks().apply([stored(PROMPT, 100, None)]), EngineBlocks()
    events, start = [], 0
    for cut in sorted({*cuts, len(PROMPT) // SIZE}):
        parent = 100 + start - 1 if start else None
        events.append(stored(PROMPT[start * SIZE : cut * SIZE], 100 + start, parent))
        start = cut
    assert engine.apply(events) == whole


def test_a_block_stands_for_all_before_it() -> None:
    other = [7, *PROMPT[1:]]
    assert not set(marks(PROMPT, SIZE).values()) & set(marks(other, SIZE).values())


def test_what_else_counts_makes_another_name() -> None:
    plain, salted = (EngineBlocks().apply([stored(PROMPT, 100, None, extra)]) for extra in ("", "salt"))
    assert not set(plain) & set(salted)


def test_removed_by_the_engines_name() -> None:
    engine = EngineBlocks()
    came = engine.apply([stored(PROMPT, 100, None)])
    last = 100 + 768 // SIZE - 1
    assert came[-1] is not None
    assert engine.apply([Removed([last, 5000])]) == [(came[-1][0], False)]
    assert engine.apply([Removed([last])]) == []
    assert engine.apply([Cleared()]) == [None]
    assert len(engine) == 0


def test_what_hangs_on_nothing_is_not_told() -> None:
    assert EngineBlocks().apply([stored(PROMPT, 100, 99)]) == []


def test_long_blocks_are_all_marked() -> None:
    ids = list(range(4 * 512))
    assert sorted(marks(ids, 512)) == [512, 1024, 1536, 2048]
    assert sorted(marks(ids, MARK_TOKENS)) == list(range(256, 2049, 256))
