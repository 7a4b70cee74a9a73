"""What becomes of pods, slices and candidates: tables."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.support.config import fleet as configured
from tests.support.kubernetes_answers import line
from tests.support.kubernetes_objects import endpoint, endpoint_slice, pod
from vllm_pd_scheduler.config import parse_config
from vllm_pd_scheduler.config.sources import KubernetesSource
from vllm_pd_scheduler.discovery.kubernetes.candidates import Candidate, Candidates, LeftOut
from vllm_pd_scheduler.discovery.kubernetes.objects import EndpointSlice, Pod
from vllm_pd_scheduler.discovery.kubernetes.pods import PodLabels, PodReader, candidates_of
from vllm_pd_scheduler.discovery.kubernetes.slices import read_slices, selector_of
from vllm_pd_scheduler.models import InstanceRole

P, D = InstanceRole.PREFILL, InstanceRole.DECODE

ENTRY = KubernetesSource(type="kubernetes", selector="app=vllm", ports=[8000])
ROLES = {role: frozenset(ENTRY.roles[role.value]) for role in InstanceRole}
LABELS = PodLabels("llm-d.ai/role", ROLES, model="model", revision="revision")


def read(found: dict[str, Any]) -> Pod:
    return msgspec.json.decode(line(found), type=Pod)


def changed(found: dict[str, Any], **status: Any) -> dict[str, Any]:
    return {**found, "status": {**found["status"], **status}}


def deleted(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "metadata": {**found["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}


def places(found: dict[str, Any], *ports: int) -> set[str]:
    """Return what a pod may be, as ``role id host:port``."""
    return {
        f"{each.role} {each.name} {each.host}:{each.port}"
        for each in candidates_of(read(found), ports or (8000,), LABELS)
    }


class TestPods:
    @pytest.mark.parametrize(
        ("role", "expected"),
        [
            ("prefill", "P"),
            ("encode-prefill", "P"),
            ("decode", "D"),
            (None, "D"),
            ("", "D"),
            ("prefill-decode", "PD"),
            ("both", "PD"),
            ("encode-prefill-decode", "PD"),
            ("encode", "E"),
        ],
    )
    def test_roles(self, role: str | None, expected: str) -> None:
        found = candidates_of(read(pod("a", role=role)), (8000,), LABELS)
        assert "".join(each.role.value[0].upper() for each in found) == expected

    @pytest.mark.parametrize("role", ["encode-decode", "Decode", "nonsense"])
    def test_unknown_roles(self, role: str) -> None:
        with pytest.raises(LeftOut, match=f"llm-d.ai/role is '{role}', which makes it neither"):
            list(candidates_of(read(pod("a", role=role)), (8000,), LABELS))

    def test_a_label_and_values_of_ones_choice(self) -> None:
        labels = PodLabels("stage", {P: frozenset({"p", "pd"}), D: frozenset({"d", "pd"})})
        for value, roles in (("p", [P]), ("d", [D]), ("pd", [P, D])):
            assert [c.role for c in candidates_of(read(pod("a", stage=value)), (1,), labels)] == roles
        with pytest.raises(LeftOut, match="it has no label stage, which makes it neither"):
            list(candidates_of(read(pod("a")), (1,), labels))

    @pytest.mark.parametrize(
        "found",
        [
            pod("a", ready=False),
            pod("a", ip=None),
            changed(pod("a"), podIP=None, podIPs=None),
            changed(pod("a"), podIP="", podIPs=[{}]),
            changed(pod("a"), conditions=None),
            changed(pod("a"), conditions=[{"type": "Initialized", "status": "True"}]),
            changed(pod("a"), conditions=[{"type": "Ready", "status": "Unknown"}]),
            {"metadata": {"name": "a"}},
            {"metadata": {"name": "a", "labels": None, "annotations": None}, "status": {}},
            deleted(pod("a")),  # though it is ready still
        ],
    )
    def test_those_that_get_nothing(self, found: dict[str, Any]) -> None:
        assert places(found) == set()

    def test_an_address_of_several(self) -> None:
        dual = changed(pod("a"), podIPs=[{"ip": "10.0.0.1"}, {"ip": "fd00::1"}])
        assert places(dual) == {"decode a 10.0.0.1:8000"}
        assert places(changed(dual, podIP=None)) == {"decode a 10.0.0.1:8000"}
        assert places(changed(pod("a"), podIP="fd00::1")) == {"decode a fd00::1:8000"}

    def test_ports(self) -> None:
        assert places(pod("a"), 8000, 8001) == {
            "decode a-rank-0 10.0.0.1:8000",
            "decode a-rank-1 10.0.0.1:8001",
        }

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8001", {"decode a-rank-1 10.0.0.1:8001"}),
            (" 8001 , 8000,", {"decode a-rank-0 10.0.0.1:8000", "decode a-rank-1 10.0.0.1:8001"}),
            ("9000", set()),
            ("", set()),
        ],
    )
    @pytest.mark.parametrize("key", ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"])
    def test_active_ports(self, key: str, text: str, expected: set[str]) -> None:
        assert places(pod("a", annotations={key: text}), 8000, 8001) == expected

    def test_active_ports_that_are_none(self) -> None:
        found = read(pod("a", annotations={"llm-d.ai/active-ports": "all"}))
        with pytest.raises(LeftOut, match="active-ports is no list of ports: 'all'"):
            list(candidates_of(found, (8000,), LABELS))

    def test_model_and_revision(self) -> None:
        [found] = candidates_of(read(pod("a", model="llama", revision="r7")), (8000,), LABELS)
        assert (found.model, found.revision) == ("llama", "r7")
        [found] = candidates_of(read(pod("a", model="")), (8000,), LABELS)
        assert (found.model, found.revision) == (None, None)
        [found] = candidates_of(read(pod("a", model="llama")), (8000,), PodLabels("llm-d.ai/role", ROLES))
        assert found.model is None

    def test_ranks(self) -> None:
        labels = replace(LABELS, data_parallel_size="ranks")
        for said, size in ((None, 1), ("", 1), ("1", 1), ("8", 8)):
            more = {} if said is None else {"ranks": said}
            [found] = candidates_of(read(pod("a", **more)), (8000,), labels)
            assert found.data_parallel_size == size
        [found] = candidates_of(read(pod("a", ranks="8")), (8000,), LABELS)
        assert found.data_parallel_size == 1
        for said in ("0", "65", "many", "-1", "٣", "9" * 5000):
            with pytest.raises(LeftOut, match="its label ranks must be a number up to 64"):
                list(candidates_of(read(pod("a", ranks=said)), (8000,), labels))

    def test_one_that_is_as_it_was_is_not_read_again(self) -> None:
        reader = PodReader(LABELS)
        pods = {"a": read(pod("a")), "b": read(pod("b", role="nonsense"))}
        first, left_out = reader.read(pods, (8000,))
        again, left_out_again = reader.read(pods, [8000])
        assert again[0] is first[0]
        assert left_out == left_out_again
        assert list(left_out.values()) == [["b"]]
        pods["a"] = read(pod("a", ip="10.0.0.2"))
        assert reader.read(pods, (8000,))[0][0].host == "10.0.0.2"
        assert len(reader.read(pods, (8000, 8001))[0]) == 2
        assert reader.read({}, (8000,)) == ([], {})


def slices(*found: dict[str, Any]) -> list[EndpointSlice]:
    return [msgspec.json.decode(line(each), type=EndpointSlice) for each in found]


def served(*found: dict[str, Any], p: str = "p", d: str = "d") -> tuple[set[str], set[str]]:
    """Return what slices have, as ``role id host:port``, and why some are left out."""
    candidates, left_out = read_slices(slices(*found), {P: p, D: d})
    assert len(set(candidates)) == len(candidates)
    return {f"{c.role} {c.name} {c.host}:{c.port}" for c in candidates}, set(left_out)


class TestSlices:
    def test_one_for_each_role(self) -> None:
        assert served(
            endpoint_slice("p-1", "p", endpoint("10.0.0.1", "pod-1", ready=True)),
            endpoint_slice("d-1", "d", endpoint("10.0.0.2", "pod-2", ready=True), ports={"": 8200}),
            endpoint_slice("x-1", "another", endpoint("10.0.0.3", "pod-3", ready=True)),
        ) == ({"prefill pod-1 10.0.0.1:8000", "decode pod-2 10.0.0.2:8200"}, set())

    def test_a_service_for_both(self) -> None:
        found, _ = served(endpoint_slice("s-1", "s", endpoint("10.0.0.1", "a")), p="s", d="s")
        assert found == {"prefill a 10.0.0.1:8000", "decode a 10.0.0.1:8000"}

    @pytest.mark.parametrize(
        ("conditions", "there"),
        [
            ({}, True),
            ({"ready": True}, True),
            ({"ready": None}, True),
            ({"ready": False}, False),
            ({"ready": False, "serving": True, "terminating": True}, False),
            ({"ready": True, "terminating": True}, False),  # publishNotReadyAddresses
        ],
    )
    def test_conditions(self, conditions: dict[str, bool], there: bool) -> None:
        found, _ = served(endpoint_slice("d-1", "d", endpoint("10.0.0.2", "a", **conditions)))
        assert bool(found) == there

    def test_no_conditions_and_no_endpoints(self) -> None:
        bare = endpoint_slice("d-1", "d", {"addresses": ["10.0.0.2"]})
        assert served(bare) == ({"decode ip-10-0-0-2 10.0.0.2:8000"}, set())
        assert served({**bare, "endpoints": None}) == (set(), set())
        assert served(endpoint_slice("d-1", "d", {"addresses": []})) == (set(), set())

    def test_an_endpoint_that_moves_between_slices(self) -> None:
        there, ending = endpoint("10.0.0.2", "a"), endpoint("10.0.0.2", "a", ready=False, terminating=True)
        one = {"decode a 10.0.0.2:8000"}
        assert served(endpoint_slice("d-1", "d", there), endpoint_slice("d-2", "d", there))[0] == one
        assert served(endpoint_slice("d-1", "d", there), endpoint_slice("d-2", "d", ending))[0] == set()
        assert served(endpoint_slice("d-1", "d", ending), endpoint_slice("d-2", "d", there))[0] == set()

    def test_a_name_that_is_used_again_is_another_pod(self) -> None:
        old = endpoint("10.0.0.2", "a", ready=False, terminating=True)
        new = {**endpoint("10.0.0.3", "a"), "targetRef": {"kind": "Pod", "name": "a", "uid": "another"}}
        assert served(endpoint_slice("d-1", "d", old, new))[0] == {"decode a 10.0.0.3:8000"}

    def test_both_families(self) -> None:
        found = served(
            endpoint_slice("d-6", "d", endpoint("fd00::2", "a"), endpoint("fd00::3", "b"), family="IPv6"),
            endpoint_slice("d-4", "d", endpoint("10.0.0.2", "a")),
        )
        assert found[0] == {"decode a 10.0.0.2:8000", "decode b fd00::3:8000"}

    def test_ports(self) -> None:
        a = endpoint("10.0.0.2", "a")
        several = endpoint_slice("d-1", "d", a, ports={"grpc": 1, "http": 8000})
        assert served(several)[0] == {"decode a 10.0.0.2:8000"}
        assert served(endpoint_slice("d-1", "d", a, ports={"x": 1, "y": 2})) == (
            set(),
            {"it has 2 ports, and none is named 'http'"},
        )
        assert served({**several, "ports": None}) == (set(), {"it has no port"})
        assert served({**several, "ports": [{"name": "http"}]}) == (set(), {"it has no port"})

    def test_the_selector(self) -> None:
        assert selector_of(["b", "a", "b"]) == "kubernetes.io/service-name in (a,b)"


class TestInstances:
    def make(self, *candidates: Candidate, **settings: Any) -> dict[str, str]:
        made = Candidates("kubernetes:llm", parse_config(configured(**settings)))
        return {each.instance_id: f"{each.role} {each.url}" for each in made.instances(candidates, {})}

    def test_a_pod_that_does_both(self) -> None:
        found = self.make(Candidate(P, "a", "10.0.0.1", 8000), Candidate(D, "a", "10.0.0.1", 8000))
        assert found == {"a.prefill": "prefill http://10.0.0.1:8000", "a": "decode http://10.0.0.1:8000"}
        assert set(self.make(Candidate(P, "a", "10.0.0.1", 8000))) == {"a"}

    def test_pods_that_share_an_address(self, caplog: pytest.LogCaptureFixture) -> None:
        """Of those at one port only one can be there: the newer one."""
        old = Candidate(D, "old", "10.0.0.1", 8000, "2026-01-01T00:00:00Z")
        new = Candidate(D, "new", "10.0.0.1", 8000, "2026-02-01T00:00:00Z")
        beside = Candidate(D, "beside", "10.0.0.1", 8001, "2026-01-01T00:00:00Z")
        another = Candidate(P, "another", "10.0.0.1", 8000, "2025-01-01T00:00:00Z")
        for order in ((old, new, beside, another), (another, beside, new, old)):
            assert set(self.make(*order)) == {"new", "beside"}
        assert "old left out: 10.0.0.1:8000 is also the address of new, which is newer" in caplog.text

    @pytest.mark.parametrize("host", ["0.0.0.0", "fe80::1%eth0", "nonsense", "10.0.0"])
    def test_addresses_that_no_server_has(self, host: str, caplog: pytest.LogCaptureFixture) -> None:
        assert set(self.make(Candidate(D, "a", host, 8000), Candidate(D, "b", "10.0.0.1", 8000))) == {"b"}
        assert f"a left out: '{host}' is no address that a server has" in caplog.text

    def test_long_names(self) -> None:
        """A pod's name may have 253 characters, an id 128."""
        names = [f"{'x' * 240}-{number}" for number in range(3)]
        candidates = [
            Candidate(role, name, f"10.0.0.{n}", 1) for n, name in enumerate(names) for role in (P, D)
        ]
        found = set(self.make(*candidates))
        assert len(found) == 6
        assert max(map(len, found)) == 128
        assert found == set(self.make(*candidates))

    def test_a_key_and_a_tls_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PD_KEY", "secret")
        settings = {"api_key": {"env": "PD_KEY"}, "instance_tls": {"server_name": "vllm.internal"}}
        found = Candidates("k", parse_config(configured(**settings)))
        [made] = found.instances([Candidate(D, "a", "10.0.0.1", 8000, model="m", revision="r")], {})
        assert (made.api_key, made.tls_name) == ("secret", "vllm.internal")
        assert (made.models, made.revision) == (frozenset({"m"}), "r")

    def test_one_that_is_as_it_was_is_the_same(self) -> None:
        made = Candidates("k", parse_config(configured()))
        a, b = Candidate(D, "a", "10.0.0.1", 8000), Candidate(D, "b", "10.0.0.2", 8000)
        first = made.instances([a], {})
        assert made.instances([b, a], {})[1] is first[0]

    def test_a_reason_is_logged_once_while_it_lasts(self, caplog: pytest.LogCaptureFixture) -> None:
        made = Candidates("kubernetes:llm", parse_config(configured()))
        why = {"its role is none": [f"pod-{n}" for n in range(9)]}
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                made.instances([], why)
            made.instances([], {**why, "another": ["x"]})
            made.instances([], {})
            made.instances([], {f"reason {number}": ["y"] for number in range(100)})
        assert [record.getMessage() for record in caplog.records] == [
            "kubernetes:llm: pod-0, pod-1, pod-2 and 6 more left out: its role is none",
            "kubernetes:llm: x left out: another",
            *[f"kubernetes:llm: y left out: reason {number}" for number in range(5)],
            "kubernetes:llm: 95 more are left out for like reasons",
        ]
