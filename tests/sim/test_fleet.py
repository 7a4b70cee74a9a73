import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import unittest
import urllib.error
import urllib.request

from tests.support.processes import running, unused_ports
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.sim.fleet import Fleet, FleetError

PARENT = """
import sys, time
from vllm_pd_scheduler.sim.fleet import Fleet
fleet = Fleet(1, 0, arguments=["--instant"])
fleet.start()
print(fleet["prefill-0"].process.pid, flush=True)
time.sleep(600)
"""


def health(url: str) -> int:
    with urllib.request.urlopen(url + "/health", timeout=HUNG_S) as response:
        return int(response.status)


def wait_gone(pid: int) -> None:
    asyncio.run(until(lambda: not running(pid)))


class FleetTest(unittest.TestCase):
    def test_kill_and_restart_on_the_same_port(self) -> None:
        with Fleet(1, 1, arguments=["--instant"]) as fleet:
            self.assertEqual([each.id for each in fleet.instances], ["prefill-0", "decode-0"])
            d = fleet["decode-0"]
            entry = {"id": "decode-0", "host": "127.0.0.1", "port": d.port}
            self.assertEqual(fleet.config()["decode_instances"], [entry])
            fleet.kill("decode-0")
            self.assertFalse(d.alive)
            with self.assertRaises(urllib.error.URLError):
                health(d.url)
            fleet.restart("decode-0")
            self.assertEqual(health(d.url), 200)
            processes = [each.process for each in fleet.instances]
        self.assertEqual([process.returncode for process in processes], [0, 0])

    def test_base_port(self) -> None:
        (base,) = unused_ports(1)
        with Fleet(1, 1, base_port=base, arguments=["--instant"]) as fleet:
            self.assertEqual([each.port for each in fleet.instances], [base, base + 100])
            with self.assertRaisesRegex(FleetError, f"prefill-0 cannot have 127.0.0.1:{base}"):
                Fleet(1, 0, base_port=base).start()

    def test_a_taken_port_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with self.assertRaisesRegex(FleetError, f"{port}: Address already in use; .*another base port"):
                Fleet(1, 0, base_port=port).start()

    def test_an_instance_that_cannot_start_says_why(self) -> None:
        with self.assertRaisesRegex(FleetError, r"decode-0 ended with 2:\n[^$]*max_model_len 99 must be"):
            Fleet(0, 1, arguments=["--num-blocks=2", "--max-model-len=99"]).start()

    def test_instances_outlive_the_thread_that_started_them(self) -> None:
        fleet = Fleet(1, 0, arguments=["--instant"])
        thread = threading.Thread(target=fleet.start)
        thread.start()
        thread.join()
        try:
            self.assertEqual(health(fleet["prefill-0"].url), 200)
        finally:
            fleet.stop()

    def test_instances_die_with_a_killed_parent(self) -> None:
        command = [sys.executable, "-c", PARENT]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout
            pid = int(parent.stdout.readline())
            os.kill(pid, signal.SIGSTOP)  # even one that can do nothing itself
            parent.kill()
        wait_gone(pid)


if __name__ == "__main__":
    unittest.main()
