"""What the benchmarks of the routers stand on: fake vLLM, load client, account of CPU, ratios."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import Mock

import aiohttp
import pytest
from benchmarks.routers import __main__ as command
from benchmarks.routers import cpu, fake_engine, figures, report
from benchmarks.routers.figures import Figures
from benchmarks.routers.load import Load
from benchmarks.routers.routers import ENVOY, OURS
from benchmarks.routers.run import Failed
from benchmarks.routers.workloads import WORKLOADS, Workload

SEND = {"do_remote_decode": True, "do_remote_prefill": False}
SMALL = Workload("small", "requests", "small", 4, stream=3)


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[int]:
    (server,) = await fake_engine.serve([0])
    async with server:
        yield server.sockets[0].getsockname()[1]


async def counts(port: int) -> dict[str, int]:
    async with aiohttp.request("GET", f"http://127.0.0.1:{port}/counts") as response:
        return dict(await response.json())


@contextlib.asynccontextmanager
async def canned(answer: bytes) -> AsyncIterator[int]:
    """A server that gives every request this answer and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


class TestLoad:
    async def test_requests_are_sent_until_the_time_is_over(self) -> None:
        async with engine() as port, Load(port, 4) as load:
            first = await load.run(SMALL.body(stream=False))
            second = await load.run(SMALL.body(stream=False), 0.05)
            assert len(first.times) == 4
            assert len(second.times) > 4
            assert not first.errors + second.errors
            assert (await counts(port))["plain"] == len(first.times) + len(second.times)

    async def test_every_token_of_a_stream_is_counted(self) -> None:
        async with engine() as port, Load(port, 4) as load:
            seen = await load.run(SMALL.body(), stream=3)
        assert (seen.tokens, len(seen.first_tokens), len(seen.times)) == (12, 4, 4)
        assert not seen.errors

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n", "status 503"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", "connection lost"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "connection lost"),
            (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "cut stream"),
        ],
    )
    async def test_an_answer_that_is_not_whole_is_an_error(self, answer: bytes, error: str) -> None:
        async with canned(answer) as port, Load(port, 2) as load:
            seen = await load.run(SMALL.body(), stream=3)
        assert seen.errors == {error: 2}
        assert not seen.times

    @pytest.mark.parametrize("size", [1, 3, 7])
    async def test_it_does_not_matter_in_which_pieces_a_stream_comes(self, size: int) -> None:
        events = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in [b"data: {}\n\n"] * 4)
        answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + events + b"0\r\n\r\n"
        async with canned(answer) as port, Load(port, 1) as load:
            (client,) = load._clients
            received = client.data_received

            def in_pieces(data: bytes) -> None:
                for at in range(0, len(data), size):
                    received(data[at : at + size])

            client.data_received = in_pieces  # type: ignore[method-assign]
            seen = await load.run(SMALL.body(), stream=3)
        assert (seen.tokens, dict(seen.errors)) == (3, {})


class TestFakeEngine:
    async def test_prefill_gives_a_hand_off_and_decode_counts_it(self) -> None:
        async with engine() as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            body = {"prompt": "Hello", "max_tokens": 1, "kv_transfer_params": SEND}
            async with session.post("/v1/completions", json=body) as response:
                params = (await response.json())["kv_transfer_params"]
            assert params["do_remote_prefill"]
            for given in (params, None):
                body = {"prompt": "Hello", "kv_transfer_params": given}
                async with session.post("/v1/completions", json=body) as response:
                    assert (await response.json())["kv_transfer_params"] is None
            assert await counts(port) == {"prefills": 1, "hand_offs": 1, "plain": 1}

    async def test_a_chunked_request_is_read(self) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for piece in (b'{"prompt": "', b"x" * 100_000, b'", "max_tokens": 5}'):
                yield piece

        async with engine() as port:
            url = f"http://127.0.0.1:{port}/v1/completions"
            async with aiohttp.request("POST", url, data=pieces()) as response:
                assert (await response.json())["usage"]["completion_tokens"] == 5

    async def test_prompts_that_begin_alike_have_tokens_that_begin_alike(self) -> None:
        async with engine() as port, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            found = []
            for end in ("some", "more"):
                async with session.post(
                    "/v1/completions/render", json={"prompt": "abcd" * 9 + end}
                ) as response:
                    found.append((await response.json())[0]["token_ids"])
        assert found[0] != found[1]
        assert found[0][:8] == found[1][:8]


class TestBodies:
    @pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each.name)
    def test_they_are_json_with_a_prompt_of_that_size(self, workload: Workload) -> None:
        body = json.loads(b"".join(workload.body()(7)))
        assert workload.prompt <= len(body["prompt"]) < workload.prompt + 50
        assert body["stream"] == bool(workload.stream)

    def test_conversations_share_three_quarters(self) -> None:
        (workload,) = (each for each in WORKLOADS if each.name == "prefixes-16")
        first, again, other = (json.loads(b"".join(workload.body()(n)))["prompt"] for n in (1, 65, 2))
        assert first[:1500] == again[:1500]
        assert first != again
        assert first[:20] != other[:20]


