"""Tells when the content of files is another one than before."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

from watchfiles import Change, awatch

from ..system.daemon_thread import in_daemon_thread

LOOK_S = 5.0
"""Seconds between two looks when nothing tells of a change: some file systems never do (NFS)."""

SETTLE_S = 0.3
"""Seconds for which the content must stay the same before it counts: half a YAML file makes sense too."""


class WatchedFile:
    """A file that others write: in place, by renaming another one, or by moving a symbolic link to it.

    The directory is watched, not the file, so it may vanish and come back. Several files that belong together
    count as one.
    """

    def __init__(self, *paths: str) -> None:
        self._paths = [Path(path) for path in paths]
        self._names = {path.name for path in self._paths}
        self._directories = {path.absolute().parent for path in self._paths}

    async def looks(self) -> AsyncGenerator[bool, None]:
        """Yield ``True`` each time that the content has changed and settled, also if it cannot be read now.

        At first that is so. Yield ``False`` where it is the same as before, every ``LOOK_S`` or earlier.
        """
        seen = None
        async for _ in self._hints():
            found = await self._content()
            while found != seen:
                await asyncio.sleep(SETTLE_S)
                before, found = found, await self._content()
                if found == before:
                    break
            yield found != seen
            seen = found

    async def _hints(self) -> AsyncGenerator[None, None]:
        """Yield when it is time to look: now, when something in the directory changes, every ``LOOK_S``."""
        yield
        while True:
            try:
                async for _ in awatch(
                    *self._directories,
                    watch_filter=self._concerns,
                    recursive=False,
                    debounce=200,
                    rust_timeout=int(LOOK_S * 1000),
                    yield_on_timeout=True,
                ):
                    yield
            except OSError:  # no such directory, or no watches are left
                await asyncio.sleep(LOOK_S)
                yield

    def _concerns(self, _: Change, changed: str) -> bool:
        """Whether a change in the directory may be one of the file; what is missed is seen by the next look.

        Kubernetes moves a link to a directory, through which the file is found; its name begins with dots.
        """
        name = os.path.basename(changed)
        return name in self._names or name.startswith("..")

    async def _content(self) -> bytes:
        """Return what stands for the content, or for the reason why there is none."""
        return await in_daemon_thread(partial(_digests, self._paths))


def _digests(paths: list[Path]) -> bytes:
    return b" ".join(map(_digest, paths))


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        return str(error.errno).encode()
