"""Reading traces: both formats, and every way in which a file can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_pd_scheduler.replay.trace import Trace, TraceError, TraceRequest, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*lines: str | dict[str, Any], encoding: str = "utf-8", end: str = "\n") -> Path:
        path = tmp_path / "trace"  # no extension: the content decides
        text = end.join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_bytes(text.encode(encoding))
        return path

    return written


def line(timestamp: float = 0, prompt: int = 512, output: int = 1, ids: Any = (0,)) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": prompt,
        "output_length": output,
        "hash_ids": list(ids),
    }


class TestMooncake:
    def test_only_full_blocks_are_kept(self, write: Write) -> None:
        trace = read_trace(write(line(0, 1030, 52, [46, 47, 9]), line(3052, 1024, 3, [46, 48])))
        assert trace.block_tokens == 512
        first, second = trace.requests
        assert first == TraceRequest(0.0, 1030, 52, first.blocks)
        assert second == TraceRequest(3.052, 1024, 3, second.blocks)
        assert len(first.blocks) == len(second.blocks) == 2

    def test_a_block_is_the_whole_prompt_up_to_its_end(self, write: Write) -> None:
        """Also where the ids name a block by its own content, again and again, behind any beginning."""
        prompts = ([1, 2, 3, 4], [1, 2, 2, 1], [1, 2, 2, 2], [2, 2, 2, 1], [0, 1, 2, 2], [2**63, -1, 0, 0])
        trace = read_trace(write(*(line(prompt=2048, ids=ids) for ids in prompts)))
        named = {
            (tuple(ids[: end + 1]), request.blocks[end])
            for ids, request in zip(prompts, trace.requests, strict=True)
            for end in range(4)
        }
        assert len({prefix for prefix, _ in named}) == len({block for _, block in named}) == len(named)
        assert all(0 <= block < 2**60 for _, block in named)

    def test_rows_are_sorted_and_begin_at_zero(self, write: Write) -> None:
        rows = (0, line(ids=[2])), (1, line(ids=[4])), (3, line(ids=[1])), (3, line(ids=[3]))
        in_order = read_trace(write(*({**row, "timestamp": 1000 * at} for at, row in rows)))
        assert [each.arrival for each in in_order.requests] == [0, 1, 3, 3]
        path = write(line(5000, ids=[1]), line(2000, ids=[2]), line(5000, ids=[3]), line(3000, ids=[4]))
        assert read_trace(path) == in_order
        assert read_trace(path, limit=3).requests == read_trace(path).requests[:3]
        assert read_trace(path, limit=9).requests == read_trace(path).requests

    def test_lengths_of_zero_become_one(self, write: Write) -> None:
        assert read_trace(write(line(0, 0, 0, []))).requests == [TraceRequest(0.0, 1, 1)]

    def test_lines_may_say_what_follows_what(self, write: Write) -> None:
        more = {"block_size": 64, "session_id": 7, "request_id": "b", "after": ["a", 1], "delay": 1500}
        trace = read_trace(write(line(0, 130, 1, [1, 2]) | {"block_size": 64}, line(9, 70, 1, [1]) | more))
        first, second = trace.requests
        assert trace.block_tokens == 64
        assert (first.session, first.name, first.after, first.pause) == (None, "", (), 0.0)
        assert (second.session, second.name, second.after, second.pause) == ("7", "b", ("a", "1"), 1.5)
        assert second.blocks == first.blocks[:1]

    def test_blocks_are_of_one_size(self, write: Write) -> None:
        path = write(line(0, 64, 1, [1]) | {"block_size": 64}, line(0))
        with pytest.raises(TraceError, match="line 2: block_size: 512, but 64 before"):
            read_trace(path)

    def test_ids_may_be_left_out(self, write: Write) -> None:
        path = write('{"timestamp": 0, "input_length": 5000, "output_length": 7, "chat": "x"}')
        assert read_trace(path).requests == [TraceRequest(0.0, 5000, 7)]

    @pytest.mark.parametrize(
        ("bad", "what"),
        [
            ('{"timestamp": 0,', "not valid JSON: Input data was truncated"),
            ("[1, 2]", "Expected `object`, got `array`"),
            ('{"timestamp": 0, "input_length": 1}', "Object missing required field `output_length`"),
            (line("now"), "Expected `float`, got `str` - at `$.timestamp`"),  # type: ignore[arg-type]
            (line(-1), "Expected `float` >= 0.0 - at `$.timestamp`"),
            (line(prompt=-1), "Expected `int` >= 0 - at `$.input_length`"),
            (line(output=1.5), "Expected `int`, got `float` - at `$.output_length`"),  # type: ignore[arg-type]
            (line(ids=["x"]), "Expected `int`, got `str` - at `$.hash_ids[0]`"),
            (line(prompt=1025, ids=[1]), "hash_ids: 1 ids, but 1025 tokens are 3 blocks of 512"),
            (line(prompt=512, ids=range(32)), "hash_ids: 32 ids, but 512 tokens are 1 blocks of 512"),
            (HEADER, "not valid JSON: JSON is malformed: invalid character (byte 0)"),
        ],
    )
    def test_a_malformed_line(self, write: Write, bad: Any, what: str) -> None:
        path = write(line(), "", bad, line())
        with pytest.raises(TraceError) as raised:
            read_trace(path)
        assert str(raised.value) == f"{path}: line 3: {what}"

    def test_a_time_without_end(self, write: Write) -> None:
        path = write(line(0), line(1e300))
        with pytest.raises(TraceError, match=r"it spans 1\.157e\+292 days, more than 366: what unit"):
            read_trace(path)


class TestAzure:
    def test_2023_has_seven_digits(self, write: Write) -> None:
        path = write(
            HEADER, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", end="\r\n"
        )
        requests = read_trace(path).requests
        assert [(each.prompt_tokens, each.output_tokens, each.blocks) for each in requests] == [
            (374, 44, ()),
            (396, 109, ()),
        ]
        assert requests[0].arrival == 0
        assert requests[1].arrival == pytest.approx(4.314579, abs=2e-6)

    def test_2024_has_a_zone(self, write: Write) -> None:
        path = write(
            HEADER, "2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 01:00:00.009930+01:00,2399,0"
        )
        assert read_trace(path).requests == [TraceRequest(0.0, 2162, 5), TraceRequest(0.0, 2399, 1)]

    def test_columns_are_found_by_name(self, write: Write) -> None:
        path = write("Model,GeneratedTokens,TIMESTAMP,ContextTokens", "x,7,2024-05-10 00:00:00,9", end="\n")
        assert read_trace(path).requests == [TraceRequest(0.0, 9, 7)]

    def test_a_byte_order_mark(self, write: Write) -> None:
        path = write(HEADER, "2024-05-10 00:00:00,9,7", encoding="utf-8-sig")
        assert read_trace(path).requests == [TraceRequest(0.0, 9, 7)]

    @pytest.mark.parametrize(
        ("bad", "what"),
        [
            ("2024-05-10 00:00:00,1", "2 fields, but the header has 3"),
            ("2024-05-10 00:00:00,x,1", "ContextTokens: 'x' is not a whole number"),
            ("2024-05-10 00:00:00,1_0,1", "ContextTokens: '1_0' is not a whole number"),
            ("2024-05-10 00:00:00,1,", "GeneratedTokens: '' is not a whole number"),
            ("2024-05-10 00:00:00,1,-4", "GeneratedTokens: must not be negative, got -4"),
            ("10 May,1,1", "TIMESTAMP: '10 May' is no date and time like 2023-11-16 18:15:46.68"),
        ],
    )
    def test_a_malformed_line(self, write: Write, bad: str, what: str) -> None:
        path = write(HEADER, "2024-05-10 00:00:00,1,1", bad)
        with pytest.raises(TraceError) as raised:
            read_trace(path)
        assert str(raised.value) == f"{path}: line 3: {what}"

    def test_a_column_that_is_missing(self, write: Write) -> None:
        path = write("TIMESTAMP,ContextTokens", "2024-05-10 00:00:00,1")
        with pytest.raises(TraceError, match="line 1: the header has no column GeneratedTokens"):
            read_trace(path)


class TestFile:
    def test_neither_format(self, write: Write) -> None:
        for text in ("arrival;prompt;output", "\x1f\x8b\x00", "[]"):
            with pytest.raises(TraceError, match=r"line 1: neither Mooncake JSONL .* nor Azure CSV"):
                read_trace(write(text))

    def test_nothing_in_it(self, write: Write) -> None:
        for text in ("", "\n \n", HEADER):
            with pytest.raises(TraceError, match="there are no requests in it"):
                read_trace(write(text))

    def test_not_to_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="none: cannot be read: No such file or directory"):
            read_trace(tmp_path / "none")
        with pytest.raises(TraceError, match="cannot be read: Is a directory"):
            read_trace(tmp_path)

    def test_bytes_that_are_no_text(self, write: Write) -> None:
        path = write(HEADER, "2024-05-10 00:00:00,1,1,é", encoding="latin-1")
        with pytest.raises(TraceError, match="line 2: 'utf-8' codec can't decode byte 0xe9"):
            read_trace(path)


class TestTrace:
    TRACE = Trace([TraceRequest(0.0, 1, 1), TraceRequest(3.0, 2, 2, (7,)), TraceRequest(9.0, 3, 3)])

    def test_scaled(self) -> None:
        fast = self.TRACE.scaled(3.0)
        assert [each.arrival for each in fast.requests] == [0, 1, 3]
        assert fast.requests[1] == TraceRequest(1.0, 2, 2, (7,))
        assert (fast.seconds, self.TRACE.seconds) == (3, 9)
        for rate in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="above 0"):
                self.TRACE.scaled(rate)

    def test_spread(self) -> None:
        burst = Trace([TraceRequest(3.0 * (i // 10), i + 1, 1) for i in range(100)])
        spread = burst.spread(3.0, 1)
        arrivals = [each.arrival for each in spread.requests]
        assert arrivals == sorted(arrivals)
        assert arrivals[0] == 0
        assert len(set(arrivals)) == 100
        came = {each.prompt_tokens: each.arrival for each in spread.requests}
        assert all(-3.0 <= came[i + 1] - 3.0 * (i // 10) <= 3.0 for i in range(100))
        assert spread == burst.spread(3.0, 1) != burst.spread(3.0, 2)
        assert burst.spread(0.0, 1) == burst
        assert Trace([]).spread(3.0, 1) == Trace([])

    def test_limited(self) -> None:
        assert self.TRACE.limited(2).requests == self.TRACE.requests[:2]
        assert self.TRACE.limited(5) == self.TRACE
        assert Trace([]).seconds == 0
