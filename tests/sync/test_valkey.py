"""The back end on a real Valkey or Redis server: what it carries, and every way in which the server fails."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.support.certificates import Certificates, make_certificates
from tests.support.processes import unused_ports
from tests.support.valkey import Server, needs_server, running
from tests.support.waiting import until
from vllm_pd_scheduler.config import ReplicasConfig, SecretSource
from vllm_pd_scheduler.sync import connection, valkey_log
from vllm_pd_scheduler.sync.channel import START, Change, NotKept, Overtaken
from vllm_pd_scheduler.sync.valkey import Valkey

pytestmark = [needs_server, pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")]


@pytest.fixture(scope="module")
def event_loop_policy() -> uvloop.EventLoopPolicy:
    """Have the event loop that the scheduler runs on."""
    return uvloop.EventLoopPolicy()


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.changes: list[Change] = []
        self.problems: list[str] = []

    def received(self, data: bytes) -> None:
        self.messages.append(data)

    def changed(self, change: Change) -> None:
        self.changes.append(change)

    def connection(self, problem: str) -> None:
        self.problems.append(problem)


class Replica:
    """A channel, and what it has heard."""

    def __init__(self, url: str, *, context: ssl.SSLContext | None = None, **settings: Any) -> None:
        self.heard = Heard()
        self.channel = Valkey(ReplicasConfig(url=url, **settings), context)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        task = asyncio.ensure_future(self.channel.run(self.heard))
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def connected(self) -> None:
        await until(lambda: not self.channel.problem)

    async def says(self, problem: str) -> None:
        await until(lambda: problem in self.channel.problem)


@asynccontextmanager
async def replicas(count: int, url: str, **settings: Any) -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Replica(url, **settings).running()) for _ in range(count)]
        for each in made:
            await each.connected()
        yield made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "server") as started:
        yield started


def _secret(tmp_path: Path, text: str) -> SecretSource:
    path = tmp_path / "password"
    path.write_text(text)
    return SecretSource(file=str(path))


# -- what it carries


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


# -- the server fails


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


async def test_many_copies_of_a_server_the_one_that_can_be_written_to_is_used(
    server: Server, tmp_path: Path
) -> None:
    with running(tmp_path / "copy", f"replicaof 127.0.0.1 {server.port}") as copy:
        async with Replica(copy.url).running() as alone:
            await alone.says("it is a copy that can only be read: name the primary in replicas.url")
            both = f"valkey://127.0.0.1:{copy.port},127.0.0.1:{server.port}"
            async with replicas(1, both) as (one,):
                # The roles change, as after a failover.
                copy.ask("REPLICAOF", "NO", "ONE")
                server.ask("REPLICAOF", "127.0.0.1", str(copy.port))
                await one.says("it is a copy that can only be read")
                await one.connected()
                await alone.connected()
                alone.channel.send(b"hello")
                await until(lambda: one.heard.messages == [b"hello"])


async def test_one_that_takes_no_changes_carries_messages(server: Server) -> None:
    async with replicas(2, server.url) as (one, two):
        server.ask("CONFIG", "SET", "min-replicas-to-write", "1")
        with pytest.raises(NotKept, match="NOREPLICAS"):
            await one.channel.append(b"1", START)
        one.channel.send(b"hello")
        await until(lambda: two.heard.messages == [b"hello"])


async def test_sentinels_say_where_the_server_is(server: Server, tmp_path: Path) -> None:
    options = f"sentinel monitor ours 127.0.0.1 {server.port} 1"
    with running(tmp_path / "sentinel", options, sentinel=True) as sentinel:
        nobody = unused_ports(1)[0]
        url = f"valkey://127.0.0.1:{nobody},127.0.0.1:{sentinel.port}"
        async with replicas(1, url, sentinel="ours"), Replica(url, sentinel="theirs").running() as wrong:
            await wrong.says("it knows no server 'theirs'")
        async with Replica(sentinel.url).running() as direct:
            await direct.says("it is a Sentinel: give replicas.sentinel")


async def test_a_node_of_a_cluster_is_used_by_shards(tmp_path: Path) -> None:
    options = "cluster-enabled yes", "cluster-config-file nodes.conf"
    with running(tmp_path / "one", *options) as one, running(tmp_path / "two", *options) as two:
        two.ask("CLUSTER", "MEET", "127.0.0.1", str(one.port))
        one.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        await until(lambda: "cluster_state:ok" in two.ask("CLUSTER", "INFO"))
        await until(lambda: "cluster_slots_assigned:16384" in two.ask("CLUSTER", "INFO"))
        async with replicas(1, one.url) as (here,), replicas(1, two.url) as (there,):
            there.channel.send(b"hello")
            await until(lambda: here.heard.messages == [b"hello"])
            await there.channel.append(b"1", START)
            await until(lambda: here.heard.changes[-1].data == b"1")


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


# -- who may use it


async def test_a_password_and_what_is_said_without_the_right_one(tmp_path: Path) -> None:
    with running(tmp_path / "server", "requirepass secret") as server:
        right = _secret(tmp_path, "secret")
        async with replicas(2, server.url, password=right) as (one, two):
            one.channel.send(b"hello")
            await until(lambda: two.heard.messages == [b"hello"])
        async with Replica(server.url).running() as none:
            await none.says("it wants a password: see replicas.password")
        wrong = _secret(tmp_path, "wrong")
        async with Replica(server.url, password=wrong).running() as one:
            await one.says("it does not take the user and password")
            _secret(tmp_path, "secret")  # a new one counts from the next attempt on
            await one.connected()


async def test_an_acl_user_with_the_rights_of_the_docs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/replicas.md").read_text()
    rule = next(line for line in page.splitlines() if line.startswith("ACL SETUSER"))
    with running(tmp_path / "server") as server:
        assert server.ask(*rule.replace(">SECRET", ">secret").split()) == "+OK\r\n"
        user = server.url.replace("//", "//scheduler@")
        async with replicas(2, user, password=_secret(tmp_path, "secret")) as (one, two):
            one.channel.send(b"hello")
            await one.channel.append(b"1", START)
            await until(lambda: two.heard.messages == [b"hello"] and two.heard.changes[-1].data == b"1")
        server.ask("ACL", "SETUSER", "scheduler", "-eval")
        async with Replica(user, password=_secret(tmp_path, "secret")).running() as less:
            await less.says("the user may not do what is needed (docs/replicas.md has the ACL rule)")
            assert "eval" in less.channel.problem


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


async def test_tls_both_ways_and_what_is_said_if_it_fails(tmp_path: Path, certificates: Certificates) -> None:
    port = unused_ports(1)[0]
    files = certificates.server
    options = f"tls-port {port}", f"tls-cert-file {files['cert']}", f"tls-key-file {files['key']}"
    with running(tmp_path / "server", *options, f"tls-ca-cert-file {certificates.ca}") as server:
        url = f"valkeys://127.0.0.1:{port}"
        tls = {"ca": certificates.ca, **certificates.client}

        async def one(settings: dict[str, str], where: str = url) -> Replica:
            config = ReplicasConfig.model_validate({"url": where, "tls": settings})
            return Replica(where, context=config.tls_settings().context(), tls=config.tls)

        async with (await one(tls)).running() as right:
            await right.connected()
        async with (await one({"ca": certificates.stranger["cert"]})).running() as stranger:
            await stranger.says("its certificate is not trusted")
        async with (await one({"ca": certificates.ca})).running() as unknown:
            await unknown.says("certificate required")
        async with (await one(tls, f"valkeys://127.0.0.1:{server.port}")).running() as plain:
            await until(lambda: len(plain.heard.problems) > 0)
        async with Replica(f"valkey://127.0.0.1:{port}").running() as clear:
            await until(lambda: len(clear.heard.problems) > 0)


# -- what is no server


@asynccontextmanager
async def fake(answers: dict[bytes, bytes]) -> AsyncIterator[str]:
    """Serve answers to commands by their first word; whoever gets none waits."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                for word, answer in answers.items():
                    if word in data:
                        writer.write(answer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"valkey://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def _hello(version: str, role: str = "master") -> bytes:
    words = "version", version, "mode", "standalone", "role", role
    return ("%3\r\n" + "".join(f"${len(each)}\r\n{each}\r\n" for each in words)).encode()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (_hello("6.0.16"), "it is version 6.0.16, too old: Redis 6.2 or Valkey 7.2 is needed"),
        (_hello("nonsense"), "it is version nonsense, too old"),
        (b"-ERR unknown command `HELLO`\r\n", "it is too old: Redis 6.2 or Valkey 7.2 is needed"),
        (_hello("7.2.4", "replica"), "it is a copy that can only be read"),
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


@pytest.mark.parametrize(
    "echo",
    [
        "-ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' 'hush-hush' \r\n",
        "-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `hush-hu\r\n",
    ],
)
async def test_a_server_that_quotes_the_password_does_not_have_it_said(tmp_path: Path, echo: str) -> None:
    password = _secret(tmp_path, "hush-hush")
    async with (
        fake({b"HELLO": echo.encode(), b"AUTH": echo.replace("HELLO", "AUTH").encode()}) as url,
        Replica(url, password=password).running() as one,
        Replica(url, sentinel="ours", sentinel_password=password).running() as of_sentinels,
    ):
        await one.says("unknown command")
        await until(lambda: of_sentinels.heard.problems)
        assert "hush" not in "".join(one.heard.problems + of_sentinels.heard.problems)


async def test_one_that_sends_messages_and_answers_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TICK_S", 0.01)
    monkeypatch.setattr(connection, "_SILENT_TICKS", 100_000)  # it is not for that
    push = b">3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$2\r\nhi\r\n"
    answers = {**_USABLE, b"EVAL": b"$0\r\n\r\n" + 3 * push, b"XTRIM": b""}
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: "sends messages, but has answered nothing" in "".join(one.heard.problems))
        assert one.heard.messages


