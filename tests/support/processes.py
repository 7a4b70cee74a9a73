"""Real processes for tests: the scheduler's command line, Envoy, and a client for what stands behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.support.sim_fleet import Fleet, SimInstance
from tests.support.template import start
from tests.support.waiting import HUNG_S, until
from vllm_pd_scheduler.envoy.configuration import render_config
from vllm_pd_scheduler.envoy.ports import CONTINUATION_PORT, EnvoyPorts
from vllm_pd_scheduler.envoy.process import find_envoy

# Tests that make an instance fail must find it in its turn afterwards.
NO_EJECTION = {"ejection_failures": 1_000_000, "ejection_success_rate": 0.0}


def _all_ports() -> Iterator[int]:
    """Ports below those that the kernel gives to clients, round and round; each process begins elsewhere."""
    first, size = 12_000, 20_000
    return (first + (os.getpid() * 97 + number) % size for number in itertools.count())


_ports = _all_ports()
_claims: deque[socket.socket] = deque()
"""Other test processes leave a port alone while this one has it for UDP."""


def unused_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, others at each call, and others than test processes beside this.

    Not those that the kernel would choose: Envoy shares its ports (SO_REUSEPORT), so two that were given
    the same by chance would both start, and answer each other's clients.
    """
    found: list[int] = []
    while len(found) < count:
        address = ("127.0.0.1", next(_ports))
        claim = socket.socket(type=socket.SOCK_DGRAM)
        try:
            claim.bind(address)
            with socket.socket() as probe:
                probe.bind(address)
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        found.append(address[1])
    while len(_claims) > 200:  # whoever had those has ended
        _claims.popleft().close()
    return found


@dataclass
class Process:
    """A process of ours and what it printed."""

    process: subprocess.Popen[bytes]
    log: Any

    @property
    def output(self) -> str:
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    async def says(self, text: str, times: int = 1) -> None:
        """Wait until a text was printed so often: a thread prints what is logged, a moment later."""
        await until(lambda: self.output.count(text) >= times)

    def lines(self) -> list[str]:
        """Return what was printed, but the line that is being printed now."""
        return self.output.rpartition("\n")[0].splitlines()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = HUNG_S) -> int:
        return self.process.wait(seconds)

    def children(self) -> list[int]:
        """The processes that it started."""
        return children(self.process.pid)


@contextmanager
def spawned(command: list[str], **environment: str) -> Iterator[Process]:
    """Run a command; at the end of the block it is ended, by force if need be."""
    with tempfile.TemporaryFile() as log:
        popen = start(command, log, {**os.environ, **environment})
        try:
            yield Process(popen, log)
        finally:
            if popen.poll() is None:
                popen.terminate()
                popen.send_signal(signal.SIGTERM)  # the second one means: do not drain
                try:
                    popen.wait(10)
                except subprocess.TimeoutExpired:
                    popen.kill()
                    popen.wait()


def children(pid: int) -> list[int]:
    """Return the processes that a process started. Its threads come and go while they are read."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, path.read_text().split())
    return found


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends between opening and reading
        return False


@dataclass
class Stack:
    """Where a scheduler and its Envoy are, and how to start them for a fleet's configuration."""

    directory: Path
    ports: EnvoyPorts = field(default_factory=lambda: EnvoyPorts(*unused_ports(4), "127.0.0.1"))
    admin_port: int = field(default_factory=lambda: unused_ports(1)[0])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.ingress}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def listener(self) -> dict[str, str]:
        """The setting that sends prefills through Envoy."""
        return {"prefill_listener": f"http://127.0.0.1:{self.ports.prefill}"}

    @property
    def envoy_admin(self) -> str:
        return f"http://127.0.0.1:{self.ports.admin}"

    def write_config(self, config: dict[str, Any]) -> Path:
        path = self.directory / "scheduler_config.json"
        # A probe waits so long that an instance which only lacks CPU is not taken for one that hangs.
        defaults = {"health_check_interval": 0.5, "health_check_timeout": 10.0, "drain_timeout": 10.0}
        path.write_text(json.dumps({**defaults, **config}))
        return path

    def up(self, config: dict[str, Any]) -> list[str]:
        """Return the command for both in one."""
        ports = self.ports
        options = {
            "config": self.write_config(config),
            "port": ports.ingress,
            "prefill-port": ports.prefill,
            "admin-port": self.admin_port,
            "envoy-admin-port": ports.admin,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "vllm_pd_scheduler", "up", *arguments]

    def serve(self, config: dict[str, Any]) -> list[str]:
        """Return the command for the scheduler alone."""
        ports = {"grpc_port": self.ports.grpc, "admin_port": self.admin_port}
        path = self.write_config({**config, **ports})
        return [sys.executable, "-m", "vllm_pd_scheduler", "--config", str(path)]

    def envoy(self) -> list[str]:
        """Return the command for Envoy alone, on the configuration that ships."""
        path = self.directory / "envoy.yaml"
        used = self.ports.continuation
        ports = replace(self.ports, continuation=None if used == CONTINUATION_PORT else used)
        path.write_text(yaml.safe_dump(render_config(ports)))
        return [find_envoy(), "-c", str(path), "--log-level", "warning", "--disable-hot-restart"]


