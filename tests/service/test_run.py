"""Starting as a process: what keeps ``up`` from it."""

import tempfile
import unittest
from unittest import mock

from tests.support.processes import unused_ports
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.envoy.ports import EnvoyPorts
from vllm_pd_scheduler.service.app import StartupError
from vllm_pd_scheduler.service.run import up
from vllm_pd_scheduler.system.output import StandardStreams


def free_ports() -> EnvoyPorts:
    return EnvoyPorts(*unused_ports(4), "127.0.0.1")


async def started() -> None:
    raise AssertionError("it cannot have started")


class UpTest(unittest.IsolatedAsyncioTestCase):
    async def test_no_place_for_a_socket(self) -> None:
        for fault in (FileNotFoundError(2, "No usable temporary directory found"), PermissionError(13, "no")):
            place = mock.patch.object(tempfile, "gettempdir", side_effect=fault)
            with place, self.assertRaisesRegex(StartupError, "^grpc_socket: .*TMPDIR.*--grpc-port$"):
                await up(SchedulerConfig(), free_ports(), "warning", started, StandardStreams())

    async def test_a_path_that_is_too_long_for_a_socket(self) -> None:
        with tempfile.TemporaryDirectory(prefix="x" * 100) as long:
            place = mock.patch.object(tempfile, "tempdir", long)
            with place, self.assertRaisesRegex(StartupError, "^grpc_socket: .* at most 107 bytes$"):
                config = SchedulerConfig(admin_port=unused_ports(1)[0])
                await up(config, free_ports(), "warning", started, StandardStreams())


if __name__ == "__main__":
    unittest.main()