BURN = "import time\nwhile time.process_time() < 0.06: pass\n"
PARENT = (
    "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {0!r}]); print(flush=True); input()"
)


def test_the_cpu_of_descendants_counts_after_their_end() -> None:
    parent = [sys.executable, "-S", "-c", PARENT.format(BURN)]
    with subprocess.Popen(parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert cpu.cpu_seconds(process.pid) >= 0.05  # shown in steps of 10 ms
        assert cpu.resident_mb(process.pid) > 1
        cpu.end(process.pid, 10)
    assert cpu.cpu_seconds(process.pid) == 0


def taken(cpu_ms: list[float], rate: list[float]) -> Figures:
    """Figures of two runs in which the bare Envoy took 0.1 and 0.2 ms and did 1,000 and 500 requests/s."""
    found = Figures("2026-01-01", "a machine", {OURS: "0.1.0", ENVOY: "1.40.0"})
    for number, (one, two) in enumerate(zip(cpu_ms, rate, strict=True)):
        found.add("requests-1", OURS, {"cpu_ms": one, "requests_per_s": two})
        found.add("requests-1", ENVOY, {"cpu_ms": 0.1 + 0.1 * number, "requests_per_s": 1000 / (1 + number)})
    return found


class TestFigures:
    def test_a_ratio_is_that_of_one_run(self) -> None:
        """The machine was half as fast in the second: that makes no difference."""
        ratio = taken([0.5, 1.0], [500, 250]).ratio("requests-1", "cpu_ms")
        assert ratio is not None
        assert ratio.values == pytest.approx((5.0, 5.0))

    @pytest.mark.parametrize(
        ("cpu_ms", "rate", "dearer"),
        [
            ([0.5, 1.0], [500, 250], []),
            ([0.54, 1.08], [500, 250], []),
            ([0.56, 1.12], [500, 250], ["cpu_ms"]),
            ([0.3, 0.6], [430, 215], ["requests_per_s"]),
        ],
    )
    def test_a_cost_that_grows_by_more_than_a_tenth_is_marked(
        self, cpu_ms: list[float], rate: list[float], dearer: list[str]
    ) -> None:
        found = list(figures.changes(taken([0.5, 1.0], [500, 250]), taken(cpu_ms, rate)))
        assert [each.metric for each in found if each.is_dearer] == dearer
        assert report.comparison(found, "then").count("DEARER") == len(dearer)

    def test_they_are_the_same_after_saving(self, tmp_path: Path) -> None:
        found = taken([0.5, 1.0], [500, 250])
        found.save(tmp_path / "figures.json")
        assert figures.load(tmp_path / "figures.json") == found

    def test_the_table_has_medians_and_ratios(self) -> None:
        head, cpu_row, _ = report.table(taken([0.5, 1.0], [500, 250])).splitlines()
        assert f"{OURS} 0.1.0" in head
        assert "0.75" in cpu_row
        assert cpu_row.endswith("5.00")


class TestCommand:
    """With a run's figures, and those of the last release."""

    @pytest.fixture(autouse=True)
    def last_release(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "figures.json"
        taken([0.5, 1.0], [500, 250]).save(path)
        monkeypatch.setattr(figures, "LAST_RELEASE", path)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        return path

    def run(self, monkeypatch: pytest.MonkeyPatch, outcome: Figures | Exception, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["benchmarks.routers", *arguments])
        monkeypatch.setattr(command, "measure", Mock(side_effect=[outcome]))
        monkeypatch.setattr(command, "peer_command", lambda: None)
        return command.main()

    @pytest.mark.parametrize(
        ("outcome", "code"),
        [
            (taken([0.5, 1.0], [500, 250]), 0),
            (taken([0.7, 1.4], [500, 250]), command.DEARER),
            (Failed("16 clients: scheduler: 1 status 503"), command.FAILED),
        ],
    )
    def test_the_exit_code_tells(
        self, monkeypatch: pytest.MonkeyPatch, outcome: Figures | Exception, code: int
    ) -> None:
        assert self.run(monkeypatch, outcome) == code

    def test_without_the_peer_it_says_so(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, taken([0.5, 1.0], [500, 250]), "--only", "requests") == 0
        assert "vllm-router is left out" in capsys.readouterr().err

    def test_without_the_peer_nothing_is_saved(
        self, monkeypatch: pytest.MonkeyPatch, last_release: Path
    ) -> None:
        before = last_release.read_text()
        assert self.run(monkeypatch, taken([0.1, 0.1], [9, 9]), "--save") == command.FAILED
        assert last_release.read_text() == before
