"""A load that shifts from long prompts to long answers: the advice follows it, and so can the fleet."""

from benchmarks.shifting_load import Phase, Plan, Turning, shifting

from vllm_pd_scheduler.advice.verdict import Kind
from vllm_pd_scheduler.replay.fleet import FleetSpec

PHASES = (Phase(150.0, 2.5, 9_000.0, 50.0), Phase(150.0, 8.0, 400.0, 1_500.0))


def test_the_advice_turns_with_the_load() -> None:
    plan = Plan(follow=True, every=75.0, window=75.0)
    run = Turning(shifting(PHASES), FleetSpec(2, 3), plan)
    results = run.results()
    assert len(results) > 1000
    assert all(each.reason is None for each in results)
    prompts, answers = (
        [each for each in plan.asked if (each.at <= 150.0) is first] for first in (True, False)
    )
    first = prompts[0].advice
    assert first is not None
    assert first.text.startswith("move one D to P")
    assert answers[0].fleet[0] > 2, "it was followed"
    moves = [each.advice for each in answers if each.advice is not None and each.advice.kind is Kind.MOVE]
    assert moves
    assert all(each.text.startswith("move one P to D") for each in moves)