async def test_a_server_that_answers_garbage_later_is_left(server: Server) -> None:
    answers = {
        b"HELLO": _hello("7.2.4"),
        b"SUBSCRIBE": b">3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n",
        b"PUBLISH": b":1\r\n",
        b"EVAL": b"$0\r\n\r\n",
        b"PING": b">2\r\n:1\r\n:2\r\n>0\r\n>3\r\n$7\r\nmessage\r\n:1\r\n:2\r\n+PONG\r\n!garbage\r\n",
    }
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: "" in one.heard.problems and one.heard.problems[-1])
        assert one.heard.messages == []


_USABLE = {
    b"HELLO": _hello("7.2.4"),
    b"SUBSCRIBE": b">3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n",
    b"PUBLISH": b":1\r\n",
}


@pytest.mark.parametrize(
    "entries",
    [b":1\r\n", b"$1\r\nx\r\n", b"*1\r\n:1\r\n", b"*1\r\n*2\r\n:1\r\n:2\r\n", b"*1\r\n*1\r\n:1\r\n",
     b"*1\r\n*2\r\n:1\r\n*2\r\n*0\r\n:1\r\n", b"_\r\n"],
)  # fmt: skip
async def test_a_log_that_is_none_is_said(entries: bytes) -> None:
    answers = {**_USABLE, b"local trim": b":5\r\n", b"XREVRANGE\r\n$": entries}
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


