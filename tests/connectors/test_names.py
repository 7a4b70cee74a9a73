"""Connectors by name, each instance's own, and what the configuration may say of them."""

import sys
import types
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from tests.support.config import decode, fleet
from vllm_pd_scheduler.config import ConfigError, InstanceConfig, parse_config
from vllm_pd_scheduler.connectors import (
    Connector,
    Connectors,
    NixlConnector,
    Settings,
    SharedStoreConnector,
    UnknownConnector,
    connector_names,
    load_connector,
    settings_of,
)
from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.models import ConnectorChoice, InstanceRole, PDInstance
from vllm_pd_scheduler.request.api import RESPONSES
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.router import PDRouter

NIXL = ConnectorChoice("nixl")


class Port(Settings, frozen=True):
    port: int = 5


class Custom(NixlConnector):
    settings_type = Port


class Needy(NixlConnector):
    class Host(Settings, frozen=True):
        host: str

    settings_type = Host


class OddSettings(NixlConnector):
    settings_type = dict  # type: ignore[assignment]


class Unreadable(NixlConnector):
    class Port(Settings, frozen=True):
        port: Fraction | Decimal | complex = 0j

    settings_type = Port


class Abstract(Connector):
    """A connector whose author is not done."""


class Raises(NixlConnector):
    def __init__(self) -> None:
        raise ValueError("no")


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a connector of the operator's own."""
    module = types.ModuleType("operators_own")
    for each in (Custom, Needy, OddSettings, Unreadable, Abstract, Raises):
        setattr(module, each.__name__, each)
    module.NoConnector = int  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "operators_own", module)
    return "operators_own:Custom"


def test_built_in_ones() -> None:
    assert load_connector("nixl") is NixlConnector
    assert load_connector("shared-store") is SharedStoreConnector
    for name in connector_names():
        assert isinstance(load_connector(name)().settings_type, type)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nixI", "unknown connector 'nixI'; choose one of auto, nixl, nixl-push, shared-store"),
        ("operators_own:None", "defines no 'None'"),
        ("operators_own:NoConnector", "is not a subclass of vllm_pd_scheduler.connectors.Connector"),
        ("not_there:Custom", "No module named 'not_there'"),
    ],
)
def test_what_is_none(custom: str, name: str, problem: str) -> None:
    with pytest.raises(UnknownConnector) as caught:
        load_connector(name)
    assert problem in str(caught.value)


def test_settings_are_checked(custom: str) -> None:
    assert settings_of(ConnectorChoice(custom)) == Port()
    assert settings_of(ConnectorChoice(custom, (("port", 7),))) == Port(7)


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (("Custom", ("prot", 7)), "'operators_own:Custom' has no setting 'prot'; its settings are port"),
        (("Custom", ("port", "7")), "Expected `int`, got `str` - at `$.port`; its settings are port"),
        (("Needy",), "missing required field `host`; its settings are host"),
        (("OddSettings",), "not a subclass of vllm_pd_scheduler.connectors.Settings"),
        (("Unreadable",), "of 'operators_own:Unreadable': TypeError"),
    ],
)  # fmt: skip
def test_settings_that_are_none(custom: str, choice: tuple[Any, ...], problem: str) -> None:
    name, *settings = choice
    with pytest.raises(UnknownConnector) as caught:
        settings_of(ConnectorChoice(f"operators_own:{name}", tuple(settings)))
    assert problem in str(caught.value)


def test_one_without_settings_gets_none() -> None:
    with pytest.raises(UnknownConnector, match=r"'nixl' has no setting 'port'; it has none$"):
        settings_of(ConnectorChoice("nixl", (("port", 7),)))


class TestWhatCannotBeMade:
    """The configuration says so, whoever names it: nothing has begun to use it then."""

    LACKS = "'operators_own:Abstract' cannot be made: it lacks can_split, handoff, prefill_body"
    RAISES = f"'operators_own:Raises' cannot be made: ValueError: no, at {__file__}:"
    EVERY = pytest.mark.parametrize(("name", "problem"), [("Abstract", LACKS), ("Raises", RAISES)])

    @EVERY
    def test_of_the_fleet_and_of_instances(self, custom: str, name: str, problem: str) -> None:
        raw = fleet(connector=f"operators_own:{name}")
        raw["decode_instances"][0]["connector"] = {"type": f"operators_own:{name}"}
        with pytest.raises(ConfigError) as caught:
            parse_config(raw, "c.json")
        lines = str(caught.value).splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(f"c.json: connector: {problem}")
        assert lines[1].startswith(f"c.json: decode_instances[0].connector: {problem}")

    @EVERY
    def test_of_an_instance_that_joins(self, custom: str, name: str, problem: str) -> None:
        config = parse_config(fleet())
        item = InstanceConfig(id="p9", host="10.0.0.9", port=1, connector=f"operators_own:{name}")
        with pytest.raises(ValueError, match="connector: ") as caught:
            config.instance(InstanceRole.PREFILL, item)
        assert problem in str(caught.value)

    @EVERY
    def test_of_one_that_a_script_registers(self, custom: str, name: str, problem: str) -> None:
        router = PDRouter(parse_config(fleet()))
        before = list(router.registry)
        choice = ConnectorChoice(f"operators_own:{name}")
        joins = PDInstance("p9", InstanceRole.PREFILL, "10.0.0.9", 1, connector=choice)
        with pytest.raises(UnknownConnector) as caught:
            router.register_instance(joins)
        assert problem in str(caught.value)
        assert list(router.registry) == before
        router.register_instance(PDInstance("p9", InstanceRole.PREFILL, "10.0.0.9", 1))