class Client:
    """An HTTP client of a stack and of the simulated fleet behind it."""

    def __init__(self, session: aiohttp.ClientSession, stack: Stack, fleet: Fleet) -> None:
        self.session = session
        self.stack = stack
        self.fleet = fleet

    async def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a request through Envoy; a body that is not bytes goes as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {} if data is None else {"content-type": "application/json"}
        async with self.session.request(
            method, self.stack.url + path, data=data, headers={**sent, **(headers or {})}
        ) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, found, await response.read())

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        return await self.send("POST", path, body, headers)

    async def complete(self, **body: Any) -> Answer:
        """Send a completion request that any instance answers the same."""
        return await self.post("/v1/completions", {"prompt": "Where is the cache?", "max_tokens": 8, **body})

    async def json(self, url: str) -> Any:
        async with self.session.get(url) as response:
            return await response.json(content_type=None)

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        """Call the scheduler's admin interface; return status and decoded answer."""
        async with self.session.request(method, self.stack.admin + path, json=body) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith("{") else text

    async def instance(self, instance_id: str) -> dict[str, Any]:
        """Return what the scheduler knows of an instance."""
        status, found = await self.admin("GET", f"/instances/{instance_id}")
        assert status == 200, found
        return dict(found)

    async def in_flight(self) -> int:
        """Return the sum of what the scheduler counts as in flight."""
        _, found = await self.admin("GET", "/instances")
        return sum(each["in_flight"] for each in found["instances"])

    @asynccontextmanager
    async def held_stream(self, decode: Sequence[SimInstance] | None = None) -> AsyncIterator[HeldStream]:
        """Give a stream that has begun, and whose D, one of these or of the fleet, makes no step.

        So it does not end, however long the block takes; at its end the engines go on.
        """
        held = HeldStream(self, self.fleet.decode if decode is None else decode)
        body = {"prompt": "Where is the cache?", "max_tokens": 4, "ignore_eos": True, "stream": True}
        try:
            await held.stick(True)
            async with self.session.post(self.stack.url + "/v1/completions", json=body) as held.response:
                yield held
        finally:
            await held.stick(False)

    async def until_in_flight(self, count: int) -> None:
        """Wait until so many are: the scheduler learns of an answer's end a moment after the client."""

        async def reached() -> bool:
            return await self.in_flight() == count

        await until(reached)

    async def undo_faults(self) -> None:
        """Let all simulated instances that live work as they should."""
        for instance in self.fleet.instances:
            if instance.alive:
                await self.fault(instance.id)

    async def until_split(self) -> None:
        """Wait until a request has a P: Envoy asks the scheduler once it has found it healthy."""

        async def split() -> bool:
            return "x-pd-prefill" in (await self.complete()).headers

        await until(split)

    async def until_freed(self) -> None:
        """Wait until no prefill instance holds blocks for a hand-off, and none by the end of its lease."""

        async def total(what: Callable[[Any], int]) -> int:
            return sum([what(await self.json(each.url + "/_sim/stats")) for each in self.fleet.prefill])

        async def expired() -> int:
            return await total(lambda stats: stats["hand_offs"].get("expired", 0))

        async def freed() -> bool:
            return await total(lambda stats: stats["pinned"]) == 0

        before = await expired()
        await until(freed)
        assert await expired() == before, "nobody freed it"

    async def fault(self, instance_id: str, **fault: Any) -> None:
        """Make a simulated instance misbehave; with no arguments, behave."""
        url = self.fleet[instance_id].url + "/_sim/fault"
        async with self.session.post(url, json=fault) as response:
            assert response.status == 200, await response.text()

    @contextmanager
    def frozen(self, *instance_ids: str) -> Iterator[None]:
        """Stop instances while the block runs; they take connections and do not answer."""
        for instance_id in instance_ids:
            self.fleet.kill(instance_id, signal.SIGSTOP)
        try:
            yield
        finally:
            for instance_id in instance_ids:
                self.fleet.kill(instance_id, signal.SIGCONT)

    async def self_check(self, prefill: str, decode: str) -> dict[str, Any]:
        """Have a pair checked, as soon as neither has anything else to do; return what came of it."""
        result: dict[str, Any] = {}

        async def tried() -> bool:
            status, found = await self.admin("POST", f"/self-check?prefill={prefill}&decode={decode}")
            assert status == 200, found
            (one,) = found["checks"]
            result.update(one)
            return bool(one["result"] != "skipped")

        await until(tried)
        return result

    async def seen(self, instance_id: str, releases: bool = False) -> list[dict[str, Any]]:
        """Return the requests that a simulated instance got, oldest first.

        Those by which the scheduler frees a hand-off are its own doing, and come when they come: they are
        left out but for ``releases``.
        """
        found: list[dict[str, Any]] = await self.json(self.fleet[instance_id].url + "/_sim/requests")
        return [each for each in found if releases or each["outcomes"] != ["released"]]

    async def request_of(self, answer: Answer) -> dict[str, Any]:
        """Return the request that the decode instance which gave an answer got for it."""
        number = answer.headers["x-request-id"]
        seen = await self.seen(answer.headers["x-pd-decode"])
        names = ("x-request-id", "x-pd-request-id")  # D of some protocols has another id than the client
        return next(each for each in reversed(seen) if number in [_header(each, name) for name in names])

    async def prefilled_by(self, answer: Answer) -> str | None:
        """Return who has prefilled a request; where P is chosen later, no header says that."""
        told = answer.headers.get("x-pd-prefill")
        if told != "(later)":
            return told
        _, found = await self.admin("GET", f"/decisions?request_id={answer.headers['x-request-id']}")
        return str(found["decisions"][-1]["prefill"]["attempts"][-1]["instance"])

    async def seen_since(self, instance_id: str, number: int, releases: bool = False) -> list[dict[str, Any]]:
        """Return the requests that came after the one with this number."""
        return [each for each in await self.seen(instance_id, releases) if each["number"] > number]

    async def seen_by_all(self, releases: bool = False) -> dict[str, int]:
        """Return the number of the last request that each simulated instance that runs got so far."""
        found = {each.id: await self.seen(each.id, releases) for each in self.fleet.instances if each.alive}
        return {name: seen[-1]["number"] if seen else 0 for name, seen in found.items()}

    async def states(self) -> dict[str, str]:
        """Return the state of each instance, as the scheduler sees it."""
        _, found = await self.admin("GET", "/instances")
        return {each["id"]: each["state"] for each in found["instances"]}

    async def envoy_hosts(self) -> dict[str, str]:
        """Return ``cluster address`` → EDS health of the hosts that Envoy knows."""
        found = await self.json(self.stack.envoy_admin + "/clusters?format=json")
        hosts = {}
        for cluster in found["cluster_statuses"]:
            for host in cluster.get("host_statuses", []):
                address = host["address"].get("socket_address")
                if address is None:
                    continue  # the scheduler, at a Unix socket
                name = f"{cluster['name']} {address['address']}:{address['port_value']}"
                hosts[name] = host["health_status"].get("eds_health_status", "HEALTHY")
        return hosts

    async def healthy_schedulers(self, count: int) -> bool:
        """Return whether Envoy finds so many schedulers healthy."""
        url = f"{self.stack.envoy_admin}/stats?filter=cluster.scheduler.membership_healthy"
        async with self.session.get(url) as response:
            return (await response.text()).split()[-1] == str(count)

    async def until_known(self) -> None:
        """Wait until Envoy itself knows every instance of the fleet, and that it can serve."""

        async def known() -> bool:
            hosts = await self.envoy_hosts()
            own = [health for name, health in hosts.items() if name.split()[0] in ("prefill", "decode")]
            return own == ["HEALTHY"] * len(self.fleet.instances)

        await until(known)


