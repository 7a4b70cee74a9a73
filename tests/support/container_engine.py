"""A Docker engine and a base image for tests, on machines that can pull nothing from a registry.

What takes long to make (the base image's files, the wheels) is kept in a cache directory outside of the
repository. Whatever a machine lacks for it ends in :exc:`Unavailable`, which says what that is.
"""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException

from tests.support.cache import cached
from tests.support.compose_file import ROOT

_SUITE, _PYTHON = "bookworm", "3.11"
"""A Debian release and the version of its Python."""

_EXTRAS = ("docker", "envoy", "kv-events", "replicas", "self-signed", "tracing")
"""What the image has besides, as the Dockerfile says."""

_NOT_NEEDED = (
    "dev/*",
    "var/cache/*",
    "var/lib/apt/lists/*",
    *(f"usr/share/{name}/*" for name in ("doc", "locale", "man")),
)
_START_S, _STOP_S, _CALL_S = 30.0, 30.0, 120
_INSTALL_S = 300.0


class Unavailable(Exception):
    """What a test with containers needs is not to be had here; the message says what and why."""


@contextmanager
def engine() -> Iterator[docker.DockerClient]:
    """Connect to the engine that runs here, or run one for as long as the context lasts.

    Images stay in an engine that was there before, as its build cache.
    """
    if (client := _running()) is not None:
        yield client
        client.close()
        return
    if os.geteuid() != 0:
        raise Unavailable("no Docker engine runs, and only root can start one")
    if shutil.which("dockerd") is None:
        raise Unavailable("no Docker engine runs, and dockerd is not installed")
    # not pytest's tmp_path: a socket's path must be short
    directory = Path(tempfile.mkdtemp(prefix="pd-docker-"))
    try:
        with _daemon(directory) as client:
            yield client
    finally:
        shutil.rmtree(directory)


def running_engine() -> Iterator[docker.DockerClient]:
    """Yield an engine's client, as a fixture does; skip the tests where none can be had."""
    try:
        with engine() as client:
            yield client
    except Unavailable as reason:
        pytest.skip(str(reason))


def _running() -> docker.DockerClient | None:
    try:
        client = docker.from_env(timeout=_CALL_S)
        client.ping()
    except DockerException:
        return None
    if not client.api.base_url.startswith("http+docker://"):
        raise Unavailable(f"the Docker engine is on another machine: {client.api.base_url}")
    return client


@contextmanager
def _daemon(directory: Path) -> Iterator[docker.DockerClient]:
    """Run an engine whose every file is in a directory, and that leaves the host's firewall alone."""
    url = f"unix://{directory}/sock"
    command = ["setpriv", "--pdeathsig", "TERM", "dockerd", "--host", url]
    command += ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"]
    command += ["--pidfile", f"{directory}/pid", "--bridge", "none"]
    command += ["--iptables=false", "--ip6tables=false", "--ip-forward=false"]
    log = directory / "log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        client = _connect(url, daemon, log)
        yield client
        client.close()
    finally:
        daemon.terminate()
        try:
            daemon.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _connect(url: str, daemon: "subprocess.Popen[bytes]", log: Path) -> docker.DockerClient:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and daemon.poll() is None:
        with suppress(DockerException):
            return docker.DockerClient(url, timeout=_CALL_S)  # asks for the API's version
        time.sleep(0.1)
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    raise Unavailable(f"dockerd does not start: {last}")


def base_image(client: docker.DockerClient, name: str) -> str:
    """Import a base image with Python, made by debootstrap where it was not before; return its name."""
    base = cached(f"{_SUITE}-python.tar", _make_base)
    client.api.import_image_from_file(str(base), repository=name, tag="latest")
    return name


def _make_base(target: Path) -> None:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise Unavailable("making a base image needs debootstrap and root")
    with tempfile.TemporaryDirectory(dir=target.parent) as root:
        include = "--include=python3,python3-venv"
        _run("debootstrap", "--variant=minbase", include, _SUITE, root)
        _run("tar", "-C", root, *(f"--exclude=./{path}" for path in _NOT_NEEDED), "-cf", str(target), ".")


def wheels() -> Path:
    """Return a directory with a wheel of everything that the image installs, and builds with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [
        *project["project"]["dependencies"],
        *itertools.chain(*(project["project"]["optional-dependencies"][extra] for extra in _EXTRAS)),
        *project["build-system"]["requires"],
    ]
    version = hashlib.sha256(" ".join([_PYTHON, *needed]).encode()).hexdigest()[:12]

    def download(target: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(target)]
        _run(*command, "--only-binary", ":all:", "--python-version", _PYTHON, *needed)

    return cached(f"wheels-{version}", download)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} did not end within {_INSTALL_S:g} s") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout).strip().rpartition("\n")[2]
        raise Unavailable(f"{' '.join(command[:4])}… failed: {last}") from None