class TestConfiguration:
    def problems(self, raw: dict[str, Any]) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            parse_config(raw)
        return caught.value.problems

    def test_each_instance_may_have_its_own(self, custom: str) -> None:
        config = parse_config(decode(connector={"type": custom, "port": 9}))
        p, d = config.instances()
        assert p.connector is None
        assert d.connector == ConnectorChoice(custom, (("port", 9),))

    def test_every_problem_names_its_key(self, custom: str) -> None:
        raw = fleet(connector="nope")
        raw["decode_instances"][0]["connector"] = {"type": custom, "prot": 9}
        first, second = self.problems(raw)
        assert first.startswith("connector: unknown connector 'nope'")
        assert second.startswith(f"decode_instances[0].connector: {custom!r} has no setting 'prot'")

    def test_a_key_of_the_configuration_in_a_connector(self) -> None:
        (problem,) = self.problems(fleet(connector={"type": "nixl", "metaserver_port": 9005}))
        assert problem.endswith(
            "metaserver_port is a key of the configuration, beside connector and not in it"
        )

    def test_a_connector_without_a_name(self) -> None:
        (problem, *_) = self.problems(fleet(connector={"port": 9}))
        assert "connector" in problem


class TestInUse:
    def instance(self, choice: ConnectorChoice | None = None) -> PDInstance:
        return PDInstance("p0", InstanceRole.PREFILL, "10.0.0.1", 8000, connector=choice)

    def test_that_of_the_fleet_or_its_own(self, custom: str) -> None:
        connectors = Connectors(lambda: NIXL)
        own = connectors.of(self.instance(ConnectorChoice(custom)))
        assert own is not connectors.of(self.instance())
        assert own is connectors.of(self.instance(ConnectorChoice(custom, (("port", 3),))))

    def test_an_attempt_has_a_name_of_its_own_and_the_settings(self, custom: str) -> None:
        connectors = Connectors(lambda: NIXL)
        choice = ConnectorChoice(custom, (("port", 3),))
        first, second = (
            connectors.attempt(Endpoint(self.instance(choice), "10.9.9.9:8000")) for _ in range(2)
        )
        assert first.legs.id != second.legs.id
        assert first.legs.prefill.settings == Port(3)
        assert first.legs.prefill.host == "10.9.9.9"
        assert Connectors(lambda: NIXL).attempt(Endpoint(self.instance())).legs.id != first.legs.id

    def test_only_those_of_the_p_that_there_are_say_what_can_be_split(self, custom: str) -> None:
        response = JsonBody.parse(b'{"model":"m","input":"x"}', RESPONSES)
        fleet = NIXL
        connectors = Connectors(lambda: fleet)
        assert connectors.can_split(response)
        pushing = self.instance(ConnectorChoice("nixl-push"))
        connectors.used_by([self.instance(), pushing])
        assert not connectors.can_split(response), "before a request has gone to that P"
        connectors.of(pushing)
        connectors.used_by([self.instance()])
        assert connectors.can_split(response)
        connectors.of(pushing)  # a request that is under way
        assert connectors.can_split(response)
        fleet = ConnectorChoice("nixl-push")
        connectors.used_by([self.instance()])
        assert not connectors.can_split(response)

    def test_d_say_who_needs_a_p(self, custom: str) -> None:
        nixl, sglang = self.instance(), self.instance(ConnectorChoice("sglang"))
        connectors = Connectors(lambda: NIXL)
        for partners in ([], [nixl], [nixl, sglang]):
            connectors.used_by([nixl, sglang], partners)
            assert connectors.some_need_prefill is (sglang in partners)

    def test_one_that_is_given_is_used_for_all(self, custom: str) -> None:
        given = Custom()
        connectors = Connectors(lambda: ConnectorChoice("nope"), given)
        assert connectors.of(self.instance(NIXL)) is connectors.of(None)
        assert connectors.attempt(Endpoint(self.instance(NIXL))).connector is connectors.of(None)


class WantsMore(NixlConnector):
    def __init__(self, more: int) -> None:
        pass


class NoSettings(NixlConnector):
    settings_type = None  # type: ignore[assignment]


class Picky(Settings, frozen=True):
    def __post_init__(self) -> None:
        raise ZeroDivisionError("no")


class WithPickySettings(NixlConnector):
    settings_type = Picky


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (WantsMore, "cannot be made: TypeError: .* missing 1 required positional argument: 'more'"),
        (NoSettings, r"not a subclass of vllm_pd_scheduler\.connectors\.Settings"),
        (WithPickySettings, "ZeroDivisionError: no, at .*:[0-9]+ in __post_init__"),
    ],
)
def test_one_that_cannot_be_used_is_told_before_it_is_needed(made: type, problem: str) -> None:
    name = f"{__name__}:{made.__name__}"
    with pytest.raises(ConfigError, match=f"connector: .*'{name}'.* {problem}"):
        parse_config({**fleet(), "connector": name})
