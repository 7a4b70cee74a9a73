"""The kustomize bases, by the real kubectl: they are what Helm renders, and can be laid over."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import generate_chart
from tests.support.helm import NAMESPACE, ToolMissing, objects, run, tool
from tests.support.kubernetes_schema import check_schema, containers, the_only
from vllm_pd_scheduler.config import parse_config

NAME = generate_chart.NAME
MODES = sorted(generate_chart.VALUES_OF_BASES)


@pytest.fixture(autouse=True)
def _tools() -> None:
    try:
        tool("kubectl")
    except ToolMissing as error:
        pytest.skip(str(error))


def built(directory: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization."""
    done = run("kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(directory))
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


@pytest.mark.parametrize("mode", MODES)
def test_a_base_is_up_to_date(mode: str) -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in (generate_chart.BASES / mode).iterdir()}
    assert found == generate_chart.base(mode), "stale: run `make docs`"


@pytest.mark.parametrize("mode", MODES)
def test_a_base_is_accepted(mode: str, tmp_path: Path) -> None:
    found = built(generate_chart.BASES / mode)
    check_schema(found)
    assert {each["metadata"]["namespace"] for each in found} == {NAMESPACE}
    config = the_only(found, "ConfigMap")["data"]["config.json"]
    (tmp_path / "valkey").mkdir()
    (tmp_path / "valkey" / "password").write_text("s3cret")
    parse_config(json.loads(config.replace("/etc/vllm-pd-scheduler", str(tmp_path))))


def test_a_layer_has_its_own_namespace_image_and_configuration(tmp_path: Path) -> None:
    layer = {
        "namespace": "team",
        "resources": ["base"],
        "images": [{"name": NAME, "newName": "registry.example/pd", "newTag": "1"}],
        "configMapGenerator": [{"name": NAME, "behavior": "replace", "files": ["config.json"]}],
    }
    (tmp_path / "base").symlink_to(generate_chart.BASES / "standalone")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(layer))
    found = built(tmp_path)
    assert {each["metadata"]["namespace"] for each in found} == {"team"}
    assert the_only(found, "RoleBinding")["subjects"][0]["namespace"] == "team"
    pod = the_only(found, "Deployment")["spec"]["template"]["spec"]
    assert {each["image"] for each in containers(pod)} == {"registry.example/pd:1"}
    config = the_only(found, "ConfigMap")
    assert config["data"] == {"config.json": "{}"}
    (volume,) = [each for each in pod["volumes"] if each["name"] == "config"]
    assert volume["configMap"]["name"] == config["metadata"]["name"] != NAME  # another one: new pods
