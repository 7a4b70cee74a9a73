"""``record`` writes what the scheduler tells of its traffic into a file that ``replay`` reads."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.admin_thread import AdminThread
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.replay.trace import read_trace
from vllm_pd_scheduler.request.context import RequestContext


@pytest.fixture
def admin() -> Iterator[AdminThread]:
    with AdminThread() as found:
        yield found


def wait_until(condition: Callable[[], object]) -> None:
    asyncio.run(until(condition))


def program(admin: AdminThread, file: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vllm_pd_scheduler", "record", str(file), "--url", admin.url, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def serve(admin: AdminThread, count: int) -> None:
    def answered() -> None:
        for _ in range(count):
            recorded = admin.router.recording.begin(RequestContext("/v1/completions", prompt_tokens=600.0))
            assert recorded is not None
            admin.router.recording.answered(recorded, 500)

    wait_until(lambda: admin.do(lambda: admin.router.recording.readers) == 1)
    admin.do(answered)


def test_until_it_is_ended(admin: AdminThread, tmp_path: Path) -> None:
    file = tmp_path / "a trace.jsonl"
    with program(admin, file) as recording:
        serve(admin, 3)
        wait_until(lambda: len(file.read_text().splitlines()) == 3)
        recording.send_signal(signal.SIGINT)
        _, told = recording.communicate(timeout=HUNG_S)
    assert recording.returncode == 0
    assert told.splitlines() == [
        f"3 requests are in {file}.",
        f"vllm-pd-scheduler replay --trace '{file}' …",
    ]
    assert {each.prompt_tokens for each in read_trace(file).requests} == {600}


def test_a_scheduler_that_ends(admin: AdminThread, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    with program(admin, file) as recording:
        serve(admin, 3)
        admin.stop()
        _, told = recording.communicate(timeout=HUNG_S)
    assert (recording.returncode, told.splitlines()[0]) == (0, f"3 requests are in {file}.")
    assert len(read_trace(file).requests) == 3


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["record", *arguments], prog_name="vllm-pd-scheduler")


def test_a_file_that_exists(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("mine")
    ended = call(str(file))
    assert ended.exit_code == 2
    assert "choose another name" in " ".join(ended.stderr.replace("│", " ").split())
    assert file.read_text() == "mine"


def test_a_folder_that_does_not(tmp_path: Path) -> None:
    ended = call(str(tmp_path / "none" / "trace.jsonl"))
    assert ended.exit_code == 2
    assert "No such file or directory" in " ".join(ended.stderr.replace("│", " ").split())


def test_no_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    ended = call(str(file), "--url", "http://127.0.0.1:1")
    assert ended.exit_code == 3
    assert "cannot be reached" in ended.stderr
    assert not file.exists()
