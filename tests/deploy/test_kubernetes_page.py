"""docs/kubernetes.md: its values are ones of the chart, and its objects what Helm makes of them."""

import json
import re
from typing import Any

import pytest
import yaml
from docs.generate_chart import NAME

from tests.support.compose_file import ROOT
from tests.support.helm import ToolMissing, objects, template, tool
from tests.support.kubernetes_schema import check_schema, the_only

PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.*?)$\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def values_in(text: str) -> list[dict[str, Any]]:
    found = [block for block in blocks(text, "yaml") if block.startswith("# values.yaml")]
    return [yaml.safe_load(block) for block in found]


def shown_in(text: str) -> list[dict[str, Any]]:
    """The objects that a section shows, but the gateway, which is not the chart's."""
    found = [each for block in blocks(text, "yaml") for each in objects(block)]
    return [each for each in found if each.get("kind") not in (None, "Gateway", "Kustomization")]


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        tool("helm")
    except ToolMissing as error:
        pytest.skip(str(error))
    done = template(values, release=NAME)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


ALL_VALUES = [(title, values) for title, text in SECTIONS for values in values_in(text)]


@pytest.mark.parametrize(("title", "values"), ALL_VALUES, ids=[title for title, _ in ALL_VALUES])
def test_the_values_are_the_charts(title: str, values: dict[str, Any]) -> None:
    check_schema(render(values))


@pytest.mark.parametrize("title", ["Standalone", "Behind a gateway"])
def test_the_objects_are_what_helm_makes_of_them(title: str) -> None:
    text = dict(SECTIONS)[title]
    (values,) = values_in(text)
    made = render(values)
    shown = shown_in(text)
    assert shown
    for each in shown:
        real = the_only(made, each["kind"])
        del real["metadata"]["labels"]
        assert real == each


def test_the_configuration_is_the_one_in_the_config_map() -> None:
    text = dict(SECTIONS)["Standalone"]
    (values,), (shown,) = values_in(text), blocks(text, "json")
    assert json.loads(the_only(render(values), "ConfigMap")["data"]["config.json"]) == json.loads(shown)


def test_all_of_the_scheduler_s_objects_are_shown() -> None:
    """What carries a request behind a gateway; pods and their account are said in words."""
    text = dict(SECTIONS)["Behind a gateway"]
    (values,) = values_in(text)
    in_words = {"ConfigMap", "Deployment", "Pod", "RoleBinding", "ServiceAccount"}
    made = {each["kind"] for each in render(values)} - in_words
    assert made == {each["kind"] for each in shown_in(text)}