async def test_a_loss_without_a_reason_is_said_in_words() -> None:
    lost: list[str] = []
    connection.Connection(lambda _: None, lost.append).connection_lost(ConnectionResetError())
    assert lost == ["the server has closed the connection"]


@pytest.mark.parametrize(
    "found",
    [b":1\r\n", b"$1\r\nx\r\n", b"*1\r\n$1\r\nx\r\n", b"*2\r\n_\r\n_\r\n", b"*2\r\n$1\r\nx\r\n*0\r\n",
     b"*2\r\n$9\r\n127.0.0.1\r\n$5\r\n99999\r\n", b"*2\r\n$9\r\n127.0.0.1\r\n$2\r\n-1\r\n",
     b"*2\r\n$0\r\n\r\n$2\r\n99\r\n"],
)  # fmt: skip
async def test_a_sentinel_that_tells_nonsense_is_left(found: bytes) -> None:
    async with fake({b"SENTINEL": found}) as url, Replica(url, sentinel="ours").running() as one:
        await until(lambda: one.heard.problems)
        assert "Sentinel 127.0.0.1:" in one.channel.problem
        assert "it tells no address" in one.channel.problem


@pytest.mark.parametrize("where", ["10.0.0.1:99999", "10.0.0.1:0", "not a name:1", "x" * 300 + ":1"])
async def test_a_node_that_sends_nowhere_is_left(where: str) -> None:
    answers = {**_USABLE, b"SUBSCRIBE": f"-MOVED 1 {where}\r\n".encode()}
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: one.heard.problems)
        assert one.channel.problem


async def test_a_server_without_tls_is_said() -> None:
    context = ssl.create_default_context()
    async with fake({}) as url, Replica(url.replace("valkey:", "valkeys:"), context=context).running() as one:
        await one.says("no connection with TLS within")


async def test_a_server_that_is_no_sentinel_is_said(server: Server) -> None:
    async with Replica(server.url, sentinel="ours").running() as one:
        await one.says("it is no Sentinel: leave replicas.sentinel out")


async def test_a_user_without_a_password_is_told_too(server: Server) -> None:
    url = server.url.replace("//", "//nobody@")
    async with Replica(url).running() as one:
        await one.says("it does not take the user and password: see replicas.password and the user in")
        server.ask("ACL", "SETUSER", "nobody", "on", "nopass", "allchannels", "allkeys", "+@all")
        await until(lambda: not one.channel.problem)


async def test_a_name_that_is_not_found_is_said() -> None:
    async with Replica("valkey://nowhere.invalid").running() as one:
        await until(lambda: one.heard.problems)
        assert "nowhere.invalid:6379: " in one.channel.problem
