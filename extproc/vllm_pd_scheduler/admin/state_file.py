"""The file with what the admin interface changed, so that a restart does not lose it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from ..config import describe_error
from ..system.daemon_thread import in_daemon_thread
from .refusals import NotKept
from .saved_changes import AdminState

log = logging.getLogger(__name__)


class StateError(ValueError):
    """A state file cannot be used; the message says why."""


class StateFile:
    """The file at a path. It is written off the event loop: a disk that hangs holds up no request."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unusable = ""

    def read(self) -> AdminState | None:
        """Return what it holds, ``None`` if there is none. One that cannot be used is put aside."""
        try:
            return read_state(self._path)
        except StateError as error:
            self._put_aside(str(error))
            return None

    def _put_aside(self, reason: str) -> None:
        """Keep a file that cannot be used from being overwritten by the next change."""
        path = self._path
        aside = Path(f"{path}.corrupt")
        try:
            os.replace(path, aside)
        except OSError as error:
            self._unusable = f"{reason}; it cannot be renamed ({error.strerror})"
            log.warning("state_file %s: %s, so no change is taken", path, self._unusable)
        else:
            log.warning("state_file %s: %s; it is %s now, and all is as configured", path, reason, aside)

    async def write(self, state: AdminState) -> None:
        """Replace what it holds; raise :exc:`.NotKept` if that cannot be."""
        if self._unusable:
            raise NotKept(self._unusable)
        try:
            await in_daemon_thread(partial(write_state, self._path, state))
        except OSError as error:
            log.error("state_file %s: %s: a change is not kept there", self._path, error.strerror)
            raise NotKept(str(error.strerror)) from None


def read_state(path: Path) -> AdminState | None:
    """Return what a file holds, ``None`` if there is no file; raises :exc:`StateError`."""
    try:
        return AdminState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise StateError("; ".join(map(describe_error, error.errors(include_url=False)))) from None


def write_state(path: Path, state: AdminState) -> None:
    """Replace a file at once and for good, readable by its owner only; raises :exc:`OSError`."""
    text = state.model_dump_json(indent=2, exclude_none=True) + "\n"
    new = path.with_name(f".{path.name}.new")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # of a write that was killed
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
        _sync(directory)
    finally:
        os.close(directory)


def _sync(directory: int) -> None:
    """Write a directory's entries to the disk: else a power failure brings the file before back."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing
            raise
