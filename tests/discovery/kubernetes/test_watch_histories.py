"""Whatever happens to a list and a watch, in any order: what is known in the end is what there is."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.discovery.kubernetes.watching import Heard
from tests.support.kubernetes import CUT, ApiServer, Refusal
from tests.support.kubernetes_objects import pod
from tests.support.waiting import until
from vllm_pd_scheduler.discovery.kubernetes import api as api_module
from vllm_pd_scheduler.discovery.kubernetes import watch as module
from vllm_pd_scheduler.discovery.kubernetes.api import Api
from vllm_pd_scheduler.discovery.kubernetes.credentials import Credentials
from vllm_pd_scheduler.discovery.kubernetes.pods import PODS
from vllm_pd_scheduler.discovery.kubernetes.watch import ListWatch

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 9), st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.sampled_from(
            [("end",), ("cut",), ("half",), ("compact",), ("gone",), ("refuse",), ("mute",), ("let",)]
        ),
    ),
    max_size=25,
)


def take(server: ApiServer, step: tuple[object, ...]) -> None:
    match step:
        case ("put", number, ip, ours):
            server.put("pods", pod(f"p{number}", ip=f"10.0.0.{ip}", app="vllm" if ours else "other"))
        case ("remove", number) if f"p{number}" in server.names("pods"):
            server.remove("pods", f"p{number}")
        case ("end",):
            server.end_watches()
        case ("cut",):
            server.cut_watches()
        case ("half",):
            server.send(b'{"type":"DELETED","object":{"meta', CUT)
        case ("compact",):
            server.compact()
            server.end_watches()
        case ("gone",):
            server.expire()
        case ("refuse",):
            server.refusals.append(Refusal(503, b"", {"retry-after": "0"}))
        case ("mute",):
            server.mute = True


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_what_is_known_is_what_there_is(
    steps: list[tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "SILENCE_S", 0.1)
    monkeypatch.setattr(module, "PAGE", 2)
    asyncio.run(live_through(steps, tmp_path_factory))


async def live_through(steps: list[tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory) -> None:
    async with ApiServer() as server:
        path = server.kubeconfig(tmp_path_factory.mktemp("kubeconfig") / "config")
        async with Api(Credentials(path)) as api:
            watch = ListWatch(api, PODS, "llm", Heard(), labels="app=vllm")
            following = asyncio.ensure_future(watch.follow())
            for step in steps:
                take(server, step)
                if step == ("let",):
                    await asyncio.sleep(0.01)
            server.mute = False

            def same() -> bool:
                found = {name: each.ip for name, each in watch.objects.items()}
                all_pods = [server.get("pods", name) for name in server.names("pods")]
                there = {
                    each["metadata"]["name"]: each["status"]["podIP"]
                    for each in all_pods
                    if each["metadata"]["labels"]["app"] == "vllm"
                }
                return watch.listed and found == there

            await until(same)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
