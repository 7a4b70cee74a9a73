"""Writes what is made of the Helm chart and for it: ``make docs`` runs it.

The chart's README has a table of its values, made of ``values.yaml`` and its comments. ``values.schema.json``
has the schema of the configuration, so that Helm refuses a wrong one. The kustomize bases are what
Helm renders.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.support.helm import NAMESPACE, ToolMissing, objects, template

from vllm_pd_scheduler.config import SchedulerConfig

CHART = Path(__file__).parents[1] / "deploy" / "helm" / "vllm-pd-scheduler"
README = CHART / "README.md"
SCHEMA = CHART / "values.schema.json"
VALUES = CHART / "values.yaml"
BASES = CHART.parents[1] / "kustomize"
NAME = "vllm-pd-scheduler"
"""Of all objects of the bases."""
VALUES_OF_BASES: dict[str, dict[str, Any]] = {
    "standalone": {},
    "epp": {"mode": "epp", "httpRoute": {"parentRefs": [{"name": "inference-gateway"}]}},
    "replicas": {
        "replicas": 3,
        "valkey": {"enabled": True, "existingSecret": f"{NAME}-valkey"},
        "podDisruptionBudget": {"enabled": True},
    },
}

CHARTS_OWN = (
    *("grpc_host", "grpc_port", "grpc_socket", "grpc_tls", "grpc_health_port"),
    *("admin_host", "admin_port", "admin_token", "admin_tls", "metrics_host", "metrics_port", "instance_tls"),
    "metaserver_host",
)
"""Keys of the configuration that the chart sets from other values."""

_NOT_STRUCTURE = ("title", "description", "default", "discriminator")
_HEAD = "| value | default | what it is |\n|---|---|---|\n"
_KEY = re.compile(r"( *)([A-Za-z]\w*):(.*)")


def schema(text: str) -> str:
    """Return the schema of the values, with that of the configuration as it is now."""
    values: dict[str, Any] = json.loads(text)
    config = _structure(SchedulerConfig.model_json_schema())
    values["$defs"] = config.pop("$defs")
    for key in CHARTS_OWN:
        config["properties"].pop(key, None)
    values["properties"]["config"] = config
    return json.dumps(values, indent=2) + "\n"


def _structure(schema: Any) -> Any:
    """Return a schema without what is there for readers only."""
    if isinstance(schema, list):
        return [_structure(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in _NOT_STRUCTURE}
    named = {key: kept.pop(key) for key in ("properties", "$defs") if key in kept}
    found = {key: _structure(value) for key, value in kept.items()}
    return found | {
        key: {name: _structure(value) for name, value in each.items()} for key, each in named.items()
    }


def readme(text: str) -> str:
    """Return the README with the table of the values as they are now."""
    before, _, rest = text.partition(_HEAD)
    after = re.sub(r"\A(\|.*\n)*", "", rest)
    return before + _HEAD + "".join(rows()) + after


def rows() -> Iterator[str]:
    """Yield a row for each value that has a comment, and for those in line below it."""
    values = yaml.safe_load(VALUES.read_text(encoding="utf-8"))
    path: list[str] = []
    comment: list[str] = []
    told = ""
    for line in VALUES.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
        elif not line.strip():
            comment, told = [], ""
        elif match := _KEY.fullmatch(line):
            depth = len(match[1]) // 2
            path[depth:] = [match[2]]
            told = " ".join(comment) or told
            value = values
            for key in path:
                value = value[key]
            if comment or (depth == 0 and told and match[3]):
                yield f"| `{'.'.join(path)}` | {_shown(value)} | {told} |\n"
            comment = []


def _shown(value: Any) -> str:
    return "\N{EN DASH}" if value in (None, "", [], {}) else f"`{json.dumps(value)}`"


def base(mode: str) -> dict[str, str]:
    """Return the files of a kustomize base, by name; raises :exc:`ToolMissing` without Helm."""
    done = template({**VALUES_OF_BASES[mode], "fullnameOverride": NAME}, release=NAME)
    done.check_returncode()
    found = [each for each in objects(done.stdout) if "helm.sh/hook" not in _annotations(each)]
    (config,) = (each for each in found if each["kind"] == "ConfigMap")
    found.remove(config)
    for each in found:
        _make_kustomize_s(each)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["resources.yaml"],
        "configMapGenerator": [{"name": NAME, "files": ["config.json"]}],
    }
    return {
        "config.json": config["data"]["config.json"],
        "kustomization.yaml": _WRITTEN + yaml.safe_dump(kustomization, sort_keys=False),
        "resources.yaml": _WRITTEN + yaml.safe_dump_all(found, sort_keys=False, width=110),
    }


_WRITTEN = "# Written by docs/generate_chart.py from deploy/helm. Change that and run `make docs`.\n"


def _annotations(each: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = each["metadata"].get("annotations", {})
    return found


def _make_kustomize_s(each: dict[str, Any]) -> None:
    """Take out of an object what is Helm's, and what kustomize does by itself."""
    for subject in each.get("subjects", ()):
        subject.pop("namespace")
    each["metadata"].pop("namespace")
    for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
        each["metadata"]["labels"].pop(label)
    if each["kind"] == "Deployment":
        each["spec"]["template"]["metadata"]["annotations"].pop("checksum/config")


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA.write_text(schema(SCHEMA.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        for mode in VALUES_OF_BASES:
            for name, text in base(mode).items():
                (BASES / mode / name).parent.mkdir(parents=True, exist_ok=True)
                (BASES / mode / name).write_text(text, encoding="utf-8")
    except ToolMissing as error:
        sys.exit(f"deploy/kustomize is left as it is: {error}")
