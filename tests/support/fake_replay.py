"""A fleet that computes nothing: times are a formula of the rate, so every figure is known."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from vllm_pd_scheduler.replay.result import LoadSample, RequestResult, RunResult
from vllm_pd_scheduler.replay.trace import Trace

SPEEDS = {"slow": 2.0, "fast": 1.0, "hopeless": 1000.0, "instant": 0.0, "stuck": 1.0, "dead": 1.0, "odd": 1.0}


@dataclass(frozen=True)
class FleetSpec:
    prefill: int
    decode: int
    setup: str
    seed: int
    realistic: bool = False
    leaves: int = 1
    oversubscription: float = 4.0
    foreign: float = 0.0

    def __post_init__(self) -> None:
        if self.setup != "llama-3.3-70b-4xh100":
            raise ValueError(f"unknown set-up {self.setup!r}")


@dataclass(frozen=True)
class Variant:
    label: str


def parse_variant(text: str) -> Variant:
    if text.partition("+")[0] not in SPEEDS:
        raise ValueError(f"unknown strategy {text!r}; choose from {', '.join(SPEEDS)}")
    return Variant(text)


def run_variant(
    variant: Variant,
    trace: Trace,
    fleet: FleetSpec,
    progress: Callable[[int], None],
    stop_when: Callable[[RequestResult], bool] | None = None,
) -> RunResult:
    """The first token takes SPEEDS times requests a second; `slow` refuses every fifth request."""
    name = variant.label.partition("+")[0]
    if name == "stuck":
        signal.pause()  # until somebody ends this process
    if name == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "odd":
        raise ValueError("a prompt is longer than the engines' memory")
    ttft = SPEEDS[name] * len(trace.requests) / (trace.seconds or 1.0)
    results, samples = [], []
    for index, each in enumerate(trace.requests):
        p, d = f"p{index % fleet.prefill}", f"d{index % fleet.decode}"
        if name == "slow" and index % 5 == 4:
            results.append(
                RequestResult(each.arrival, each.prompt_tokens, each.output_tokens, reason="queue_full")
            )
            continue
        finished = each.arrival + ttft + 0.02 * (each.output_tokens - 1)
        tpot = 0.02 if each.output_tokens > 1 else None
        results.append(
            RequestResult(each.arrival, each.prompt_tokens, each.output_tokens, 0, ttft, tpot, p, d, finished)
        )
        samples += [
            LoadSample(each.arrival, p, 1, index % 7, 0.5),
            LoadSample(each.arrival, d, index % 11, 0, 0.5),
        ]
        progress(index)
    busy_p = {f"p{index}": 0.5 for index in range(fleet.prefill)}
    return RunResult(
        variant.label, results, busy_p, {f"d{i}": 0.25 for i in range(fleet.decode)}, samples, 0.01
    )
