"""The back end on a real Valkey or Redis server: what it carries, and every way in which the server fails."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest

from tests.support.valkey import Server, needs_server
from tests.support.valkey_replicas import Replica, replicas
from tests.support.waiting import until
from vllm_pd_scheduler.sync import connection, valkey_log
from vllm_pd_scheduler.sync.channel import START, Change, NotKept, Overtaken

pytestmark = [needs_server, pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")]


async def test_a_message_reaches_all_others_and_does_not_come_back(server: Server) -> None:
    async with replicas(3, server.url) as (one, two, three):
        sent = [bytes([n]) * n for n in range(1, 100)]
        assert all(one.channel.send(data) for data in sent)
        await until(lambda: two.heard.messages == sent and three.heard.messages == sent)
        assert one.heard.messages == []
        assert one.channel.traffic.sent == two.channel.traffic.received == 99
        assert one.channel.traffic.sent_bytes == two.channel.traffic.received_bytes


async def test_fleets_with_other_keys_or_databases_hear_nothing_of_each_other(server: Server) -> None:
    ours = {"url": server.url}, {"url": server.url}
    others = {"url": server.url, "key": "other"}, {"url": f"{server.url}/1"}
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Replica(**each).running()) for each in (*ours, *others)]
        for each in made:
            await each.connected()
        one, two, *rest = made
        one.channel.send(b"hello")
        await one.channel.append(b"change", START)
        await until(lambda: two.heard.messages and two.heard.changes[-1].data == b"change")
        assert all(each.heard.messages == [] and each.heard.changes == [Change(START, b"")] for each in rest)


async def test_the_log_is_in_one_order_for_all_and_compares(server: Server) -> None:
    async with replicas(3, server.url) as all_three:
        one, two, _ = all_three
        first = await one.channel.append(b"1", START)
        await until(lambda: all(each.heard.changes[-1].data == b"1" for each in all_three))
        with pytest.raises(Overtaken):
            await two.channel.append(b"no", START)
        second = await two.channel.append(b"2", first)
        assert two.heard.changes[-1] == Change(second, b"2")  # before `append` has returned
        await until(lambda: all(each.heard.changes[-1].data == b"2" for each in all_three))
        assert all([each.data for each in r.heard.changes] == [b"", b"1", b"2"] for r in all_three)


async def test_of_many_appends_at_once_each_is_kept_once(server: Server) -> None:
    async with replicas(3, server.url) as all_three:

        async def put(replica: Replica, data: bytes) -> None:
            while True:
                try:
                    await replica.channel.append(data, replica.heard.changes[-1].position)
                    return
                except Overtaken:
                    pass

        wanted = [b"%d" % n for n in range(30)]
        await asyncio.gather(*(put(all_three[n % 3], data) for n, data in enumerate(wanted)))
        await until(lambda: all(len(each.heard.changes) == 31 for each in all_three))
        assert all_three[0].heard.changes == all_three[1].heard.changes == all_three[2].heard.changes
        assert sorted(each.data for each in all_three[0].heard.changes[1:]) == sorted(wanted)


async def test_the_log_does_not_grow_and_one_that_comes_reads_the_newest(server: Server) -> None:
    async with replicas(1, server.url) as (one,):
        position = START
        for n in range(100):
            position = await one.channel.append(b"%d" % n, position)
        assert server.ask("XLEN", "{vllm-pd}:changes") == f":{valkey_log.KEPT}\r\n"
        async with replicas(1, server.url) as (late,):
            assert late.heard.changes == [Change(position, b"99")]


async def test_a_change_too_long_is_refused(server: Server) -> None:
    async with replicas(1, server.url) as (one,):
        with pytest.raises(NotKept, match="longer than"):
            await one.channel.append(bytes(2 << 20), START)


async def test_killed_and_started_again_empty_it_is_found_again(server: Server) -> None:
    async with replicas(2, server.url) as (one, two):
        await one.channel.append(b"1", START)
        server.kill()
        await one.says("onnection refused")
        assert not one.channel.send(b"lost")
        assert one.channel.traffic.dropped["not connected"] == 1
        with pytest.raises(NotKept, match="onnection refused"):
            await one.channel.append(b"2", one.heard.changes[-1].position)
        server.start()
        await asyncio.gather(one.connected(), two.connected())
        assert one.heard.changes[-1] == Change(START, b"")  # so that it is put back
        one.channel.send(b"hello")
        await until(lambda: two.heard.messages == [b"hello"])


async def test_one_that_stands_still_is_noticed_and_never_waited_for(server: Server) -> None:
    async with replicas(2, server.url) as (one, two):
        server.signal(signal.SIGSTOP)
        await one.says("has not answered for 0.9 s")
        assert not one.channel.send(b"lost")
        server.signal(signal.SIGCONT)
        await asyncio.gather(one.connected(), two.connected())
        one.channel.send(b"hello")
        await until(lambda: b"hello" in two.heard.messages)


async def test_a_change_while_it_stands_still_is_refused_and_may_be_made_later(
    server: Server,
) -> None:
    async with replicas(1, server.url) as (one,):
        server.signal(signal.SIGSTOP)
        with pytest.raises(NotKept, match=r"has not answered.*nobody knows whether"):
            await one.channel.append(b"1", START)
        server.signal(signal.SIGCONT)
        await one.connected()
        # What the server has read when it goes on is in the log, and then comes as any other.
        await until(lambda: one.heard.changes[-1].data == b"1")


async def test_what_waits_to_be_sent_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SILENT_TICKS", 10_000)
    async with replicas(1, server.url) as (one,):
        server.signal(signal.SIGSTOP)
        message = bytes(100_000)
        await until(lambda: not one.channel.send(message))  # the kernel takes some, too
        assert one.channel.traffic.dropped["too slow"] == 1
        assert one.channel._connection._transport.get_write_buffer_size() <= connection.MAX_UNSENT
        server.signal(signal.SIGCONT)


async def test_emptied_while_connected_that_is_said(server: Server) -> None:
    async with replicas(1, server.url) as (one,):
        await one.channel.append(b"1", START)
        server.ask("FLUSHALL")
        await until(lambda: one.heard.changes[-1] == Change(START, b""))
        await one.channel.append(b"1", START)


async def test_a_word_of_a_change_that_is_lost_delays_it_only(server: Server) -> None:
    async with replicas(1, server.url) as (one,):
        server.ask("XADD", "{vllm-pd}:changes", "*", "change", "by hand")
        await until(lambda: one.heard.changes[-1].data == b"by hand")


async def test_the_first_changes_of_a_log_come_one_by_one(server: Server) -> None:
    """Two that come into an empty log before it is looked at are two changes."""
    async with replicas(1, server.url) as (one,):
        script = "for n = 1, 2 do redis.call('XADD', KEYS[1], '*', 'change', n) end"
        server.ask("EVAL", script, "1", "{vllm-pd}:changes")
        await until(lambda: one.heard.changes[-1].data == b"2")
        assert [each.data for each in one.heard.changes] == [b"", b"1", b"2"]


async def test_changes_that_were_missed_come_in_order(server: Server) -> None:
    async with replicas(2, server.url) as (one, two):
        position = await one.channel.append(b"0", START)
        await until(lambda: two.heard.changes[-1].data == b"0")
        two.channel._connection.close("as if the network had failed")
        for n in (b"1", b"2"):
            position = await one.channel.append(n, position)
        await until(lambda: [each.data for each in two.heard.changes[1:]] == [b"0", b"1", b"2"])


async def test_much_that_comes_at_once_is_taken_in_turns(server: Server) -> None:
    async with replicas(2, server.url) as (one, two):
        turns: list[int] = []

        async def others() -> None:
            while True:
                turns.append(len(two.heard.messages))
                await asyncio.sleep(0)

        running_beside = asyncio.ensure_future(others())
        for n in range(1000):
            one.channel.send(b"%d" % n)
        await until(lambda: len(two.heard.messages) == 1000)
        running_beside.cancel()
        assert two.heard.messages == [b"%d" % n for n in range(1000)]
        steps = [after - before for before, after in pairwise(turns)]
        assert max(steps) <= 2 * connection.TURN  # the end of one turn, and the next one
