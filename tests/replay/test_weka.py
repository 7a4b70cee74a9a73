"""Conversations of coding agents: their calls, what they wait for, and how a file can be wrong.

All of them are made up here, from the format's documentation.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_pd_scheduler.replay.load import Load
from vllm_pd_scheduler.replay.trace import Trace, TraceError
from vllm_pd_scheduler.replay.weka import STAGGER_S, is_weka, read_conversations


def call(t: float, prompt: int = 128, output: int = 5, ids: Any = None, took: float = 1.0) -> dict[str, Any]:
    ids = list(range(prompt // 64) if ids is None else ids)
    return {"t": t, "type": "n", "model": "m", "in": prompt, "out": output, "hash_ids": ids, "api_time": took}


def helper(t: float, *requests: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    return {"t": t, "type": "subagent", "agent_id": "x", "status": status, "requests": list(requests)}


def conversation(*requests: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "models": ["m"],
        "block_size": 64,
        "hash_id_scope": "local",
        **more,
        "requests": requests,
    }


def read(path: Path, *conversations: Any, sessions: int = 16) -> Trace:
    path.write_text("\n".join(json.dumps(each) for each in conversations))
    assert is_weka(path)
    return read_conversations(path, sessions)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def test_calls_wait_for_the_answer_before_and_the_pause(path: Path) -> None:
    trace = read(path, conversation(call(0.0, took=2.0), call(5.0) | {"type": "s", "ttft": 0.1}, call(6.5)))
    first, second, third = trace.requests
    assert [each.arrival for each in trace.requests] == [0.0, 5.0, 6.5]
    assert (first.after, second.after, third.after) == ((), (first.name,), (second.name,))
    assert [each.pause for each in trace.requests] == pytest.approx([0.0, 3.0, 0.5])
    assert (first.prompt_tokens, first.output_tokens) == (128, 5)


def test_calls_that_overlap_do_not_wait_for_each_other(path: Path) -> None:
    first, second, third = read(path, conversation(call(0.0), call(2.0, took=9.0), call(3.0))).requests
    assert second.after == third.after == (first.name,)


@pytest.mark.parametrize("origin", [0.0, 10.0], ids=["relative", "absolute"])
def test_the_parent_waits_for_its_helpers(path: Path, origin: float) -> None:
    """Their times count from their own beginning or from the conversation's, as files of both kinds do."""
    inner = [call(origin + 0.5), call(origin + 3.0)]
    trace = read(
        path,
        conversation(call(8.0), helper(10.0, *inner), helper(10.0, call(origin + 1.0, took=0.1)), call(20.0)),
    )
    main, one, short, two, after = trace.requests
    assert [each.arrival for each in trace.requests] == pytest.approx([0.0, 2.5, 3.0, 5.0, 12.0])
    assert one.after == short.after == (main.name,)
    assert two.after == (one.name,)
    assert set(after.after) == {main.name, two.name, short.name}
    assert after.pause == pytest.approx(20.0 - 14.0)
    assert len({main.session, one.session, short.session}) == 3
    assert (one.session, main.session) == (two.session, after.session)


def test_nobody_waits_for_a_helper_that_was_only_launched(path: Path) -> None:
    trace = read(path, conversation(call(0.0), helper(2.0, call(0.1), status="async_launched"), call(5.0)))
    assert trace.requests[-1].after == (trace.requests[0].name,)


def test_helpers_of_helpers(path: Path) -> None:
    deep = helper(1.0, call(0.2))
    trace = read(path, conversation(call(0.0), helper(2.0, call(0.1, took=0.5), deep), call(9.0)))
    assert [each.arrival for each in trace.requests] == pytest.approx([0.0, 2.1, 3.2, 9.0])


def test_blocks_are_taken_together_and_are_prefixes(path: Path) -> None:
    long = call(0.0, 1200, ids=range(100, 119))  # 18 full blocks of 64, and one that is not
    trace = read(path, conversation(long, call(5.0, 1024, ids=range(100, 116))))
    assert trace.block_tokens == 512
    assert [len(each.blocks) for each in trace.requests] == [2, 2]
    assert trace.requests[0].blocks == trace.requests[1].blocks


@pytest.mark.parametrize(("scope", "shared"), [("local", False), ("global", True)])
def test_ids_are_of_one_conversation_unless_it_says_otherwise(path: Path, scope: str, shared: bool) -> None:
    one = conversation(call(0.0, 512), hash_id_scope=scope)
    first, second = read(path, one, one).requests
    assert (first.blocks == second.blocks) is shared
    assert first.name != second.name


def test_so_many_conversations_at_a_time(path: Path) -> None:
    long, short = conversation(call(0.0), call(9.0)), conversation(call(0.0), call(3.0))
    requests = read(path, long, short, short, sessions=2).requests
    third = [each for each in requests if each.name.startswith("2/")]
    second_ends = STAGGER_S + 4.0
    assert third[0].arrival == pytest.approx(second_ends)
    assert third[0].after == ("1/1",)


def test_a_folder_a_file_and_lines_are_the_same(tmp_path: Path) -> None:
    folder, lines, single = tmp_path / "folder", tmp_path / "lines", tmp_path / "single.json"
    folder.mkdir()
    both = [conversation(call(0.0), call(2.0)), conversation(call(0.0, 640))]
    for number, each in enumerate(both):
        (folder / f"{number}.json").write_text(json.dumps(each, indent=1))
    lines.write_text("\n".join(json.dumps(each) for each in both) + "\n\n")
    single.write_text(json.dumps(both[0], indent=2))
    assert Load(str(folder)).trace(0) == Load(str(lines)).trace(0)
    assert len(Load(str(single)).trace(0).requests) == 2
    assert len(Load(str(lines), limit=1).trace(0).requests) == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps(conversation()), "there are no requests in it"),
        (json.dumps(conversation(call(-1.0))), r"Expected `float` >= 0.0 - at `\$.requests\[0\].t`"),
        (json.dumps(conversation(call(0.0), call(1e9))), "spans 1.157e.04 days, more than 366"),
        (json.dumps(conversation({"type": "n", "t": 0})), "missing required field `in`"),
        (json.dumps(conversation({"type": "odd", "t": 0})), "Invalid value 'odd' - at"),
        (json.dumps(conversation(call(0.0), hash_id_scope="here")), "Invalid enum value 'here'"),
        (json.dumps(conversation(call(0.0), block_size=0)), "Expected `int` >= 1 - at"),
        (json.dumps(conversation(call(0.0)))[:-9], "not a conversation: Input data was truncated"),
        ('{"block_size": 1, "requests": [NaN', "not a conversation: JSON is malformed"),
        (json.dumps(conversation(call(0.0))) + "\n{", "conversation 2: Input data was truncated"),
        (
            json.dumps(conversation(call(0.0))) + "\n" + json.dumps(conversation(call(0.0), block_size=32)),
            "conversations have blocks of 32, 64 tokens",
        ),
    ],
)
def test_what_is_wrong_is_said(path: Path, text: str, what: str) -> None:
    path.write_text(text)
    with pytest.raises(TraceError, match=what):
        read_conversations(path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="there are no requests in it"):
        read_conversations(tmp_path)
