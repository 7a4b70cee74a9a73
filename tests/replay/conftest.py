"""The fake fleet in the real one's place, and a trace."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support import fake_replay as fake
from vllm_pd_scheduler.replay.job import Conditions, Job, Outcome
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest


@pytest.fixture
def fake_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fleet", "variant"):
        monkeypatch.setitem(sys.modules, f"vllm_pd_scheduler.replay.{module}", fake)


@pytest.fixture
def trace() -> Trace:
    """A request a second, for ten seconds; the last has an answer of one token."""
    return Trace([TraceRequest(float(at), 100 * (at + 1), 11 if at < 10 else 1) for at in range(11)])


@pytest.fixture
def trace_file(tmp_path: Path, trace: Trace) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": each.arrival * 1000,
                    "input_length": each.prompt_tokens,
                    "output_length": each.output_tokens,
                }
            )
            + "\n"
            for each in trace.requests
        )
    )
    return path


@pytest.fixture
def job(trace: Trace) -> Callable[[bool], Job]:
    def made(search: bool = False) -> Job:
        fleet = fake.FleetSpec(3, 2, "llama-3.3-70b-4xh100", 7)
        conditions = Conditions("trace.jsonl", len(trace.requests), trace.seconds, fleet, 1.0, 5.0, 0.05)
        return Job(trace, conditions, search, fake.run_variant)

    return made


@pytest.fixture
def outcomes(job: Callable[[bool], Job]) -> Callable[..., Sequence[Outcome]]:
    def run(*names: str, search: bool = False) -> Sequence[Outcome]:
        return [job(search).run(fake.Variant(name), lambda rate, finished: None) for name in names]

    return run
