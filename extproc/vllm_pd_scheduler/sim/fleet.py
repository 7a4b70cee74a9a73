"""A fleet of simulated instances, each in its own process."""

import errno
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Literal, Self

from .options import KvConnector
from .profile import EngineProfile

SimRole = Literal["prefill", "decode", "encode"]

DECODE_PORT_OFFSET = 100
"""Distance of the decode instances' ports from the prefill instances', with a ``base_port``."""


class FleetError(Exception):
    """An instance could not be started; the message has what its process printed."""


@dataclass(slots=True)
class SimInstance:
    """An instance of a fleet. A restart replaces ``process``; ``port_holder`` keeps the port meanwhile."""

    id: str
    role: SimRole
    host: str
    port: int
    process: subprocess.Popen[bytes]
    port_holder: socket.socket
    log: IO[bytes]
    tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether the process runs, healthy or not."""
        return self.process.poll() is None

    def output(self) -> str:
        """Return what its processes, before and after restarts, have printed."""
        # Read without moving the file offset: the processes share it, and write there.
        fd = self.log.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")


class Fleet:
    """Starts simulated instances and ends them when it is stopped.

    - The instances are called ``prefill-0``, ``decode-0`` and so on.
    - With a ``base_port``, prefill instances listen from that port on and decode instances from 100 above it,
      encode instances from 200;
      without, on unused ports. An instance keeps its port when it is restarted.
    - ``arguments`` are command line arguments of all servers, ``prefill_arguments``, ``decode_arguments`` and
      ``encode_arguments`` of those of one role. If they turn on TLS, ``tls`` is a client's context that
      trusts the servers.
    - ``connector`` is the hand-off protocol of all of them, and ``data_parallel_size`` how many engines each
      has.
    - ``timeout`` is the time in which an instance must become healthy, in seconds.

    Example::

        with Fleet(prefill=2, decode=2, profile=EngineProfile.instant()) as fleet:
            scheduler = start_scheduler(fleet.config())
    """

    def __init__(
        self,
        prefill: int = 1,
        decode: int = 1,
        *,
        host: str = "127.0.0.1",
        base_port: int | None = None,
        model: str = "sim-model",
        profile: EngineProfile | None = None,
        arguments: Sequence[str] = (),
        prefill_arguments: Sequence[str] = (),
        decode_arguments: Sequence[str] = (),
        encode: int = 0,
        encode_arguments: Sequence[str] = (),
        connector: KvConnector = "nixl",
        data_parallel_size: int = 1,
        tls: ssl.SSLContext | None = None,
        timeout: float = 30.0,
    ) -> None:
        if base_port is not None and prefill > DECODE_PORT_OFFSET:
            raise ValueError(f"at most {DECODE_PORT_OFFSET} prefill instances fit below the decode ports")
        self._counts: dict[SimRole, int] = {
            "prefill": prefill,
            "decode": decode,
            "encode": encode,
        }
        self._host = host
        self._base_port = base_port
        self.connector = connector
        self.data_parallel_size = data_parallel_size
        common = [
            f"--model={model}",
            f"--kv-connector={connector}",
            f"--data-parallel-size={data_parallel_size}",
            *(profile.arguments() if profile else ()),
            *arguments,
        ]
        self._arguments = {
            "prefill": [*common, *prefill_arguments],
            "decode": [*common, *decode_arguments],
            "encode": [*common, *encode_arguments],
        }
        self._tls = tls
        self._timeout = timeout
        self._instances: dict[str, SimInstance] = {}
        # The kernel ends a child when the thread that started it ends (see parent_death.py), so a thread of
        # the fleet's own starts them.
        self._spawner: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __getitem__(self, instance_id: str) -> SimInstance:
        return self._instances[instance_id]

    @property
    def instances(self) -> list[SimInstance]:
        """All instances, prefill first."""
        return list(self._instances.values())

    @property
    def prefill(self) -> list[SimInstance]:
        """The prefill instances."""
        return [instance for instance in self.instances if instance.role == "prefill"]

    @property
    def decode(self) -> list[SimInstance]:
        """The decode instances."""
        return [instance for instance in self.instances if instance.role == "decode"]

    def config(self) -> dict[str, list[dict[str, Any]]]:
        """Return the instances as keys of the scheduler's configuration."""

        def entries(instances: Iterable[SimInstance]) -> list[dict[str, Any]]:
            return [{"id": each.id, "host": each.host, "port": each.port} | own(each) for each in instances]

        def own(instance: SimInstance) -> dict[str, Any]:
            ranks = {"data_parallel_size": self.data_parallel_size} if self.data_parallel_size > 1 else {}
            return spoken(instance.port) | ranks

        def spoken(port: int) -> dict[str, Any]:
            match self.connector:
                case "mooncake" | "sglang":
                    return {"connector": {"type": self.connector, "bootstrap_port": port}}
                case "moriio-read" | "moriio-write":
                    ports = {"handshake_port": port, "notify_port": port}
                    return {"connector": {"type": "moriio", "mode": self.connector[7:], **ports}}
                case "offloading-p2p":
                    return {"connector": {"type": "offloading-p2p", "p2p_port": port}}
            return {} if self.connector in ("nixl", "none") else {"connector": self.connector}

        found = {"prefill_instances": entries(self.prefill), "decode_instances": entries(self.decode)}
        encode = [
            {"id": each.id, "host": each.host, "port": each.port}
            for each in self.instances
            if each.role == "encode"
        ]
        return found | ({"encode_instances": encode} if encode else {})

    def start(self) -> None:
        """Start all instances and wait until they are healthy; raise FleetError and stop all if one fails."""
        if self._instances:
            raise FleetError("the fleet is running")
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="sim-fleet")
        try:
            for role, count in self._counts.items():
                for number in range(count):
                    self._add(role, number)
            self._wait(self.instances)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all instances; kill those that still run after five seconds. Further calls do nothing."""
        for instance in self.instances:
            if instance.alive:
                instance.process.terminate()
                instance.process.send_signal(signal.SIGCONT)  # a stopped process gets no SIGTERM
        deadline = time.monotonic() + 5
        for instance in self.instances:
            try:
                instance.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                instance.process.kill()
                instance.process.wait()
            instance.port_holder.close()
            instance.log.close()
        self._instances.clear()
        if self._spawner:
            self._spawner.shutdown()
            self._spawner = None

    def kill(self, instance_id: str, signum: int = signal.SIGKILL) -> None:
        """Send a signal to an instance; after SIGKILL, wait until it has ended."""
        process = self[instance_id].process
        process.send_signal(signum)
        if signum == signal.SIGKILL:
            process.wait()

    def restart(self, instance_id: str) -> None:
        """Start an instance again on its port, after killing it if it runs, and wait until it is healthy.

        Raise FleetError if it does not become healthy.
        """
        instance = self[instance_id]
        if instance.alive:
            self.kill(instance_id)
        instance.process = self._spawn(instance.role, instance.port, instance.log)
        self._wait([instance])

    def _add(self, role: SimRole, number: int) -> None:
        name = f"{role}-{number}"
        port = 0
        if self._base_port is not None:
            port = self._base_port + number + DECODE_PORT_OFFSET * list(self._counts).index(role)
        try:
            reserved = _reserve(self._host, port)
        except OSError as error:
            more = "; end what has it, or choose another base port" if error.errno == errno.EADDRINUSE else ""
            raise FleetError(f"{name} cannot have {self._host}:{port}: {error.strerror}{more}") from error
        port = reserved.getsockname()[1]
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the instance owns it
        process = self._spawn(role, port, log)
        self._instances[name] = SimInstance(name, role, self._host, port, process, reserved, log, self._tls)

    def _spawn(self, role: str, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        assert self._spawner is not None
        module = "vllm_pd_scheduler.sim.server"
        command = [sys.executable, "-m", module, f"--role={role}", f"--host={self._host}", f"--port={port}"]
        command += ["--reuse-port", f"--die-with-parent={os.getpid()}", *self._arguments[role]]
        return self._spawner.submit(self._start, command, log).result()

    def _start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        # In a session of its own it gets no Ctrl-C from the terminal: the parent decides when it ends.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _wait(self, instances: list[SimInstance]) -> None:
        deadline = time.monotonic() + self._timeout
        for instance in instances:
            while not _healthy(instance):
                if not instance.alive:
                    code = instance.process.returncode
                    raise FleetError(f"{instance.id} ended with {code}:\n{instance.output()}")
                if time.monotonic() > deadline:
                    raise FleetError(
                        f"{instance.id} is not healthy after {self._timeout} s:\n{instance.output()}"
                    )
                time.sleep(0.02)


def _reserve(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a port, without listening, so that no other process gets the port.

    The instance shares the port by SO_REUSEPORT; while it is down, connections are refused.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if port:
        # SO_REUSEPORT would share the port with another fleet too, so see first whether it is in use.
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    reserved = socket.socket(family)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        reserved.bind((host, port))
    except OSError:
        reserved.close()
        raise
    return reserved


def _healthy(instance: SimInstance) -> bool:
    """Return whether the instance answers ``/health`` with 200."""
    address, tls = (instance.host, instance.port), instance.tls
    connection = (
        http.client.HTTPSConnection(*address, timeout=1, context=tls)
        if tls
        else http.client.HTTPConnection(*address, timeout=1)
    )
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
