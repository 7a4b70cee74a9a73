"""Made-up loads: repeatable, and as they are said to be."""

from statistics import median

import pytest

from vllm_pd_scheduler.replay.conversations import linked
from vllm_pd_scheduler.replay.load import Load, lines
from vllm_pd_scheduler.replay.shapes import SHAPES, make
from vllm_pd_scheduler.replay.trace import Trace, TraceError, read_trace


def shared(trace: Trace) -> float:
    """Share of the prompts' tokens that an endless cache of all would have."""
    seen, hits = set[int](), 0
    for each in trace.requests:
        hits += sum(block in seen for block in each.blocks)
        seen.update(each.blocks)
    return hits * trace.block_tokens / sum(each.prompt_tokens for each in trace.requests)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_load_can_be_repeated(shape: str) -> None:
    assert make(shape, 300, 5) == make(shape, 300, 5) != make(shape, 300, 6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_load_is_a_trace(shape: str) -> None:
    trace = make(shape, 500)
    assert len(trace.requests) >= 500
    assert trace.requests[0].arrival == 0
    known = dict[str, float]()
    for each in trace.requests:
        assert each.arrival >= max(known.values(), default=0.0)
        assert len(each.blocks) == each.prompt_tokens // trace.block_tokens
        assert all(name in known for name in each.after)
        assert each.name not in known
        known[each.name] = each.arrival


@pytest.mark.parametrize("shape", SHAPES)
def test_a_load_is_written_and_read(shape: str, tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "load.jsonl"
    made = make(shape, 200, 3)
    path.write_bytes(lines(made))
    read = read_trace(path)
    assert read.block_tokens == made.block_tokens
    for ours, theirs in zip(made.requests, read.requests, strict=True):
        assert (ours.name, ours.after, ours.session) == (theirs.name, theirs.after, theirs.session)
        assert (ours.prompt_tokens, ours.output_tokens) == (theirs.prompt_tokens, theirs.output_tokens)
        assert ours.arrival == pytest.approx(theirs.arrival, abs=1e-5)
        assert ours.pause == pytest.approx(theirs.pause, abs=1e-5)
    assert shared(read) == shared(made)


def test_agents_are_as_published() -> None:
    """Median of 195,000 tokens in and 317 out, 96 % of them seen before, helpers that are waited for."""
    trace = make("agents", 12_000, 1)
    assert median(each.prompt_tokens for each in trace.requests) == pytest.approx(195_000, rel=0.12)
    assert median(each.output_tokens for each in trace.requests) == pytest.approx(317, rel=0.1)
    assert median(each.pause for each in trace.requests if each.after) == pytest.approx(2.0, rel=0.2)
    assert 0.94 < shared(trace) < 0.99
    assert max(len(each.after) for each in trace.requests) > 10
    assert max(each.prompt_tokens for each in trace.requests) < 500_000


def test_chat_goes_on_and_batches_come_at_once() -> None:
    chat, batch, code = make("chat", 3000, 1), make("batch", 3000, 1), make("code", 3000, 1)
    turns = sum(bool(each.after) for each in chat.requests) / len(chat.requests)
    assert 0.7 < turns < 0.85
    answered = sum(bool(each.answer) for each in linked(chat).requests)
    assert answered > len(chat.requests) / 2
    assert len({each.arrival for each in batch.requests}) < len(batch.requests) / 20
    assert not any(each.after for each in (*batch.requests, *code.requests))
    assert median(each.output_tokens for each in code.requests) < 40
    assert 0.3 < shared(code) < 0.6


def test_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match="unknown shape 'odd'; there are chat, agents, batch, code"):
        make("odd", 5)
    with pytest.raises(TraceError, match="made:odd: there is no such shape; there are chat, agents"):
        Load("made:odd").trace(0)


def test_a_load_that_is_made_up_is_another_one_with_each_seed() -> None:
    load = Load("made:chat", 100)
    assert load.trace(1) == load.trace(1) != load.trace(2)
    assert (load.name, Load("/a/b.jsonl").name) == ("made:chat", "b.jsonl")
