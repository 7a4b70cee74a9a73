"""Writes synthetic traces for ``replay``: an hour each of loads that differ in lengths and in what is shared.

    python docs/figures/make_traces.py FOLDER

Lengths are lognormal, arrivals come in bursts (gamma). ``questions`` and ``code`` have about the mean lengths
of the two services in the Azure LLM inference trace 2023; the others have no model.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

BLOCK = 512
"""Tokens that one id of ``hash_ids`` stands for."""
HOUR_S = 3600.0


@dataclass(frozen=True)
class Request:
    """One line: seconds, tokens in, tokens out, and the ids of the prompt's blocks."""

    time: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


@dataclass
class Draw:
    """All that is random, repeatable by seed."""

    seed: int
    random: Random = field(init=False)
    _ids: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def length(self, mean: float, sigma: float, most: int = 100_000) -> int:
        """Tokens, at least one; ``sigma`` is the standard deviation of the logarithm."""
        drawn = self.random.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
        return max(1, min(most, int(drawn)))

    def arrivals(self, count: int, variation: float) -> Iterator[float]:
        """Times of an hour; ``variation`` is that of the gaps, 1 for a Poisson process."""
        shape, now = variation**-2, 0.0
        for _ in range(count):
            now += self.random.gammavariate(shape, HOUR_S / count / shape)
            yield now

    def longer(self, blocks: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """A prompt of so many tokens that begins with ``blocks``."""
        return blocks + tuple(itertools.islice(self._ids, max(0, tokens // BLOCK - len(blocks))))


def agents(draw: Draw) -> Iterator[Request]:
    """60 sets of tools, some far more used than others; a third of the requests continue a recent one."""
    tools = [draw.longer((), BLOCK * draw.random.randint(4, 24)) for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(len(tools))]
    recent: list[tuple[tuple[int, ...], int]] = []
    for time in draw.arrivals(12_000, 1.5):
        begin = draw.random.choices(tools, weights)[0]
        blocks, prompt = begin, len(begin) * BLOCK
        if recent and draw.random.random() < 1 / 3:
            blocks, prompt = draw.random.choice(recent)
        prompt = min(60_000, prompt + draw.length(2600, 1.0))
        blocks = draw.longer(blocks, prompt)
        recent = [*recent[-199:], (blocks, prompt)]
        yield Request(time, prompt, draw.length(180, 0.9), blocks)


def conversations(draw: Draw) -> Iterator[Request]:
    """Chats of up to 13 turns, each with all before it in its prompt, and one system prompt for all."""
    system = draw.longer((), 3 * BLOCK)
    for begin in draw.arrivals(2250, 1.0):
        time, blocks, prompt = begin, system, len(system) * BLOCK
        for _ in range(draw.random.choice((1, 2, 3, 5, 8, 13))):
            prompt += draw.length(700, 1.0)
            blocks, output = draw.longer(blocks, prompt), draw.length(300, 0.8)
            yield Request(time, prompt, output, blocks)
            prompt += output
            time += 0.03 * output + draw.random.expovariate(1 / 25)


def documents(draw: Draw) -> Iterator[Request]:
    """Long documents, with up to six questions on each within minutes."""
    for begin in draw.arrivals(2150, 1.0):
        time, size = begin, draw.length(25_000, 0.8)
        blocks = draw.longer((), size)
        for _ in range(draw.random.choice((1, 1, 2, 4, 6))):
            prompt = size + draw.length(120, 0.7)
            yield Request(time, prompt, draw.length(250, 0.8), draw.longer(blocks, prompt))
            time += draw.random.expovariate(1 / 40)


def questions(draw: Draw) -> Iterator[Request]:
    """Prompts of a thousand tokens, nothing shared."""
    for time in draw.arrivals(19_000, 1.3):
        yield Request(time, draw.length(1155, 0.9, 14_000), draw.length(211, 0.8, 1500))


def code(draw: Draw) -> Iterator[Request]:
    """Prompts of two thousand tokens and very short answers, in bursts, nothing shared."""
    for time in draw.arrivals(9000, 2.0):
        yield Request(time, draw.length(2048, 1.0, 14_000), draw.length(28, 0.9, 1500))


LOADS: tuple[Callable[[Draw], Iterator[Request]], ...] = (agents, conversations, documents, questions, code)


def main() -> None:
    """Write one file for each load."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for load in LOADS:
        with (given.folder / f"{load.__name__}.jsonl").open("w") as file:
            for request in sorted(load(Draw(given.seed)), key=lambda one: one.time):
                line = {
                    "timestamp": int(1000 * request.time),
                    "input_length": request.prompt,
                    "output_length": request.output,
                    "hash_ids": request.blocks,
                }
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
