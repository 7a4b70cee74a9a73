"""A connector of one's own: the example in ``docs/connectors/own.md`` does what the page says."""

import json
import re
import sys
import types
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest

from tests.support.routing import BODY, Leg, decode_body
from vllm_pd_scheduler.config import ConfigError, parse_config
from vllm_pd_scheduler.connectors import Connector
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.router import PDRouter

PAGE = Path(__file__).parents[2] / "docs" / "connectors" / "own.md"
SECTION = PAGE.read_text(encoding="utf-8")


def example(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return str(found)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of the page; Python finds the module that it names."""
    module = types.ModuleType("ticketing")
    monkeypatch.setitem(sys.modules, "ticketing", module)
    exec(example("python"), module.__dict__)
    found: dict[str, Any] = json.loads(example("json"))
    return found


def own() -> Any:
    return sys.modules["ticketing"].Ticket()  # type: ignore[attr-defined]


def test_its_settings_are_checked(config: dict[str, Any]) -> None:
    parse_config(config)
    for settings, problem in (
        ({"tttl": 5}, "connector: 'ticketing:Ticket' has no setting 'tttl'; its settings are ttl"),
        (
            {"ttl": 0},
            "connector: of 'ticketing:Ticket': Expected `float` > 0.0 - at `$.ttl`; its settings are ttl",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config({**config, "connector": {"type": "ticketing:Ticket", **settings}})
        assert caught.value.problems == [problem]


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize("prompt", [{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}])
def test_p_gets_one_token_of_a_request_that_can_be_split(prompt: dict[str, Any]) -> None:
    client = {**prompt, "stream": True, "stream_options": {}, "min_tokens": 5, "max_tokens": 9, "seed": 7}
    body = JsonBody.parse(json.dumps(client).encode())
    assert own().can_split(body)
    assert json.loads(own().prefill_body(body, None)) == {
        **prompt, "seed": 7, "max_tokens": 1, "stream": False, "kv_transfer_params": {"issue_ticket": True},
    }  # fmt: skip
    for more in ({"n": 2}, {"use_beam_search": True}, {"echo": True}, {"prompt_logprobs": 1}):
        assert not own().can_split(JsonBody.parse(json.dumps({**client, **more}).encode()))
    assert not own().can_split(JsonBody.parse(b'{"prompt":["x","y"]}'))


def test_every_call_that_must_be_defined_is_named() -> None:
    (line,) = re.findall(r"\*\*Must be defined:\*\* (.*)", SECTION)
    assert set(re.findall(r"`(\w+)`", line)) == Connector.__abstractmethods__


def test_every_call_has_a_row() -> None:
    rows = re.findall(r"^\| (`.*?) \|", SECTION, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)} - {"__init__"}
    calls = {name for name, value in vars(Connector).items() if isfunction(value)}
    assert named == {name for name in calls if name[0] != "_"}


async def routed(config: dict[str, Any], text: bytes) -> Any:
    """Send a request through a router of the page's configuration, whose P answers with ``text``."""
    leg = Leg()
    leg.answers["prefill-0"] = PrefillAnswer(200, "application/json", text)
    router = PDRouter(parse_config(config), prefill_leg=leg)
    for endpoint in router.registry:
        router.registry.probed(endpoint, None)
    return await router.route({":method": "POST", ":path": "/v1/completions"}, json.dumps(BODY).encode())


async def test_d_gets_the_ticket_that_p_has_answered(config: dict[str, Any]) -> None:
    text = b'{"choices":[],"usage":{"prompt_tokens":5},"kv_transfer_params":{"ticket":"t1"}}'
    forward = await routed(config, text)
    assert decode_body(forward) == {**BODY, "kv_transfer_params": {"ticket": "t1"}}
    assert forward.pending.handoff.prompt_tokens == 5
    assert forward.pending.handoff.lease == 60.0


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"kv_transfer_params":{}}', b'{"kv_transfer_params":{"ticket":""}}']
)
async def test_an_answer_without_a_ticket_is_no_handoff(config: dict[str, Any], text: bytes) -> None:
    forward = await routed(config, text)
    assert (forward.prefill, decode_body(forward)) == (None, BODY)