@dataclass
class HeldStream:
    """A stream that stands still."""

    client: Client
    decode: Sequence[SimInstance]
    response: aiohttp.ClientResponse = field(init=False)

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    async def stick(self, stuck: bool) -> None:
        """Have the engines that run stand still, or go on."""
        for each in self.decode:
            if each.alive:
                async with self.client.session.post(
                    each.url + "/_sim/fault", json={"stuck": stuck}
                ) as answer:
                    assert answer.status == 200

    async def rest(self) -> bytes:
        """Let it go on, and return what comes."""
        await self.stick(False)
        return await self.response.read()


async def ready(client: Client, process: Process) -> None:
    """Wait until Envoy says that a P and a D can serve, and asks the scheduler.

    It knows the instances from the scheduler, but asks it only once a health check of its own has succeeded:
    until then, D prefills.
    """

    async def healthy() -> bool:
        assert process.process.poll() is None, process.output
        try:
            if (await client.send("GET", "/health")).status != 200:
                return False
            # The scheduler answers this itself; without it, a D says of itself that it is well.
            return (await client.send("GET", "/health?model=any")).body.startswith(b'{"status"')
        except aiohttp.ClientConnectionError:
            return False

    await until(healthy)


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an OpenAI-shaped body; fails for any other shape."""
        assert self.headers["content-type"].startswith("application/json"), self
        error = dict(self.json["error"])
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["code"] == self.status
        assert error["message"]
        return error

    @property
    def events(self) -> list[str]:
        """The data of each server-sent event."""
        assert self.headers["content-type"].startswith("text/event-stream"), self
        return [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]

    @property
    def text(self) -> str:
        """The answer's text, streamed or not, of a completion or a chat."""
        assert self.status == 200, self
        if self.headers["content-type"].startswith("text/event-stream"):
            assert self.events[-1] == "[DONE]"
            chunks = [json.loads(event) for event in self.events[:-1]]
        else:
            chunks = [self.json]
        return "".join(_text(choice) for chunk in chunks for choice in chunk["choices"])


def _header(seen: dict[str, Any], name: str) -> str | None:
    return next((value for key, value in seen["headers"].items() if key.lower() == name), None)


def _text(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("delta") or choice.get("message") or {}).get("content") or "")
