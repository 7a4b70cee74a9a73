"""The loop of a replica: when it sends, what it makes of what comes, and what it says of the others."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.support.channels import Meeting
from tests.support.replicas import Scheduler, running
from tests.support.waiting import until
from vllm_pd_scheduler.replicas import FleetKey, Ignored
from vllm_pd_scheduler.replicas.message import Message
from vllm_pd_scheduler.replicas.others import SILENT_S
from vllm_pd_scheduler.sync.greeting import MAGIC, Greeting
from vllm_pd_scheduler.sync.sync import ASK
from vllm_pd_scheduler.telemetry.pace import MAX_KEYS


@pytest.fixture
def meeting() -> Meeting:
    return Meeting()


async def said_all(one: Scheduler) -> int:
    """Wait until one sends no more of what they say to each other on meeting; return how much that was.

    A machine that is busy may run the loop seldom: it has so many turns, however long these take.
    """
    sent, turns = -1, 0
    while turns < 20:
        await asyncio.sleep(0.005)
        turns = turns + 1 if len(one.channel.sent) == sent else 0
        sent = len(one.channel.sent)
    return sent


async def test_a_request_is_told_by_the_journal_and_its_end_too(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        reservation = one.reserve()
        await until(lambda: two.in_flight() == 1)
        assert two.news > 0
        one.now += 0.02
        reservation.release(one.now)
        await until(lambda: two.in_flight() == 0)


async def test_nothing_is_sent_while_nothing_happens(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        await until(lambda: one.sync.others and two.sync.others)
        before = await said_all(one)
        await asyncio.sleep(0.1)
        assert len(one.channel.sent) == before


async def test_what_others_do_is_not_told_again(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        await until(lambda: one.sync.others and two.sync.others)
        before = await said_all(two)
        one.reserve()
        await until(lambda: two.in_flight() == 1)
        await asyncio.sleep(0.05)
        assert len(two.channel.sent) == before


async def test_one_that_comes_hears_what_there_is(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one):
        one.reserve()
        async with running(two):
            await until(lambda: two.in_flight() == 1)


async def test_while_the_server_is_away_all_goes_on_and_is_told_when_it_is_back(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        one.channel.lose("it is gone")
        one.reserve()
        one.now += 2.5
        await asyncio.sleep(0.05)
        assert two.in_flight() == 0
        assert one.sync.summary() == "no connection to the other replicas for 2 s; this one goes on by itself"
        one.channel.connect()
        await until(lambda: two.in_flight() == 1)
        assert one.sync.summary() == "connected; 1 other replica is heard"
        assert one.channel.traffic.dropped["not connected"] > 0
        lost, back = one.said()[-2:]
        assert lost.startswith("no connection to the other replicas: it is gone; this one goes on")
        assert back == "connected to the other replicas, after 2.5 s"


async def test_one_that_was_away_for_a_moment_asks_what_it_has_missed(meeting: Meeting) -> None:
    """Without a request or a summary of the other one, for which time would have to go on."""
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        await until(lambda: one.sync.others and two.sync.others)
        one.channel.lose("it is gone")
        two.reserve()
        await asyncio.sleep(0.05)
        assert one.in_flight() == 0
        one.channel.connect()
        await until(lambda: one.in_flight() == 1)


async def test_a_loss_is_said_once_however_often_it_comes(meeting: Meeting) -> None:
    one = Scheduler(meeting)
    async with running(one):
        for _ in range(20):
            one.channel.lose("it is gone")
            one.channel.connect()
        assert sum("it is gone" in each for each in one.said()) == 1
        assert sum("connected to" in each for each in one.said()) == 2


async def test_a_replica_that_is_silent_is_forgotten_and_that_is_said(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting, "b")
    async with running(one, two):
        two.reserve()
        await until(lambda: one.in_flight() == 1)
        two.channel.lose()
        one.now += 3.0
        one.reserve("d1")  # wakes it; else the summary does, within a second
        await until(lambda: one.in_flight() == 0)
        assert "replica b on " in one.said()[-1]
        assert one.said()[-1].endswith("is silent: its requests count no more")


async def test_garbage_is_counted_and_ends_nothing(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        greetings = MAGIC, MAGIC + b"\xc1", MAGIC + b"\x91\x01"
        for data in (b"", b"x", *greetings, b"PDR" + bytes(40), bytes(2_000_000)):
            two.channel.send(data)
        assert sum(one.sync.replica.ignored.values()) == 7
        assert one.sync.replica.ignored[Ignored.GARBAGE] >= 4
        two.reserve()
        await until(lambda: one.in_flight() == 1)


async def test_another_configuration_is_said_once_by_its_keys_and_counts(
    meeting: Meeting,
) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting, strategy="round_robin", admin_port=1, max_waiting=4)
    async with running(one, two):
        two.reserve()
        await until(lambda: one.in_flight() == 1)
        two.sync._greet()
        found = [each for each in one.said() if "configured" in each]
        assert len(found) == 1
        assert "in another way: max_waiting, strategy;" in found[0]
        assert one.sync.greetings.differing() == [two.sync.replica.name]


async def test_all_hash_prompts_alike_and_another_password_is_said(meeting: Meeting) -> None:
    one, two, other = Scheduler(meeting), Scheduler(meeting), Scheduler(meeting, secret="another")
    keys = [each.router._core.reader.hash_key for each in (one, two, other)]
    assert keys[0] == keys[1] != keys[2]
    async with running(one, two, other):
        found = [each for each in one.said() if "configured" in each]
        assert len(found) == 1
        assert "in another way: replicas.password;" in found[0]
        one.sync.reconfigured(one.router.config)
        assert other.sync.greetings.differing() == [one.sync.replica.name, two.sync.replica.name]


async def test_a_flood_of_questions_is_answered_a_few_times(meeting: Meeting) -> None:
    """Else all would send so much that the others take none of it any more."""
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        await until(lambda: one.sync.others and two.sync.others)
        before = await said_all(one)
        for _ in range(300):
            two.channel.send(ASK + b"x")
            one.sync._publish()
        assert 1 <= len(one.channel.sent) - before <= 70
        assert one.sync.replica.ignored[Ignored.TOO_OFTEN] >= 200
        two.reserve()
        await until(lambda: one.in_flight() == 1)


async def test_a_flood_of_greetings_is_no_flood_of_events(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        for number in range(3000):
            name = "b" if number < 1000 else f"b{number}"
            found = Greeting(f"r{number}", name, "machine", "another", {})
            two.channel.send(MAGIC + msgspec.msgpack.encode(found))
        said = [each for each in one.said() if "runs version another" in each]
        assert sum("replica b on" in each for each in said) == 1
        assert len(said) <= MAX_KEYS
        one.channel.lose("it is gone")
        assert "it is gone" in one.said()[-1]


async def test_a_flood_of_names_is_no_flood_of_events(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    encode = FleetKey("fleet").encode
    async with running(one, two):
        for number in range(20):
            for name in (f"r{number}-{each}" for each in range(50)):
                two.channel.send(encode(Message(name, 1, True, (0, 0), [])))
            assert len(one.sync.others) >= 50
            one.now += SILENT_S
            one.sync._publish()
        said = [each for each in one.said() if "replica r" in each]
        assert 100 <= len(said) <= 200
        assert one.sync.others == frozenset()
        one.now += 10.0
        two.channel.send(encode(Message("another", 1, True, (0, 0), [])))
        assert one.said()[-1] == "replica another is heard"


async def test_a_greeting_cannot_write_lines_of_the_log(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        before = one.sync.replica.ignored[Ignored.GARBAGE]
        for text in ("a\nERROR all is lost", "a\n", "\x1b[31m", "\x9b", "\u2028"):
            for values in ((text, "a", "m"), ("r", text, "m"), ("r", "a", text)):
                two.channel.send(MAGIC + msgspec.msgpack.encode(Greeting(*values, "1", {})))
        assert one.sync.replica.ignored[Ignored.GARBAGE] == before + 15
        assert all(each.isprintable() for each in one.said())


async def test_a_greeting_with_any_keys_is_a_short_line(meeting: Meeting) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)
    async with running(one, two):
        own = one.sync.greetings.own
        settings = dict.fromkeys((f"key{number:0200}" for number in range(200)), 1)
        two.channel.send(MAGIC + msgspec.msgpack.encode(Greeting("r", "b", "m", own.version, settings)))
        (line,) = (each for each in one.said() if "configured in another way" in each)
        assert len(line) < 3000
        assert f" and {len(own.settings.keys() | settings.keys()) - 10} more; " in line


async def test_a_name_that_two_have_is_said(meeting: Meeting) -> None:
    one, two = Scheduler(meeting, "a"), Scheduler(meeting, "a")
    async with running(one, two):
        assert any("has the same replicas.name" in each for each in one.said())


async def test_a_strategy_that_raises_in_a_wake_breaks_nothing(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Scheduler(meeting), Scheduler(meeting)

    def broken() -> None:
        raise RuntimeError("broken")

    one.sync._news = broken
    async with running(one, two):
        two.reserve()
        await until(lambda: one.in_flight() == 1)
        two.now += 1
        two.reserve()
        await until(lambda: one.in_flight() == 2)
    assert sum("cannot be used" in each.message for each in caplog.records) == 1
