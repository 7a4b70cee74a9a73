"""The ring of events: bounded, numbered, and each a log line."""

import logging

import pytest

from vllm_pd_scheduler.models import By
from vllm_pd_scheduler.records.events import MAX_EVENTS, EventKind, Events


def filled(count: int) -> Events:
    events = Events(lambda: 0.0)
    for number in range(1, count + 1):
        events.add(EventKind.STATE, f"event {number}", by=By.PROBE)
    return events


def numbers(events: Events, after: int = 0) -> list[int]:
    return [event.number for event in events.after(after)]


def test_as_json() -> None:
    events = Events(lambda: 1764321776.25)
    events.add(EventKind.STATE, "d0 is unhealthy", by=By.PROBE, subject="d0", level=logging.WARNING)
    assert [event.as_json() for event in events.after(0)] == [
        {
            "number": 1,
            "time": "2025-11-28T09:22:56.250+00:00",
            "kind": "state",
            "level": "WARNING",
            "subject": "d0",
            "text": "d0 is unhealthy",
            "by": "probe",
        }
    ]


def test_those_after_a_number() -> None:
    events = filled(3)
    assert numbers(events) == [1, 2, 3]
    assert numbers(events, 2) == [3]
    assert numbers(events, 3) == []


def test_a_number_from_before_a_restart() -> None:
    assert numbers(filled(3), 57) == [1, 2, 3]


def test_no_more_than_so_many_are_remembered() -> None:
    events = filled(MAX_EVENTS + 5)
    assert numbers(events) == list(range(6, MAX_EVENTS + 6))
    assert numbers(events, 2) == numbers(events)
    assert numbers(events, MAX_EVENTS + 3) == [MAX_EVENTS + 4, MAX_EVENTS + 5]


def test_each_is_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_pd_scheduler")
    events = Events(lambda: 0.0)
    events.add(EventKind.STATE, "d0 is at 100%", by=By.PROBE, level=logging.WARNING)
    events.add(EventKind.STRATEGY, "strategy is slo", by=f"{By.ADMIN} 192.0.2.1")
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("WARNING", "d0 is at 100%"),
        ("INFO", "strategy is slo (by admin 192.0.2.1)"),
    ]


def test_listeners() -> None:
    events, heard = Events(lambda: 0.0), []
    end = events.subscribe(lambda: heard.append(len(events.after(0))))
    events.add(EventKind.STARTED, "serving", by=By.START)
    end()
    events.add(EventKind.DRAINING, "draining", by=By.SIGNAL)
    assert heard == [1]
