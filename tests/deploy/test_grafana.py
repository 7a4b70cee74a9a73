"""Grafana's dashboard asks for metrics that exist, and its files are where compose mounts them."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.test_prometheus import known_with_recorded
from tests.support.compose_file import ROOT
from tests.support.known_metrics import problems
from tests.support.waiting import HUNG_S

DIRECTORY = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((DIRECTORY / "dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
BUILT_IN = {"__rate_interval"}


def targets() -> Iterator[tuple[str, str]]:
    """The title of a panel and a query of it, with numbers for what Grafana puts in."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def filled_in(expression: str) -> str:
    """A query as Grafana sends it."""
    return re.sub(r"\$\w+", "x", expression.replace("$__rate_interval", "1m"))


@pytest.mark.parametrize(("title", "expression"), list(targets()))
def test_a_query_names_only_what_exists(title: str, expression: str) -> None:
    assert problems(filled_in(expression), known_with_recorded()) == []
    assert set(re.findall(r"\$(\w+)", expression)) <= VARIABLES.keys() | BUILT_IN


def test_promtool_can_read_every_query(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [{"record": f"panel:{n}", "expr": filled_in(expr)} for n, (_, expr) in enumerate(targets())]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "check", "rules", str(path)], capture_output=True, text=True, timeout=HUNG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_legend_names_labels_that_the_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in ", ".join(kept) or not kept, (panel["title"], label)


def test_variables_are_asked_of_metrics_that_exist() -> None:
    assert VARIABLES.keys() == {"datasource", "pod", "role", "instance"}
    known = known_with_recorded()
    for variable in VARIABLES.values():
        if variable["type"] == "query":
            (found,) = re.findall(r"^label_values\((.*), (\w+)\)$", variable["definition"])
            assert problems(f"sum by ({found[1]}) ({filled_in(found[0])})", known) == []
            assert variable["query"]["query"] == variable["definition"]


def test_every_panel_takes_the_chosen_data_source() -> None:
    for panel in PANELS:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def provisioned(path: str) -> Any:
    return yaml.safe_load((DIRECTORY / "provisioning" / path).read_text(encoding="utf-8"))


def test_compose_mounts_what_is_provisioned() -> None:
    compose = yaml.safe_load((ROOT / "deploy/compose.observability.yaml").read_text(encoding="utf-8"))
    grafana = compose["services"]["grafana"]
    mounted = {there: here for here, there, *_ in (each.split(":") for each in grafana["volumes"])}
    (provider,) = provisioned("dashboards/dashboards.yaml")["providers"]
    dashboard = f"{provider['options']['path']}/dashboard.json"
    assert mounted[dashboard] == "./grafana/dashboard.json"
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    for kind in ("datasources/prometheus.yaml", "dashboards/dashboards.yaml"):
        assert mounted[f"/etc/grafana/provisioning/{kind}"] == f"./grafana/provisioning/{kind}"
    (source,) = provisioned("datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://pod:9090"
    assert compose["services"]["prometheus"]["network_mode"] == "service:pod"
