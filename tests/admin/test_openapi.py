"""The interface's description of itself, against what a running server takes and answers."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from tests.support.admin import Admin, D, P
from vllm_pd_scheduler import __version__
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.admin.openapi import document
from vllm_pd_scheduler.admin.route import Route
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.models import PDInstance
from vllm_pd_scheduler.router import PDRouter

TOKEN = "s3cret"
ROUTES = AdminServer(PDRouter(SchedulerConfig()), is_ready=lambda: True).routes
ASKED = [route for route in ROUTES if "text/event-stream" not in route.answers.values()]
"""Without those whose answer has no end."""
NAMES = [(route, name) for route in ASKED for name in ("any", "d0") if name == "any" or "{id}" in route.path]
"""Each with an instance of any name, and with one that there is."""
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.ignored_auth,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]


class Running:
    """An admin server that listens, in an event loop of its own thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._run(self._start())

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> None:
        self._admin = Admin(drain_timeout=0.0)
        await self._admin.serve(token=TOKEN)
        self.url = str(self._admin.client.make_url("/"))

    def with_fleet(self) -> None:
        """Have an instance of each role, and no other."""

        async def renew() -> None:
            router = self._admin.router
            for endpoint in router.registry:
                router.unregister_instance(endpoint.id)
            for name, role, port in (("p0", P, 8100), ("d0", D, 8200)):
                router.register_instance(PDInstance(name, role, "10.0.0.1", port))
            self._admin.healthy("p0", "d0")

        self._run(renew())

    def stop(self) -> None:
        self._run(self._admin.client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    level = logging.getLogger().level
    found = Running()
    yield found
    found.stop()
    logging.getLogger().setLevel(level)


@pytest.mark.parametrize(
    ("route", "name"), NAMES, ids=[f"{route.method} {route.path} {name}" for route, name in NAMES]
)
def test_each_answer_is_as_declared(running: Running, route: Route, name: str) -> None:
    """What fits the declaration, and what does not."""
    schema = schemathesis.openapi.from_dict(document(ROUTES))
    operation = schema[route.path][route.method]
    place = {} if name == "any" else {"path_parameters": {"id": name}}
    fitting = operation.as_strategy(GenerationMode.POSITIVE, **place)
    takes = bool(operation.body or operation.query or operation.path_parameters)
    others = operation.as_strategy(GenerationMode.NEGATIVE, **place) if takes else fitting

    @settings(
        max_examples=8 if takes else 1,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=fitting | others)
    def ask(case: Case) -> None:
        running.with_fleet()
        headers = {"authorization": f"Bearer {TOKEN}"}
        case.call_and_validate(base_url=running.url, headers=headers, checks=CHECKS)

    ask()


async def test_it_is_served() -> None:
    admin = Admin()
    await admin.serve()
    status, found = await admin.ask("GET", "/openapi.json")
    await admin.client.close()
    assert (status, found["openapi"], found["info"]["version"]) == (200, "3.1.0", __version__)
    schemathesis.openapi.from_dict(found).validate()
    named = {(method.upper(), path) for path, of_path in found["paths"].items() for method in of_path}
    assert named == {(route.method, route.path) for route in ROUTES}


def test_an_answer_in_another_form() -> None:
    index = next(route for route in ROUTES if route.path == "/")
    described = document([replace(index, also=("text/html",))])["paths"]["/"]["get"]["responses"]
    assert set(described["200"]["content"]) == {"application/json", "text/html"}
    assert set(described["400"]["content"]) == {"application/json"}


async def test_the_index_lists_the_same() -> None:
    admin = Admin()
    await admin.serve()
    status, found = await admin.ask("GET", "/")
    await admin.client.close()
    assert (status, found["name"], found["version"]) == (200, "vllm-pd-scheduler", __version__)
    assert [(each["method"], each["path"]) for each in found["endpoints"]] == [
        (route.method, route.path) for route in ROUTES
    ]
    assert all(each["summary"] for each in found["endpoints"])
