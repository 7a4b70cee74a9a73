"""Made-up loads of stated shapes, for ``replay`` and for those who have no trace, repeatable by a seed.

They are made to be like what is published of such loads, not like any one trace. Lengths are lognormal: the
number with each is the median, and the other one the standard deviation of the logarithm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

from ..records.recording import BLOCK_TOKENS
from .trace import Trace, TraceRequest

TOKEN_S = 0.02
"""Seconds that a token of an answer takes, for the times at which later requests come at the earliest.

A replay that knows what follows what sends them when the simulated answer has ended, not before.
"""
_MAX_PROMPT = 900_000


@dataclass
class _Agent:
    """What one conversation has in its context, and when its last answer ends."""

    session: str
    now: float
    blocks: tuple[int, ...]
    tokens: int
    after: tuple[str, ...] = ()
    calls: int = 0


@dataclass
class _Draw:
    """All that is random."""

    seed: int
    block: int = BLOCK_TOKENS
    """Tokens that a block has."""
    random: Random = field(init=False)
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def tokens(self, median: float, sigma: float, most: int = _MAX_PROMPT) -> int:
        """Return a length, at least one token."""
        return max(1, min(most, round(self.random.lognormvariate(math.log(median), sigma))))

    def seconds(self, median: float, sigma: float) -> float:
        """Return a pause."""
        return self.random.lognormvariate(math.log(median), sigma)

    def geometric(self, mean: float) -> int:
        """Return a number, at least one."""
        return 1 + int(math.log(1.0 - self.random.random()) / math.log(1.0 - 1.0 / mean)) if mean > 1 else 1

    def shared(self, number: int, median: float, sigma: float) -> list[tuple[int, ...]]:
        """Return so many beginnings of prompts, as blocks."""
        return [self.longer((), max(self.block, self.tokens(median, sigma))) for _ in range(number)]

    def often(self, beginnings: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Return one of them: the second is used half as often as the first, the third a third as often."""
        return self.random.choices(beginnings, [1 / rank for rank in range(1, len(beginnings) + 1)])[0]

    def longer(self, blocks: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """Return the blocks of a prompt of so many tokens that begins with ``blocks``."""
        return blocks + tuple(itertools.islice(self.ids, max(0, tokens // self.block - len(blocks))))

    def call(
        self, agent: _Agent, new: int, output: int, pause: float, also: tuple[str, ...] = ()
    ) -> TraceRequest:
        """Return the next call of an agent, with ``new`` tokens more, and have its context grow by both."""
        agent.now += pause
        agent.tokens += new
        agent.blocks = self.longer(agent.blocks, agent.tokens)
        agent.calls += 1
        name = f"{agent.session}/{agent.calls}"
        after = (*agent.after, *also)
        request = TraceRequest(
            agent.now, agent.tokens, output, agent.blocks, agent.session, name, after, pause if after else 0.0
        )
        agent.after = (name,)
        agent.now += TOKEN_S * output
        agent.tokens += output
        agent.blocks = self.longer(agent.blocks, agent.tokens)
        return request


_Session = Callable[[_Draw, str, float], Iterator[TraceRequest]]
"""Makes the requests of a session with a name that begins at a time."""


def _chat(draw: _Draw) -> _Session:
    systems = draw.shared(8, 1200, 0.6)

    def session(draw: _Draw, name: str, start: float) -> Iterator[TraceRequest]:
        system = draw.often(systems)
        agent = _Agent(name, start, system, len(system) * draw.block)
        for turn in range(min(30, draw.geometric(5))):
            new = draw.tokens(120, 1.0, 4000)
            if draw.random.random() < 0.12:  # a text to work on
                new += draw.tokens(3500, 0.9, 60_000)
            pause = draw.seconds(20, 1.0) if turn else 0.0
            yield draw.call(agent, new, draw.tokens(280, 0.8, 4000), pause)

    return session


def _agents(draw: _Draw) -> _Session:
    tools = draw.shared(4, 22_000, 0.2)
    helpers = draw.shared(3, 14_000, 0.2)

    def work(agent: _Agent, steps: int, spawns: float) -> Iterator[TraceRequest]:
        results: tuple[str, ...] = ()
        for step in range(steps):
            new = draw.tokens(1300, 1.1, 40_000)
            pause = draw.seconds(2.0, 1.1) if step else 0.0
            yield draw.call(agent, new, draw.tokens(317, 0.9, 8000), pause, results)
            results = ()
            if agent.tokens > 400_000:  # the context is summed up
                agent.tokens = 60_000
                agent.blocks = draw.longer(agent.blocks[:40], agent.tokens)
            if draw.random.random() < spawns:
                ends = agent.now
                for number in range(min(40, draw.geometric(5))):
                    begin = draw.often(helpers)
                    child = _Agent(
                        f"{agent.session}.{agent.calls}.{number}", agent.now, begin,
                        len(begin) * draw.block, agent.after,
                    )  # fmt: skip
                    yield from work(child, draw.geometric(5), 0.0)
                    results += child.after
                    ends = max(ends, child.now)
                agent.now = ends

    def session(draw: _Draw, name: str, start: float) -> Iterator[TraceRequest]:
        begin = draw.often(tools)
        tokens = len(begin) * draw.block + draw.tokens(165_000, 0.4, 320_000)
        agent = _Agent(name, start, draw.longer(begin, tokens), tokens)
        yield from work(agent, draw.geometric(45), 0.012)

    return session


def _batch(draw: _Draw) -> _Session:
    instructions = draw.shared(12, 1500, 0.5)

    def session(draw: _Draw, name: str, start: float) -> Iterator[TraceRequest]:
        begin = draw.often(instructions)
        typical = draw.tokens(5000, 0.8, 40_000)
        for number in range(min(400, draw.geometric(80))):
            agent = _Agent(f"{name}.{number}", start, begin, len(begin) * draw.block)
            yield draw.call(agent, draw.tokens(typical, 0.5, 120_000), draw.tokens(350, 0.5, 4000), 0.0)

    return session


def _code(draw: _Draw) -> _Session:
    def session(draw: _Draw, name: str, start: float) -> Iterator[TraceRequest]:
        context = draw.tokens(3000, 0.9, 30_000)
        kept = draw.longer((), context)
        agent = _Agent(name, start, kept, context)
        for number in range(min(200, draw.geometric(15))):
            if number:  # what comes before the cursor changes at some place
                stays = kept[: draw.random.randint(0, len(kept))]
                agent.tokens = len(kept) * draw.block
                agent.blocks = kept = draw.longer(stays, agent.tokens)
            agent.after = ()  # nobody waits for a suggestion before he types on
            yield draw.call(
                agent, draw.tokens(300, 0.8, 8000), draw.tokens(28, 0.7, 500), draw.seconds(4.0, 1.0)
            )

    return session


SHAPES: dict[str, tuple[Callable[[_Draw], _Session], int]] = {
    "chat": (_chat, 64),
    "agents": (_agents, BLOCK_TOKENS),
    "batch": (_batch, 64),
    "code": (_code, 64),
}
"""What a load may be like, and the tokens of its blocks. ``docs/replay.md`` describes each."""


def make(shape: str, requests: int, seed: int = 0) -> Trace:
    """Return a load of a shape: about ``requests`` of them, one a second on average.

    Sessions begin at random until there are so many requests, and each goes on to its end. Raise
    :exc:`ValueError`, which lists the shapes, for any other.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
    begin, block = SHAPES[shape]
    draw = _Draw(seed, block)
    session = begin(draw)
    sessions: list[list[TraceRequest]] = []
    count = 0
    while count < requests:
        sessions.append(list(session(draw, str(len(sessions)), 0.0)))
        count += len(sessions[-1])
    starts = sorted(draw.random.uniform(0.0, float(count)) for _ in sessions)
    made = [
        replace(each, arrival=each.arrival + start)
        for start, calls in zip(starts, sessions, strict=True)
        for each in calls
    ]
    made.sort(key=lambda each: each.arrival)
    return Trace([replace(each, arrival=each.arrival - made[0].arrival) for each in made], block)
