"""The back end on copies, by Sentinels and on clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_valkey import USABLE, fake
from tests.support.processes import unused_ports
from tests.support.valkey import Server, needs_server, running
from tests.support.valkey_replicas import Replica, replicas
from tests.support.waiting import until
from vllm_pd_scheduler.sync.channel import START, NotKept

pytestmark = [needs_server, pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")]


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
    # By default the nodes' own port is greater by 10,000, where connections that go out have theirs.
    bus, other = unused_ports(2)
    with (
        running(tmp_path / "one", *options, f"cluster-port {bus}") as one,
        running(tmp_path / "two", *options, f"cluster-port {other}") as two,
    ):
        two.ask("CLUSTER", "MEET", "127.0.0.1", str(one.port), str(bus))
        one.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        await until(lambda: "cluster_state:ok" in two.ask("CLUSTER", "INFO"))
        await until(lambda: "cluster_slots_assigned:16384" in two.ask("CLUSTER", "INFO"))
        async with replicas(1, one.url) as (here,), replicas(1, two.url) as (there,):
            there.channel.send(b"hello")
            await until(lambda: here.heard.messages == [b"hello"])
            await there.channel.append(b"1", START)
            await until(lambda: here.heard.changes[-1].data == b"1")


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
    answers = {**USABLE, b"SUBSCRIBE": f"-MOVED 1 {where}\r\n".encode()}
    async with fake(answers) as url, Replica(url).running() as one:
        await until(lambda: one.heard.problems)
        assert one.channel.problem


async def test_a_server_that_is_no_sentinel_is_said(server: Server) -> None:
    async with Replica(server.url, sentinel="ours").running() as one:
        await one.says("it is no Sentinel: leave replicas.sentinel out")
