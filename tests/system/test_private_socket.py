"""Where a socket is that only this user can reach."""

import os
import socket
import stat
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from vllm_pd_scheduler.system.private_socket import is_served, private_socket_path


class PrivateSocketTest(unittest.TestCase):
    def setUp(self) -> None:
        self.temporary = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.enterContext(mock.patch("tempfile.tempdir", str(self.temporary)))

    def left_behind(self, *, served: bool = False) -> Path:
        """A directory as another process made it, with its socket."""
        directory = Path(tempfile.mkdtemp(prefix="vllm-pd-socket-"))
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(str(directory / "grpc"))
        if served:
            bound.listen()
            self.addCleanup(bound.close)
        else:
            bound.close()
        return directory

    def test_nobody_else_can_enter_its_directory(self) -> None:
        with private_socket_path() as path:
            directory = Path(path).parent
            self.assertEqual(stat.S_IMODE(directory.stat().st_mode), 0o700)
            self.assertEqual(list(directory.iterdir()), [])
        self.assertEqual(list(self.temporary.iterdir()), [])

    def test_its_path_is_short_enough_for_a_socket(self) -> None:
        with private_socket_path() as path:
            self.assertLess(len(path) - len(str(self.temporary)), 40)

    def test_what_a_killed_process_left_goes_when_the_next_one_comes(self) -> None:
        left = self.left_behind()
        with private_socket_path():
            self.assertFalse(left.exists())

    def test_what_another_one_has_stays(self) -> None:
        served = self.left_behind(served=True)
        starting = self.temporary / served.name.replace(served.name[-8:], "starting")
        starting.mkdir()
        with private_socket_path():
            self.assertTrue(served.exists())
            self.assertTrue(starting.exists(), "its socket is about to be made")

    def test_one_that_does_not_listen_yet_stays(self) -> None:
        """It refuses connections as one does that was left behind."""
        with private_socket_path() as path, socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path)
            with private_socket_path():
                self.assertTrue(Path(path).exists())

    def test_a_strangers_directory_stays(self) -> None:
        left = self.left_behind()
        with mock.patch("os.getuid", return_value=os.getuid() + 1), private_socket_path():
            self.assertTrue(left.exists())

    def test_whether_somebody_serves_it(self) -> None:
        self.assertTrue(is_served(str(self.left_behind(served=True) / "grpc")))
        self.assertFalse(is_served(str(self.left_behind() / "grpc")))
        with self.assertRaises(FileNotFoundError):
            is_served(str(self.temporary / "none"))


if __name__ == "__main__":
    unittest.main()
