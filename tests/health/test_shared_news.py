"""News of an instance that one scheduler tells the others: that it fails, is another one, or has moved."""

from __future__ import annotations

from tests.support.waiting import until
from vllm_pd_scheduler.fleet.condition import reason
from vllm_pd_scheduler.health.shared import OWN_LOOK_S
from vllm_pd_scheduler.models import InstanceRole

from .schedulers import INTERVAL_S, Schedulers

P = InstanceRole.PREFILL


class TestBadNews:
    """It makes each look for itself."""

    async def test_an_instance_that_dies_is_looked_at_by_all(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b", "c")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        server.status = 503
        await schedulers.owner("d0").look()
        schedulers.exchange()
        assert all(one.looks("d0") for one in schedulers.all)
        await schedulers.rounds(2)
        for one in schedulers.all:
            assert one["d0"].probes.healthy is False
            assert reason(one["d0"]) == "/health answers 503"
        server.status = 200
        await schedulers.rounds()
        for one in schedulers.all:
            assert one["d0"].probes.healthy is True
        await schedulers.rounds()
        assert [one.looks("d0") for one in schedulers.all].count(True) == 1

    async def test_the_scraper_that_is_cut_off_from_it_takes_it_out_for_itself_alone(
        self, schedulers: Schedulers
    ) -> None:
        schedulers.join("a", "b", "c")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner = schedulers.owner("d0")
        owner.registry.resolved(owner["d0"], "127.9.9.9")
        await schedulers.rounds(4)
        assert owner["d0"].probes.healthy is False
        for one in schedulers.all:
            if one is not owner:
                assert one["d0"].probes.healthy is True
                assert one.looks("d0")
        assert server.probes >= 6

    async def test_one_that_is_cut_off_is_not_told_that_it_is_well(self, schedulers: Schedulers) -> None:
        """By its own probe, which comes at the latest after a number of intervals."""
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.acquaint()
        other = schedulers.other("d0")
        other.registry.resolved(other["d0"], "127.9.9.9")
        await schedulers.rounds(3)
        assert other["d0"].probes.healthy is True, "it has not looked"
        await schedulers.rounds(int(OWN_LOOK_S / INTERVAL_S))
        assert other["d0"].probes.healthy is False
        await schedulers.rounds(3)
        assert other["d0"].probes.healthy is False
        other.registry.resolved(other["d0"], "127.0.0.1")
        await schedulers.rounds(2)
        assert other["d0"].probes.healthy is True
        assert not other.looks("d0")

    async def test_one_at_which_own_requests_fail_is_looked_at(self, schedulers: Schedulers) -> None:
        """Whatever others tell: only a look of its own, or a request, ends that."""
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        assert not other.looks("d0")
        other.registry.ends.failed(other["d0"], "reset", schedulers.now)
        assert other.looks("d0"), "one failure is enough"
        server.status = 503
        await other.look()
        server.status = 200
        schedulers.now += INTERVAL_S
        await owner.look()
        schedulers.exchange()
        assert other["d0"].probes.problem == "/health answers 503", "the other's word does not count"
        await other.look()
        assert not other["d0"].probes.problem
        other.registry.ends.succeeded(other["d0"])
        assert not other.looks("d0")

    async def test_a_trial_follows_a_look_of_its_own_not_a_word_of_others(
        self, schedulers: Schedulers
    ) -> None:
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.serve("d1")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        for _ in range(3):
            other.registry.ends.failed(other["d0"], "reset", schedulers.now)
        other.deaf = True  # the ejection is its own alone
        schedulers.now += INTERVAL_S
        await owner.look()
        other.deaf = False
        schedulers.exchange()
        assert other["d0"].ejected
        await other.look()
        assert other["d0"].routable

    async def test_an_engine_that_stands_still_is_found_by_all(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b", "c")
        await schedulers.serve("d0", page="vllm:num_requests_running 3\nvllm:generation_tokens_total 9\n")
        await schedulers.acquaint()
        await schedulers.rounds(9)
        for one in schedulers.all:
            assert "its engine stands still" in reason(one["d0"])

    async def test_all_find_that_it_hangs(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("p0", role=P)
        await schedulers.acquaint()
        server.mute()
        for one in schedulers.all:
            one.monitor._silence.seconds = 0.01
        await schedulers.rounds(3)
        await until(lambda: all(one.hung == ["p0"] for one in schedulers.all))


class TestNews:
    """What is new is seen by each with its own eyes."""

    async def test_another_process(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        for one in schedulers.all:
            one.registry.work.reserve(one["d0"])
        server.page = server.page.replace("1.7e9", "1.8e9")
        await schedulers.rounds(2)
        assert (owner["d0"].generation, other["d0"].generation) == (1, 1)
        assert (owner["d0"].in_flight, other["d0"].in_flight) == (0, 0)

    async def test_other_models(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0")
        await schedulers.acquaint()
        await schedulers.rounds(3)
        assert len(server.authorization) == 1, "asked by one, and not by the other"
        server.models = ["tiny", "adapter"]
        await schedulers.rounds(4)
        for one in schedulers.all:
            assert one["d0"].models.names == {"tiny", "adapter"}
        asked = len(server.authorization)
        await schedulers.rounds(3)
        assert len(server.authorization) == asked + 1

    async def test_another_address(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0", host="vllm-0")
        await schedulers.acquaint()
        other = schedulers.other("d0")
        assert not other.looks("d0")
        for one in schedulers.all:
            one.addresses["vllm-0"] = ["127.0.0.2"]
        await schedulers.rounds(5)
        for one in schedulers.all:
            assert one["d0"].address == f"127.0.0.2:{server.port}"

    async def test_an_address_that_is_only_told_is_not_used(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        server = await schedulers.serve("d0", host="vllm-0")
        await schedulers.acquaint()
        owner, other = schedulers.owner("d0"), schedulers.other("d0")
        owner.registry.resolved(owner["d0"], "127.0.0.2")
        owner.addresses["vllm-0"] = ["127.0.0.2"]
        await schedulers.rounds(3)
        assert other["d0"].address == f"127.0.0.1:{server.port}"
        assert other.looks("d0"), "they do not agree where it is"

    async def test_a_new_instance_is_looked_at_by_all(self, schedulers: Schedulers) -> None:
        schedulers.join("a", "b")
        await schedulers.serve("d0")
        await schedulers.acquaint()
        server = await schedulers.serve("d1")
        await schedulers.rounds()
        assert server.probes == 2
        await schedulers.rounds(2)
        assert server.probes <= 5
        assert all(one["d1"].routable for one in schedulers.all)
