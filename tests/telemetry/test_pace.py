"""When a line may be logged again."""

from vllm_pd_scheduler.telemetry.pace import LOG_INTERVAL_S, MAX_KEYS, Pace


def test_once_a_minute_for_each_key_and_no_more_keys_than_that() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    assert [pace.due("a"), pace.due("b"), pace.due("a")] == [True, True, False]
    flood = [pace.due(n) for n in range(3 * MAX_KEYS)]
    assert sum(flood) == MAX_KEYS - 2
    assert len(pace._next_at) == MAX_KEYS
    now = LOG_INTERVAL_S
    assert pace.due("new"), "what was told long ago makes room"
    assert pace.due("a")
    assert len(pace._next_at) == 2
