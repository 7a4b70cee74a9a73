"""The kinds of load, and what is measured with each."""

import asyncio
import json
from dataclasses import dataclass, field
from statistics import median

from .load import Body, Load, Seen
from .routers import ENVOY, OURS, PEER, Fleet, Router

WARM_UP_S = 0.2
REQUEST_S = 1.0
ANSWER_TOKENS = 8
RESIDENT_AFTER_S = 1.0
"""When the memory is read, in seconds after the streams have begun: all run then."""

Sample = dict[str, float]
"""What one run measures: values by metric."""

_TEXT = "The cache travels from prefill to decode while the client waits for its first token. "


@dataclass(frozen=True)
class Setup:
    """A fleet, and the strategy of each router before it. Routers are started once a set-up."""

    instances: int
    strategies: dict[str, str]


ONE_PAIR = Setup(1, {OURS: "round_robin", PEER: "round_robin", ENVOY: "round_robin"})
FOUR_PAIRS = Setup(4, {OURS: "predicted_latency", PEER: "cache_aware", ENVOY: "round_robin"})
SETUPS = (ONE_PAIR, FOUR_PAIRS)


@dataclass(frozen=True)
class Workload:
    """So many clients in a closed loop, each with one connection. ``kind`` selects it on the command line."""

    name: str
    kind: str
    title: str
    clients: int
    setup: Setup = field(default=ONE_PAIR, repr=False)
    prompt: int = 200
    """Bytes of a prompt."""
    conversations: int = 0
    """Three quarters of a prompt are those of one of so many conversations; 0: nothing is shared."""
    stream: int = 0
    """Tokens of the one stream that each client asks for; 0: answers in one piece, one after the other."""
    metrics: tuple[str, ...] = ("cpu_ms", "requests_per_s", "p50_ms", "p99_ms")

    def body(self, *, stream: bool = True, params: dict[str, object] | None = None) -> Body:
        """Return what gives each request its body; ``params`` are its ``kv_transfer_params``."""
        shared = self.prompt * 3 // 4 if self.conversations else 0
        filler = (_TEXT * (self.prompt // len(_TEXT) + 1))[: self.prompt]
        first, rest = filler[:shared].encode(), filler[shared:].encode()
        keys = {"max_tokens": self.stream or ANSWER_TOKENS, "stream": stream and bool(self.stream)}
        hand_off = {"kv_transfer_params": params} if params else {}
        begin, end = b'{"model": "fake-model", "prompt": "', b'", ' + json.dumps(keys | hand_off).encode()[1:]
        conversations = self.conversations
        if conversations:
            return lambda number: (
                *(begin, b"Conversation %d. " % (number % conversations), first),
                *(b"Turn %d. " % number, rest, end),
            )
        return lambda number: (begin, b"Request %d. " % number, rest, end)

    async def measure(self, router: Router) -> tuple[Sample, Seen]:
        """Put this load on a router. All connections are open and warm before anything is counted."""
        async with Load(router.port, self.clients) as load:
            warm_up = await load.run(self.body(stream=False), WARM_UP_S)
            before = router.cpu_seconds()
            if self.stream:
                resident = asyncio.create_task(self._resident(router))
                seen = await load.run(self.body(), stream=self.stream)
                sample = _of_streams(seen, router.cpu_seconds() - before, await resident)
            else:
                seen = await load.run(self.body(), REQUEST_S)
                sample = _of_requests(seen, router.cpu_seconds() - before)
        seen.errors += warm_up.errors
        return {name: value for name, value in sample.items() if name in self.metrics}, seen

    async def _resident(self, router: Router) -> float:
        await asyncio.sleep(RESIDENT_AFTER_S)
        return router.resident_mb()

    async def direct(self, instances: Fleet) -> tuple[Seen, Seen]:
        """Return what clients see that ask P for a prefill, and what those see that ask D for an answer."""
        found = []
        send: dict[str, object] = {"do_remote_decode": True}
        for port, params in ((instances.prefill[0], send), (instances.decode[0], None)):
            async with Load(port, self.clients) as load:
                body = self.body(params=params)
                await load.run(body, WARM_UP_S)
                found.append(await load.run(body, REQUEST_S))
        return found[0], found[1]


def _of_requests(seen: Seen, used: float) -> Sample:
    if not seen.times:
        return {}
    return {
        "cpu_ms": used * 1e3 / len(seen.times),
        "requests_per_s": len(seen.times) / seen.seconds,
        "p50_ms": seen.p50 * 1e3,
        "p99_ms": seen.p99 * 1e3,
    }


def _of_streams(seen: Seen, used: float, resident: float) -> Sample:
    if not seen.tokens:
        return {}
    return {
        "cpu_ms_per_1000_tokens": used * 1e6 / seen.tokens,
        "ttft_p50_ms": median(seen.first_tokens) * 1e3,
        "resident_mb": resident,
    }


_BIG = ("cpu_ms", "p50_ms")
_PREFIXES = ("cpu_ms", "requests_per_s")
_TOKENS = "cpu_ms_per_1000_tokens"

WORKLOADS = (
    Workload("requests-1", "requests", "1 client", 1),
    Workload("requests-16", "requests", "16 clients", 16),
    Workload("requests-64", "requests", "64 clients", 64),
    Workload("streams-64", "streams", "64 streams of 300 tokens", 64, stream=300, metrics=(_TOKENS,)),
    Workload(
        "burst-256", "burst", "256 streams of 200 tokens at once", 256,
        stream=200, metrics=(_TOKENS, "ttft_p50_ms", "resident_mb"),
    ),
    Workload("prompts-1mb", "prompts", "prompts of 1 MB, 1 client", 1, prompt=1_000_000, metrics=_BIG),
    Workload("prompts-10mb", "prompts", "prompts of 10 MB, 1 client", 1, prompt=10_000_000, metrics=_BIG),
    Workload(
        "prefixes-16", "prefixes", "2 KB prompts with shared prefixes, 16 clients", 16,
        FOUR_PAIRS, prompt=2_000, conversations=64, metrics=_PREFIXES,
    ),
    Workload(
        "prefixes-64", "prefixes", "2 KB prompts with shared prefixes, 64 clients", 64,
        FOUR_PAIRS, prompt=2_000, conversations=64, metrics=_PREFIXES,
    ),
)  # fmt: skip
KINDS = tuple(dict.fromkeys(each.kind for each in WORKLOADS))
