"""A place for a Unix socket that no other user can reach, and nothing of it is left behind for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "vllm-pd-socket-"
_NAME = "grpc"


@contextmanager
def private_socket_path() -> Iterator[str]:
    """Give a path in a new directory that only this user can enter, and remove both at the end.

    A process that is killed leaves its directory; the next one that comes here removes it. Raises
    :exc:`OSError` if there is no place for a directory.
    """
    _remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as directory, _locked(directory):
        yield f"{directory}/{_NAME}"


def is_served(path: str) -> bool:
    """Whether a process accepts connections at a Unix socket; raises :exc:`OSError` if there is none."""
    with socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(1.0)
        try:
            trial.connect(path)
        except ConnectionRefusedError:
            return False
        except TimeoutError:
            pass  # somebody has it, and is busy
    return True


def _remove_left_behind() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # without a socket it may be another's that is just starting
            if directory.lstat().st_uid == os.getuid() and not is_served(str(directory / _NAME)):
                with _locked(directory):
                    shutil.rmtree(directory)


@contextmanager
def _locked(directory: Path | str) -> Iterator[None]:
    """Lock a directory, as its process does for as long as it lives; raises :exc:`OSError` if that lives.

    A socket that is bound, and does not listen yet, refuses connections like one that was left behind.
    """
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)
