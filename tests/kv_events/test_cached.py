"""The prefix index, corrected by what engines tell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.kv_events.cached import Cached, Change, links
from vllm_pd_scheduler.models import InstanceRole, PDInstance
from vllm_pd_scheduler.request.prompt import BLOCK_BYTES

BLOCKS = (11, 12, 13, 14)
NAMES = (101, 102, 103, 104)
LINKS = list(zip(NAMES, BLOCKS, strict=True))


def fleet() -> tuple[Registry, Endpoint, Endpoint]:
    registry = Registry()
    for name in ("p0", "p1"):
        registry.add(PDInstance(name, InstanceRole.PREFILL, "10.0.0.1", int(name[1]) + 1))
    return registry, registry.get("p0"), registry.get("p1")


def depths(registry: Registry) -> dict[str, int]:
    found = registry.prefixes.match(BLOCKS)
    return {each.id: found[each.holder] for each in registry if each.holder in found}


def came(*names: int) -> list[Change]:
    return [(name, True) for name in names]


def test_what_was_cached_before_it_could_be_understood() -> None:
    """Requests that another router has sent: one of ours with the same prompt shows what they were."""
    registry, p0, _ = fleet()
    cached = Cached()
    cached.tell(p0, came(*NAMES[:3]))
    assert depths(registry) == {}
    cached.link(LINKS)
    assert depths(registry) == {"p0": 3}


def test_what_is_cached_and_evicted_later() -> None:
    registry, p0, p1 = fleet()
    cached = Cached()
    cached.link(LINKS)
    p0.holder.store(BLOCKS)
    cached.tell(p0, came(*NAMES))
    cached.tell(p1, came(*NAMES[:2]))
    assert depths(registry) == {"p0": 4, "p1": 2}
    cached.tell(p0, [(NAMES[3], False), (NAMES[2], False)])
    assert depths(registry) == {"p0": 2, "p1": 2}
    cached.tell(p1, [None])
    assert depths(registry) == {"p0": 2}


def test_what_was_not_told_to_be_there_does_not_go() -> None:
    """A request is under way, and its prompt is taken for cached already."""
    registry, p0, _ = fleet()
    cached = Cached()
    cached.link(LINKS)
    p0.holder.store(BLOCKS)
    cached.tell(p0, [(NAMES[1], False)])
    assert depths(registry) == {"p0": 4}


def test_one_that_is_gone_is_forgotten() -> None:
    registry, p0, p1 = fleet()
    cached = Cached()
    cached.tell(p0, came(*NAMES))
    cached.forget(p0)
    cached.forget(p1)
    cached.link(LINKS)
    assert depths(registry) == {}


def test_links_are_bounded() -> None:
    cached = Cached(max_links=3)
    cached.link(LINKS)
    assert cached.links == 3


def test_links_of_a_prompt() -> None:
    """A block counts as cached with the first mark behind its end."""
    marks = {256: 1, 512: 2, 768: 3}
    assert links((7, 8, 9), 3 * BLOCK_BYTES, 780, marks) == [(2, 7), (3, 8)]
    assert links((7, 8, 9), 3 * BLOCK_BYTES, 768, marks) == [(1, 7), (2, 8), (3, 9)]
    assert links((7,), 3 * BLOCK_BYTES, 90, {}) == []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["p0", "p1"]), st.sampled_from(NAMES), st.booleans()),
            st.tuples(st.sampled_from(["p0", "p1"]), st.none(), st.none()),
            st.tuples(st.just("link"), st.sampled_from(LINKS), st.none()),
            st.tuples(st.just("store"), st.sampled_from(["p0", "p1"]), st.integers(1, 4)),
        )
    )
)
def test_whatever_comes_the_index_stays_whole(steps: list[tuple[str, object, object]]) -> None:
    registry, *_ = fleet()
    cached = Cached(max_links=3)
    for what, given_name, more in steps:
        if what == "link":
            cached.link([given_name])  # type: ignore[list-item]
        elif what == "store":
            registry.get(str(given_name)).holder.store(BLOCKS[: int(more)])  # type: ignore[call-overload]
        else:
            cached.tell(registry.get(what), [None if given_name is None else (given_name, bool(more))])  # type: ignore[list-item]
        for each in registry:
            each.holder.store(BLOCKS[:1])
            assert 1 <= depths(registry)[each.id] <= 4
    for each in registry:
        each.holder.clear()
    assert depths(registry) == {}
    assert len(registry.prefixes) == 0
