"""A load that runs while something fails, and what its clients saw."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp

from tests.support.processes import Answer, Client
from tests.support.waiting import until

PROMPTS = [f"Prompt number {number}: what becomes of the cache?" for number in range(8)]


@dataclass
class Seen:
    """What the clients of a load saw. ``wrong`` are texts that no correct instance gives."""

    answers: list[Answer] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def more(self, count: int = 20) -> None:
        """Wait until so many more answers have come."""
        wanted = len(self.answers) + count

        async def come() -> bool:
            return len(self.answers) >= wanted

        await until(come)

    def assert_clean(self) -> None:
        assert self.answers
        assert not self.errors, self.errors
        assert not self.wrong, self.wrong[:3]


@contextlib.asynccontextmanager
async def load(
    client: Client, clients: int = 8, *, tokens: int = 5, stream: bool = False
) -> AsyncIterator[Seen]:
    """Send requests, each client one after another, while the block runs; then wait for the last ones."""
    body = {"max_tokens": tokens, "ignore_eos": True}
    expected = {p: (await client.post("/v1/completions", {**body, "prompt": p})).text for p in PROMPTS}
    seen, stop = Seen(), asyncio.Event()

    async def one(number: int) -> None:
        while not stop.is_set():
            number += 1
            prompt = PROMPTS[number % len(PROMPTS)]
            try:
                answer = await client.post("/v1/completions", {**body, "prompt": prompt, "stream": stream})
            except (aiohttp.ClientError, TimeoutError) as error:
                seen.errors[type(error).__name__] += 1
                continue
            seen.answers.append(answer)
            if answer.status != 200:
                seen.errors[f"{answer.status} {answer.body[:200]!r}"] += 1
            elif answer.text != expected[prompt]:
                seen.wrong.append(answer.text)

    tasks = [asyncio.ensure_future(one(number)) for number in range(clients)]
    try:
        yield seen
    finally:
        stop.set()
        await asyncio.gather(*tasks)
