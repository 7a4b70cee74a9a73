"""What is printed while nobody reads it."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from vllm_pd_scheduler.system.output import QUEUE_BYTES, Outlet, pour

LINE = b"x" * 99 + b"\n"
MORE_THAN_FITS = 2 * (QUEUE_BYTES + (1 << 20)) // len(LINE)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    for end in (read, write):
        with contextlib.suppress(OSError):  # the test did
            os.close(end)


def read_lines(fd: int, last: bytes) -> list[bytes]:
    """Read until a line comes that ends so."""
    data = b""
    while not data.endswith(last + b"\n"):
        data += os.read(fd, 1 << 16)
    return data.splitlines(keepends=True)


def test_all_that_is_put_is_written_in_order(pipe: tuple[int, int]) -> None:
    read, write = pipe
    outlet = Outlet(write, "output")
    for number in range(1000):
        outlet.put(b"%d\n" % number)
    assert read_lines(read, b"999") == [b"%d\n" % number for number in range(1000)]


def test_without_a_reader_nobody_waits_and_what_is_dropped_is_said_later(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    read, write = pipe
    dropped: list[int] = []
    outlet = Outlet(write, "standard output")
    outlet.on_dropped = dropped.append
    for _ in range(MORE_THAN_FITS):
        outlet.put(LINE)
    assert dropped
    assert not caplog.records
    kept = MORE_THAN_FITS - sum(dropped)
    data = b""
    while len(data) < kept * len(LINE):
        data += os.read(read, 1 << 16)
    assert data == LINE * kept
    outlet.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{sum(dropped)} lines of standard output were dropped while nobody read it"
    ]


def test_what_is_large_counts_as_its_lines(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1], "output")
    dropped: list[int] = []
    outlet.on_dropped = dropped.append
    outlet.put(b"12345\n" * QUEUE_BYTES)
    assert dropped == [QUEUE_BYTES]


@pytest.mark.parametrize("given", ["reader gone", "not blocking"])
def test_descriptors_that_are_odd(pipe: tuple[int, int], given: str) -> None:
    read, write = pipe
    outlet = Outlet(write, "output")
    if given == "reader gone":
        dropped: list[int] = []
        outlet.on_dropped = dropped.append
        os.close(read)
        outlet.put(LINE * 3)
        outlet.close()
        assert dropped == [3]
        return
    os.set_blocking(write, False)
    for _ in range(5000):  # more than a pipe takes, less than the queue
        outlet.put(LINE)
    outlet.put(b"end\n")
    assert read_lines(read, b"end") == [LINE] * 5000 + [b"end\n"]


def test_whole_lines_are_poured(pipe: tuple[int, int]) -> None:
    read, write = pipe
    source, sink = os.pipe()
    outlet = Outlet(write, "output")
    thread = pour(source, outlet)
    for part in (b"on", b"e\ntw", b"o\nthree"):
        os.write(sink, part)
    os.close(sink)
    thread.join()
    assert read_lines(read, b"three") == [b"one\n", b"two\n", b"three\n"]


PRINTS = """
import logging, sys, warnings
from vllm_pd_scheduler.system.output import StandardStreams
with StandardStreams() as streams:
    dropped = []
    streams.count_dropped(dropped.append)
    logging.basicConfig(stream=sys.stderr)
    for _ in range(30_000):
        print("x" * 99)
        logging.error("y" * 99)
    warnings.warn("odd")
    sys.exit(7 if dropped else 0)
"""


@pytest.mark.parametrize("apart", [False, True])
def test_a_process_whose_pipe_is_full_goes_on_and_ends(apart: bool) -> None:
    """All that Python itself prints with: print, logging, warnings; and the exit waits for no reader."""
    pipes = [os.pipe() for _ in range(1 + apart)]
    process = subprocess.Popen([sys.executable, "-c", PRINTS], stdout=pipes[0][1], stderr=pipes[-1][1])
    try:
        assert process.wait(60) == 7
    finally:
        process.kill()
        for end in (end for pair in pipes for end in pair):
            os.close(end)


SAYS = """
import sys
from vllm_pd_scheduler.system.output import StandardStreams
with StandardStreams() as streams:
    print("one", end=" "); print("two \\u2026")
    print("error", file=sys.stderr)
    sys.stdout.write("no end")
    raise SystemExit("last words")
"""


def test_nothing_is_lost_with_a_reader() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SAYS], capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert ended.stdout == "one two …\nno end"
    assert ended.stderr == "error\nlast words\n"


def test_a_stream_without_a_descriptor_stays(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_pd_scheduler.system.output import StandardStreams

    before, threads = sys.stdout, threading.active_count()
    with StandardStreams() as streams:
        assert (streams.stdout, streams.stderr) == (None, None)
        assert sys.stdout is before
        print("seen")
    assert capsys.readouterr().out == "seen\n"
    assert threading.active_count() == threads
