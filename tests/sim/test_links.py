"""Transfers that share links: nobody gets more than his share, and all that is free is used."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.sim.engine import Engine, EngineRequest, HandOff
from vllm_pd_scheduler.sim.links import Link, Links
from vllm_pd_scheduler.sim.profile import EngineProfile
from vllm_pd_scheduler.sim.virtual import VirtualClock, VirtualInstance


def ends(transfers: list[tuple[float, list[Link], float]]) -> list[float]:
    """When each transfer (its start, way and bytes) has ended."""
    clock = VirtualClock()
    links, found = Links(clock), [0.0] * len(transfers)

    def begin(number: int, route: list[Link], size: float) -> None:
        def ended() -> None:
            found[number] = clock.now

        links.send(route, size, ended)

    for number, (start, route, size) in enumerate(transfers):
        clock.call_at(start, lambda number=number, route=route, size=size: begin(number, route, size))
    clock.run()
    assert links.under_way == 0
    return found


def test_one_alone_has_all_of_its_slowest_link() -> None:
    assert ends([(1.0, [Link(10.0), Link(5.0)], 20.0)]) == [5.0]


def test_those_of_one_link_share_it_while_both_last() -> None:
    link = Link(10.0)
    # Until 2 s the first is alone. Then they share, until the second has its 10 bytes.
    assert ends([(0.0, [link], 40.0), (2.0, [link], 10.0)]) == pytest.approx([5.0, 4.0])


def test_what_one_cannot_use_the_others_get() -> None:
    wide, narrow = Link(10.0), Link(2.0)
    assert ends([(0.0, [wide, narrow], 2.0), (0.0, [wide], 8.0)]) == pytest.approx([1.0, 1.0])


@given(st.integers(0, 10_000))
def test_every_transfer_ends_and_no_link_carries_more_than_it_can(seed: int) -> None:
    draw = Random(seed)
    links = [Link(draw.uniform(1.0, 9.0)) for _ in range(4)]
    work = [
        (draw.uniform(0.0, 3.0), draw.sample(links, draw.randint(1, 3)), draw.uniform(0.0, 20.0))
        for _ in range(draw.randint(1, 9))
    ]
    found = ends(work)
    for (start, route, size), end in zip(work, found, strict=True):
        assert end >= start + size / min(link.capacity for link in route) - 1e-6
    for link in links:
        mine = [(one, end) for one, end in zip(work, found, strict=True) if link in one[1]]
        if mine:
            span = max(end for _, end in mine) - min(one[0] for one, _ in mine)
            assert sum(one[2] for one, _ in mine) <= link.capacity * span + 1e-6


def test_two_hand_offs_to_one_instance_take_twice_as_long() -> None:
    profile = EngineProfile(kv_bytes_per_token=1000, transfer_bandwidth=1e6, transfer_latency=0.0)
    clock = VirtualClock()
    links, port = Links(clock), Link(profile.transfer_bandwidth)
    prefills = [VirtualInstance(Engine(profile), clock) for _ in range(2)]
    decode = VirtualInstance(
        Engine(profile), clock, transport=lambda _, to, size, on_end: links.send([port], size, on_end)
    )
    first: list[float] = []
    for number, prefill in enumerate(prefills):
        name = str(number)

        def prefilled(request: EngineRequest, _: float, prefill: VirtualInstance = prefill) -> None:
            offer = prefill.offer(request.request_id)
            received = EngineRequest(request.request_id, 100, 1, HandOff.RECEIVE)
            decode.add(received, offer=offer, on_first_token=lambda _, at: first.append(at))

        prefill.add(EngineRequest(name, 100, 1, HandOff.SEND), on_finished=prefilled)
    clock.run()
    prefill_time = profile.step_time(100, 0, 0)
    assert all(at > prefill_time + 0.2 for at in first)
