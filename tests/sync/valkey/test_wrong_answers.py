"""What is said where there is no server, or none that can be used."""

from __future__ import annotations

import pytest

from tests.support.fake_valkey import USABLE, fake, hello
from tests.support.valkey import Server, needs_server
from tests.support.valkey_replicas import Replica
from tests.support.waiting import until
from vllm_pd_scheduler.sync import connection

pytestmark = [needs_server, pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (hello("6.0.16"), "it is version 6.0.16, too old: Redis 6.2 or Valkey 7.2 is needed"),
        (hello("nonsense"), "it is version nonsense, too old"),
        (b"-ERR unknown command `HELLO`\r\n", "it is too old: Redis 6.2 or Valkey 7.2 is needed"),
        (hello("7.2.4", "replica"), "it is a copy that can only be read"),
        (b"-DENIED protected mode\r\n", "it says: DENIED protected mode"),
        (b"-DENIED \x1b[2J\x07\r\n", "it says: DENIED ?[2J?"),
        (b"-LOADING the dataset\r\n", "it says: LOADING the dataset"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers there is no Valkey or Redis server"),
        (b":1\r\n", "what answers there is no Valkey or Redis server"),
        (b"*1\r\n" * 20_000, "what answers there is no Valkey or Redis server"),
        (b"$-5\r\n", "what answers there is no Valkey or Redis server"),
        (b"%1\r\n*0\r\n:1\r\n", "what answers there is no Valkey or Redis server"),
        (b"*4294967295\r\n", "what answers there is no Valkey or Redis server"),
        (b"+OK\r\n+OK\r\n+OK\r\n", ""),
        (b"", "has not answered"),
        (b"$900000000\r\n" + bytes(9 << 20), "an answer is longer than"),
    ],
)
async def test_what_is_wrong_there_is_said(answer: bytes, problem: str) -> None:
    async with fake({b"HELLO": answer}) as url, Replica(url).running() as one:
        await until(lambda: one.heard.problems and problem in one.heard.problems[0])
        assert one.channel.problem


async def test_one_that_sends_messages_and_answers_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.01)
    monkeypatch.setattr(connection, "_SILENT_TICKS", 100_000)  # it is not for that
    push = b">3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$2\r\nhi\r\n"
    answers = {**USABLE, b"EVAL": b"$0\r\n\r\n" + 3 * push, b"XTRIM": b""}
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: "sends messages, but has answered nothing" in "".join(one.heard.problems))
        assert one.heard.messages


async def test_a_loss_without_a_reason_is_said_in_words() -> None:
    lost: list[str] = []
    connection.Connection(lambda _: None, lost.append).connection_lost(ConnectionResetError())
    assert lost == ["the server has closed the connection"]


async def test_a_server_that_answers_garbage_later_is_left(server: Server) -> None:
    answers = {
        b"HELLO": hello("7.2.4"),
        b"SUBSCRIBE": b">3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n",
        b"PUBLISH": b":1\r\n",
        b"EVAL": b"$0\r\n\r\n",
        b"PING": b">2\r\n:1\r\n:2\r\n>0\r\n>3\r\n$7\r\nmessage\r\n:1\r\n:2\r\n+PONG\r\n!garbage\r\n",
    }
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: "" in one.heard.problems and one.heard.problems[-1])
        assert one.heard.messages == []


@pytest.mark.parametrize(
    "entries",
    [b":1\r\n", b"$1\r\nx\r\n", b"*1\r\n:1\r\n", b"*1\r\n*2\r\n:1\r\n:2\r\n", b"*1\r\n*1\r\n:1\r\n",
     b"*1\r\n*2\r\n:1\r\n*2\r\n*0\r\n:1\r\n", b"_\r\n"],
)  # fmt: skip
async def test_a_log_that_is_none_is_said(entries: bytes) -> None:
    answers = {**USABLE, b"local trim": b":5\r\n", b"XREVRANGE\r\n$": entries}
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: one.heard.problems)
        assert "the log there is none of ours" in one.channel.problem


async def test_something_else_in_the_place_of_the_log_is_said(server: Server) -> None:
    async with Replica(server.url).running() as one:
        await one.connected()
        server.ask("SET", "{vllm-pd}:changes", "x")
        await one.says("delete the key {KEY}:changes")
        server.ask("DEL", "{vllm-pd}:changes")
        await one.connected()


async def test_a_name_that_is_not_found_is_said() -> None:
    async with Replica("valkey://nowhere.invalid").running() as one:
        await until(lambda: one.heard.problems)
        assert "nowhere.invalid:6379: " in one.channel.problem
