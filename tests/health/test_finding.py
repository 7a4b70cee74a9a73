"""What replicas tell of a probe: it comes out as it went in, or not at all."""

import contextlib
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd_scheduler.fleet.registry import Registry
from vllm_pd_scheduler.health.finding import Finding, NotAFinding, digest_of, read, write
from vllm_pd_scheduler.health.vllm_metrics import HISTOGRAMS, Scrape, parse_metrics, parse_ranks
from vllm_pd_scheduler.models import InstanceRole, PDInstance

from .test_vllm_metrics import CURRENT, TWO_ENGINES

COUNTS = st.floats(0.0, 1e15)
SCRAPES = st.builds(
    Scrape,
    running=st.floats(0.0, 1e6),
    waiting=st.floats(0.0, 1e6),
    kv_usage=st.floats(0.0, 1.0),
    histograms=st.dictionaries(st.sampled_from(HISTOGRAMS), st.tuples(COUNTS, COUNTS)),
    started_at=st.none() | st.floats(1.0, 1e10),
    kv_capacity=st.none() | st.floats(1.0, 1e10),
    generated=COUNTS,
    finished=COUNTS,
    steps=COUNTS,
    failed_transfers=st.none() | COUNTS,
    adapters=st.lists(st.text(min_size=1, max_size=20), max_size=5).map(tuple),
    adapter_slots=st.integers(0, 9999),
)


@given(st.lists(SCRAPES, max_size=4), st.binary(max_size=8))
def test_it_comes_out_as_it_went_in(pages: list[Scrape], models: bytes) -> None:
    finding = Finding("10.0.0.1:8000", models, pages)
    assert read(write(finding)) == finding


def test_real_pages() -> None:
    pages = [parse_metrics(CURRENT), *parse_ranks(TWO_ENGINES.encode(), 2)]
    told = write(Finding("10.0.0.1:8000", b"12345678", pages))
    assert read(told).pages == pages
    assert len(told) < 400


@given(st.binary(max_size=200))
def test_garbage_is_no_finding(data: bytes) -> None:
    with contextlib.suppress(NotAFinding):
        read(data)


def told(**wrong: object) -> bytes:
    page = {
        "running": 1.0, "waiting": 0.0, "kv_usage": 0.5, "histograms": [], "started_at": 1.7e9,
        "kv_capacity": 1e5, "generated": 1.0, "finished": 1.0, "steps": 1.0, "failed_transfers": None,
        "adapters": [], "adapter_slots": 0,
    }  # fmt: skip
    return msgspec.msgpack.encode(["10.0.0.1:8000", b"", [list((page | wrong).values())]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"running": -1.0},
        {"running": math.nan},
        {"running": 1e7},
        {"waiting": math.inf},
        {"waiting": "many"},
        {"kv_usage": 1.5},
        {"kv_usage": -0.1},
        {"kv_capacity": 0.0},
        {"kv_capacity": 1e12},
        {"generated": -1.0},
        {"generated": math.nan},
        {"generated": 1e16},
        {"started_at": -5.0},
        {"started_at": math.inf},
        {"histograms": [(math.nan, 1.0)]},
        {"histograms": [(1.0, -1.0)]},
        {"histograms": [None] * 100},
        {"adapters": ["a"] * 1000},
        {"adapters": ["a" * 1000]},
        {"adapter_slots": -1},
    ],
)
def test_what_cannot_be_is_no_finding(wrong: dict[str, object]) -> None:
    assert read(told()).pages[0].running == 1.0
    with pytest.raises(NotAFinding):
        read(told(**wrong))


def test_only_the_newest_adapters_are_told() -> None:
    scrape = Scrape(1.0, 0.0, 0.0, {}, adapters=("x" * 300, *(f"a{number}" for number in range(100))))
    adapters = read(write(Finding("", b"", [scrape]))).pages[0].adapters
    assert adapters == tuple(f"a{number}" for number in range(68, 100))


def test_the_digest_is_that_of_models_and_adapters() -> None:
    registry = Registry()
    endpoint = registry.add(PDInstance("d0", InstanceRole.DECODE, "10.0.0.1", 8000))
    seen = [digest_of(endpoint)]
    assert seen == [b""]
    for models, adapters in ((["m"], []), (["m", "a"], []), (["m", "a"], ["a"]), (["\ud800"], [])):
        registry.models.listed(endpoint, frozenset(models), frozenset(adapters))
        seen.append(digest_of(endpoint))
    assert len(set(seen)) == 5
    registry.models.listed(endpoint, frozenset(["a", "m"]), frozenset(["a"]))
    assert digest_of(endpoint) == seen[3]
