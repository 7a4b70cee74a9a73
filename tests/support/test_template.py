"""What tests start ends with the tests, also if these are killed."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import children, running, spawned
from tests.support.waiting import until

TESTS = """
import signal, sys
from pathlib import Path
from tests.support.processes import Stack, spawned
from tests.support.sim_fleet import Fleet
from tests.support.valkey import SERVER, Server

directory = Path(sys.argv[1])
stack = Stack(directory)
with Fleet(1, 1) as fleet, spawned(stack.up(fleet.config())) as up, spawned(["sleep", "600"]) as other:
    pids = [up.process.pid, other.process.pid, *(each.process.pid for each in fleet.instances)]
    if SERVER is not None:
        server = Server(directory / "valkey")
        server.start()
        pids.append(server.pid)
    print(*pids, flush=True)
    signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no other system ends a process with its parent")
def test_processes_end_with_tests_that_are_killed(tmp_path: Path) -> None:
    program = [sys.executable, "-c", TESTS, str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        pids = [int(each) for each in tests.stdout.readline().split()]
        envoy: list[int] = []

        def started() -> bool:
            envoy[:] = children(pids[0])
            return bool(envoy)

        asyncio.run(until(started))
        os.kill(pids[0], signal.SIGSTOP)  # even one that can do nothing itself
        tests.kill()
    asyncio.run(until(lambda: not any(map(running, [*pids, *envoy]))))


def test_another_program_is_as_if_it_was_started_by_subprocess(tmp_path: Path) -> None:
    script = "echo $PWD $NAME $(ps -o sid= $$) $$; kill -PIPE $$"
    with spawned(["sh", "-c", script], NAME="value") as process:
        assert process.wait() == -signal.SIGPIPE
        assert process.output.split() == [os.getcwd(), "value", *2 * [str(process.process.pid)]]
