"""Which of the workers of a machine a process is, and where they find each other."""

from __future__ import annotations

import asyncio
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from ..config import SchedulerConfig
from ..system.daemon_thread import in_daemon_thread


@dataclass(frozen=True, slots=True)
class Worker:
    """One of ``count`` workers. ``hub`` is the path of their parent's socket, in a directory of their own."""

    index: int
    count: int
    hub: str

    @property
    def name(self) -> str:
        """Its name among them."""
        return f"w{self.index}"

    @property
    def admin(self) -> str:
        """The path of the socket where the others ask it."""
        return f"{self.hub}.admin-{self.name}"

    @property
    def others(self) -> dict[str, str]:
        """The paths of the others' sockets, by name."""
        every = [Worker(index, self.count, self.hub) for index in range(self.count)]
        return {each.name: each.admin for each in every if each != self}

    @property
    def counts(self) -> str:
        """The path of the file with what workers have counted that have ended since."""
        return f"{self.hub}.counts"

    @property
    def secret(self) -> str:
        """The path of a file with what no client knows."""
        return f"{self.hub}.secret"

    def read_secret(self) -> str:
        """Return what no client knows, and all workers hash prompts with."""
        return Path(self.secret).read_text(encoding="ascii")

    @property
    def started(self) -> str:
        """The path of a copy of the configuration with which the parent was started."""
        return f"{self.hub}.config"

    def own_ports(self, config: SchedulerConfig) -> SchedulerConfig:
        """Return a configuration with what each worker must have for itself: the first has what is there.

        Those are the addresses where Envoy, and D that ask for prefills, find the one that has the request.
        """
        update: dict[str, int | str | None] = {"grpc_port": config.grpc_port + self.index}
        if config.grpc_socket is not None and self.index:
            update["grpc_socket"] = f"{config.grpc_socket}.{self.index}"
        if config.continuation_port is not None:
            update["continuation_port"] = config.continuation_port + self.index
        if config.metaserver_port is not None:
            update["metaserver_port"] = config.metaserver_port + self.index
        return config.model_copy(update=update)


def scheduler_name(config: SchedulerConfig, worker: Worker | None) -> str:
    """Return the name with which the ids of a scheduler's requests begin: empty, if it is alone."""
    replica = (config.replicas and config.replicas.name) or ""
    return replica + (worker.name if worker is not None else "")


class FirstWorker:
    """Which worker is the first: the one that holds a lock. The kernel gives it up when that one dies."""

    def __init__(self, worker: Worker) -> None:
        self._file = os.open(f"{worker.hub}.first", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def now(self) -> bool:
        """Whether this worker is the first, or becomes it at once."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def wait(self) -> None:
        """Wait until this worker is the first."""
        waiting: asyncio.Future[None] = in_daemon_thread(lambda: fcntl.flock(self._file, fcntl.LOCK_EX))
        await waiting
