"""``python -m vllm_pd_scheduler.advice PARENT``: reads a question and requests, writes the answer.

The question is a line of JSON, and so is each list of requests after it. It gives way to others
that want the CPU, and takes no more memory or time than it may.
"""

from __future__ import annotations

import os
import resource
import sys

import msgspec

from ..records.traffic import Recorded
from ..system.parent_death import die_with_parent
from .question import Question, Requests
from .rehearsal import TooSlow, rehearse

NICE = 10
"""Beside others that want the CPU it gets a tenth of what each of them does: it comes to an end."""
MEMORY_BYTES = 2 << 30
"""Of address space, at most."""
_CPU_FACTOR = 3
"""The kernel ends the process when it has taken so many times the CPU time that it may."""

FAILED = 1
"""Exit status: the reason is on stderr, in a line."""


def main() -> int:
    """Answer one question; return the exit status."""
    die_with_parent(int(sys.argv[1]))
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    question = msgspec.json.decode(sys.stdin.buffer.readline(), type=Question)
    seconds = max(1, int(question.seconds * _CPU_FACTOR))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    decoder = msgspec.json.Decoder(Requests)
    requests: list[Recorded] = [each for line in sys.stdin.buffer for each in decoder.decode(line)]
    try:
        answer = rehearse(question, requests)
    except TooSlow:
        print("a replay of the requests takes too long", file=sys.stderr)
        return FAILED
    except MemoryError:
        print("a replay of the requests takes too much memory", file=sys.stderr)
        return FAILED
    except ValueError as error:
        print(error, file=sys.stderr)
        return FAILED
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
