"""A load that shifts from long prompts to long answers: with the advice followed, by itself, and without.

Run it with ``python -m benchmarks.shifting_load``. It replays in virtual time, as ``replay`` does.
Each minute it asks for the advice, by what the scheduler has learned until then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from vllm_pd_scheduler.advice.observation import LEAST_REQUESTS, Observation, lead_seconds, learned, sizes
from vllm_pd_scheduler.advice.question import Question
from vllm_pd_scheduler.advice.rehearsal import TooSlow, rehearse
from vllm_pd_scheduler.advice.turns import Turns
from vllm_pd_scheduler.advice.verdict import Advice, judge
from vllm_pd_scheduler.config.turning import TurningConfig
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import PD_ROLES, InstanceRole, PDInstance
from vllm_pd_scheduler.records.traffic import MAX_AGE_S, Recorded
from vllm_pd_scheduler.replay.fleet import FleetSpec, _Run
from vllm_pd_scheduler.replay.result import RequestResult, Spread
from vllm_pd_scheduler.replay.schedulers import OneScheduler
from vllm_pd_scheduler.replay.trace import Trace, TraceRequest
from vllm_pd_scheduler.replay.variant import parse_variant

STRATEGY = "predicted_latency"
HANDED_OVER_S = 2.0
"""Seconds after which what a drained P has handed over was fetched."""


@dataclass(frozen=True)
class Phase:
    """A part of the load: so many seconds, requests a second, and mean tokens of prompts and answers."""

    seconds: float
    per_second: float
    prompt: float
    answer: float


PROMPTS, ANSWERS = Phase(900.0, 2.0, 18_000.0, 200.0), Phase(900.0, 4.0, 800.0, 4_000.0)
LOADS = {
    "a shift": (PROMPTS, ANSWERS),
    "a burst": (PROMPTS, replace(ANSWERS, seconds=240.0), PROMPTS),
}


def shifting(phases: Iterable[Phase], seed: int = 0) -> Trace:
    """Return requests at random times, of random lengths; no two share a prefix."""
    chance, now, begin = Random(seed), 0.0, 0.0
    requests = list[TraceRequest]()
    for phase in phases:
        now = begin
        begin += phase.seconds
        while (now := now + chance.expovariate(phase.per_second)) < begin:
            prompt = 16 + int(chance.gammavariate(2.0, phase.prompt / 2))
            answer = 1 + int(chance.gammavariate(2.0, phase.answer / 2))
            requests.append(TraceRequest(now, prompt, answer))
    return Trace(requests)


@dataclass
class Asked:
    """What was advised, and when."""

    at: float
    fleet: tuple[int, int]
    advice: Advice | None


@dataclass
class Plan:
    """When the advice is asked for, of which time, and whether it is followed: each, or within limits."""

    follow: bool
    limits: TurningConfig | None = None
    every: float = 60.0
    window: float = 180.0
    cpu_seconds: float = 60.0
    asked: list[Asked] = field(default_factory=list)
    name: str = ""


class Turning(_Run):
    """A replay in which an instance may change its role: it drains, and comes back with the other one."""

    def __init__(self, trace: Trace, fleet: FleetSpec, plan: Plan) -> None:
        super().__init__(parse_variant(STRATEGY), trace, fleet, lambda _: None, None)
        self._plan, self._fleet = plan, fleet
        self._turned = 0
        self._turns = Turns()
        self._clock.call_at(plan.window, self._ask)

    def results(self) -> list[RequestResult]:
        """Run to the end, and return what became of each request."""
        return self.run().results

    @property
    def _one(self) -> OneScheduler:
        return self._schedulers[0]

    def _ask(self) -> None:
        if self._done or self._clock.now > self._trace.seconds:
            return
        fleet = tuple(len(self._one.registry.routable(role)) for role in PD_ROLES)
        advice = self._advised() if sum(fleet) == self._fleet.prefill + self._fleet.decode else None
        self._plan.asked.append(Asked(self._clock.now, (fleet[0], fleet[1]), advice))
        if self._plan.follow and advice is not None and (role := self._asked_for(advice)) is not None:
            self._turn(role, next(each for each in PD_ROLES if each is not role))
        self._clock.call_at(self._clock.now + self._plan.every, self._ask)

    def _asked_for(self, advice: Advice) -> InstanceRole | None:
        limits, now = self._plan.limits, self._clock.now
        if limits is None:
            return advice.from_role
        role = self._turns.looked(advice, limits, now)
        if role is not None:
            self._turns.turned(role, now, limits.pause)
        return role

    def _advised(self) -> Advice | None:
        now, plan = self._clock.now, self._plan
        came = [
            Recorded(each.arrival, each.prompt_tokens, True, output_tokens=each.output_tokens)
            for each in self._trace.requests
            if each.arrival < now
        ]
        requests = [each for each in came if each.arrived >= now - plan.window]
        if len(requests) < LEAST_REQUESTS:
            return None
        settings = self._config.model_dump(mode="json", include={"queue_timeout", "ttft_slo", "tpot_slo"})
        settings |= {f"{role}_strategy": STRATEGY for role in PD_ROLES}
        registry = self._one.registry
        prompt = sum(each.prompt_tokens for each in requests) / len(requests)
        answer = sum(each.output_tokens for each in requests) / len(requests)
        since = requests[0].arrived - min(MAX_AGE_S - plan.window, lead_seconds(registry, answer))
        replayed = [each for each in came if each.arrived >= since]
        question = Question(
            sizes(registry)[:3],
            learned(registry),
            1.0,
            0.0,
            settings,
            plan.cpu_seconds,
            requests[0].arrived,
        )
        seen = Observation(question, None, replayed, requests, plan.window, prompt, answer, None, None)
        try:
            return judge(seen, rehearse(question, replayed))
        except TooSlow:
            return None

    def _turn(self, role: InstanceRole, other: InstanceRole) -> None:
        registry = self._one.registry
        leaves = min(registry.routable(role), key=lambda each: each.in_flight)
        registry.drain(leaves.id)
        self._wait_for(leaves, other)

    def _wait_for(self, leaves: Endpoint, role: InstanceRole) -> None:
        then = partial(self._wait_for, leaves, role)
        if leaves.drained:
            then = partial(self._come_back, leaves, role)
        self._clock.call_at(self._clock.now + HANDED_OVER_S, then)

    def _come_back(self, leaves: Endpoint, role: InstanceRole) -> None:
        registry = self._one.registry
        registry.remove(leaves.id)
        self._turned += 1
        described = PDInstance(f"{role}-turned-{self._turned}", role, f"10.1.0.{self._turned}", 8000)
        profile = self._fleet.profile(self._trace.block_tokens, role)
        self._instances.register(described, self._turned, profile)
        self._scrape(self._one, registry.get(described.instance_id))
        self._dispatch(self._one)

    def _scrape(self, one: OneScheduler, endpoint: Endpoint) -> None:
        if endpoint in one.registry:
            super()._scrape(one, endpoint)


def compare(phases: tuple[Phase, ...], fleet: FleetSpec) -> tuple[list[RequestResult], ...]:
    """Return the results of each plan; print what was advised."""
    found = []
    for plan in plans():
        found.append(Turning(shifting(phases), fleet, plan).results())
        print(f"\n{plan.name}:")
        for each in plan.asked:
            said = (
                "not asked: one is being turned, or too little was seen"
                if each.advice is None
                else each.advice.text
            )
            print(f"  {each.at:6.0f} s  {each.fleet[0]} P + {each.fleet[1]} D  {said}")
            sys.stdout.flush()
    return tuple(found)


def plans() -> tuple[Plan, ...]:
    """Return what is compared."""
    eager = TurningConfig(gain=1.0, pause=60.0)
    return (
        Plan(follow=False, name="4 P + 4 D"),
        Plan(follow=True, name="each advice followed"),
        Plan(follow=True, limits=TurningConfig(), name="by itself, with the defaults"),
        Plan(follow=True, limits=eager, name="by itself, for less and after 60 s"),
    )


def show(name: str, results: list[RequestResult]) -> None:
    """Print the times of some requests."""
    ttft = Spread.of(each.ttft for each in results if each.ttft is not None)
    tpot = Spread.of(each.tpot for each in results if each.tpot is not None)
    refused = sum(each.reason is not None for each in results)
    assert ttft is not None
    assert tpot is not None
    times = f"TTFT mean {ttft.mean:.2f}, p90 {ttft.p90:.2f}, p99 {ttft.p99:.2f} s"
    per_token = f"TPOT mean {1000 * tpot.mean:.1f}, p90 {1000 * tpot.p90:.1f} ms"
    print(f"{name:<50} {len(results):>5} requests, {refused} refused; {times}; {per_token}")


def main() -> None:
    """Print the comparison, for each part of each load."""
    for load, phases in LOADS.items():
        print(f"\n{load}")
        found, begin = compare(phases, FleetSpec(4, 4)), 0.0
        for number, phase in enumerate(phases, 1):
            end = begin + phase.seconds
            for plan, results in zip(plans(), found, strict=True):
                show(f"{plan.name}, part {number}", [each for each in results if begin <= each.arrival < end])
            begin = end


if __name__ == "__main__":
    main()
