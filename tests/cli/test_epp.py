"""The command ``epp``: llm-d's flags, as its charts pass them, become a configuration of ours."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.certificates import make_certificates
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.cli.llmd_flags import IGNORED, REFUSED, FlagError, read_duration, read_flags
from vllm_pd_scheduler.config import ConfigError, SchedulerConfig
from vllm_pd_scheduler.config.sources import KubernetesSource

FLEET = {
    "prefill_instances": [{"id": "p0", "host": "h", "port": 1}],
    "decode_instances": [{"id": "d0", "host": "h", "port": 2}],
}
CHART = (
    "--pool-name",
    "vllm-qwen",
    "--pool-namespace",
    "llm",
    "--pool-group",
    "inference.networking.k8s.io",
    "--zap-encoder",
    "json",
    "--config-file",
    "/config/default-plugins.yaml",
    "--grpc-health-port",
    "9003",
    "--tracing=false",
)
"""What llm-d's chart passes with its values as they are."""


class Started:
    """What a command line has started, without starting it."""

    def __init__(self) -> None:
        self.config = SchedulerConfig()
        self.file: Any = None
        self.level: Any = None
        self.notes: list[str] = []
        self.error = ""

    def epp(self, *arguments: str | Path) -> int:
        self.notes.clear()
        ended = CliRunner().invoke(app, ["epp", *map(str, arguments)], prog_name="vllm-pd-scheduler")
        self.error = " ".join(ended.stderr.replace("│", " ").split())
        assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
        return ended.exit_code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Started:
    monkeypatch.delenv("NAMESPACE", raising=False)
    found = Started()

    async def serve(config: SchedulerConfig, streams: Any, file: Any) -> int:
        found.config, found.file = config, file
        return 0

    @contextmanager
    def logging_at(level: Any, kind: str) -> Iterator[None]:
        found.level = level
        with caplog.at_level(logging.INFO):
            caplog.clear()
            yield
            found.notes = [record.getMessage() for record in caplog.records if record.name.endswith("epp")]

    monkeypatch.setattr("vllm_pd_scheduler.service.run.serve", serve)
    module = importlib.import_module("vllm_pd_scheduler.cli.epp")  # the package has the command of that name
    monkeypatch.setattr(module, "logging_at", logging_at)
    return found


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(**settings: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(settings))
        return path

    return write


def test_as_the_chart_starts_it(started: Started) -> None:
    assert started.epp(*CHART) == 0, started.error
    config = started.config
    assert config.discovery == [
        KubernetesSource.model_validate({"type": "kubernetes", "namespace": "llm", "pool": "vllm-qwen"})
    ]
    assert (config.grpc_port, config.grpc_health_port, config.metrics_port) == (9002, 9003, 9090)
    assert config.grpc_host == config.metrics_host != "127.0.0.1"
    assert (config.admin_host, config.admin_port) == ("127.0.0.1", 9004)
    assert config.grpc_tls is not None
    assert config.grpc_tls.self_signed
    assert (config.log_format, config.drain_timeout, started.level) == ("json", 30.0, "INFO")
    assert started.file is None
    assert started.notes == [
        "--config-file=/config/default-plugins.yaml is ignored: it has llm-d's plugins, which do not run "
        "here: strategy and all else are in the file of --config"
    ]


def test_with_all_that_a_chart_can_be_told_to_pass(started: Started, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    for key, name in (("cert", "tls.crt"), ("key", "tls.key")):
        Path(made.server[key]).rename(tmp_path / name)
    flags = (
        "--grpc-port=9102 --grpc-health-port 9103 --metrics-port=9190 --secure-serving=true "
        f"--cert-path {tmp_path} --enable-cert-reload=true --ha-enable-leader-election --drain-timeout 1m30s "
        "--zap-encoder=console -v=5 --endpoint-selector app=vllm,tier!=x "
        "--endpoint-target-ports 8000,8001,8000 --tracing "
        "--metrics-endpoint-auth=false --health-checking=true --enable-pprof=false"
    ).split()
    assert started.epp(*flags) == 0, started.error
    config = started.config
    assert config.discovery == [
        KubernetesSource(type="kubernetes", selector="app=vllm,tier!=x", ports=[8000, 8001])
    ]
    assert (config.grpc_port, config.grpc_health_port, config.metrics_port) == (9102, 9103, 9190)
    assert config.grpc_tls is not None
    assert (config.grpc_tls.cert, config.grpc_tls.key) == (f"{tmp_path}/tls.crt", f"{tmp_path}/tls.key")
    assert (config.log_format, config.drain_timeout, started.level) == ("text", 90.0, "DEBUG")
    assert [note.partition(" is ignored: ")[0] for note in started.notes] == [
        "--ha-enable-leader-election",
        "--tracing",
    ]


def test_the_command_line_wins_over_the_file(started: Started, written: Any) -> None:
    path = written(
        **FLEET,
        grpc_port=1002,
        grpc_host="127.0.0.5",
        metrics_port=1090,
        log_format="json",
        drain_timeout=5.0,
        strategy="slo",
        prefill_leg="sidecar",
        discovery=[{"type": "kubernetes", "selector": "a=b", "ports": [1]}],
    )
    flags = ("--grpc-port", "9102", "--drain-timeout=0", "--zap-encoder=console", "--pool-name=x")
    assert started.epp("--config", path, *flags) == 0, started.error
    config = started.config
    assert (config.grpc_port, config.drain_timeout, config.log_format) == (9102, 0.0, "text")
    assert (config.metrics_port, config.grpc_host, config.strategy) == (1090, "127.0.0.5", "slo")
    assert config.prefill_leg == "sidecar"
    assert [getattr(each, "pool", None) for each in config.discovery] == [None, "x"], "both sources"
    assert [each.id for each in config.decode_instances] == ["d0"]


def test_a_file_that_is_read_again_is_completed_again(started: Started, written: Any) -> None:
    """Alone it would be no configuration, since the pool is on the command line."""
    path = written(strategy="slo")
    assert started.epp("--config", path, "--pool-name=x", "--grpc-port=9102") == 0, started.error
    path.write_text(json.dumps({"strategy": "weighted", "grpc_port": 5}))
    found = started.file.load()
    assert (found.strategy, found.grpc_port, found.discovery) == ("weighted", 9102, started.config.discovery)
    path.write_text(json.dumps({"strategy": "weighted", "grpc_prot": 5}))
    with pytest.raises(ConfigError, match="unknown key; did you mean 'grpc_port'"):
        started.file.load()


@pytest.mark.parametrize(
    ("flags", "in_file", "expected"),
    [
        ([], None, {"self_signed": True}),
        ([], {"self_signed": False}, None),
        (["--secure-serving=false"], None, None),
        (["--secure-serving=0"], {"self_signed": True}, None),
        (["-secure-serving=F"], None, None),
        (["--no-secure-serving"], None, None),
        (["--secure-serving"], None, {"self_signed": True}),
        (
            ["--secure-serving"],
            {"self_signed": True, "client_ca": "CA"},
            {"self_signed": True, "client_ca": "CA"},
        ),
    ],
)
def test_tls(
    started: Started, written: Any, tmp_path: Path, flags: list[str], in_file: Any, expected: Any
) -> None:
    ca = make_certificates(tmp_path).ca
    given_ = None if in_file is None else {k: ca if v == "CA" else v for k, v in in_file.items()}
    if given_ == {"self_signed": False}:
        given_, settings = None, {**FLEET, "grpc_tls": None}
    else:
        settings = FLEET if given_ is None else {**FLEET, "grpc_tls": given_}
    assert started.epp("--config", written(**settings), *flags) == 0, started.error
    tls = started.config.grpc_tls
    found = None if tls is None else tls.model_dump(exclude_defaults=True)
    assert found == (expected and {k: ca if v == "CA" else v for k, v in expected.items()})


def test_namespace_of_the_pod(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESPACE", "own")
    for flags, expected in (((), "own"), (("--pool-namespace=other",), "other")):
        assert started.epp("--pool-name=x", *flags) == 0, started.error
        (source,) = started.config.discovery
        assert isinstance(source, KubernetesSource)
        assert source.namespace == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--pool-name: needed, or --endpoint-selector"),
        ("--pool-name=x --endpoint-selector a=b", "--endpoint-selector: not with --pool-name"),
        ("--endpoint-selector a=b", "--endpoint-target-ports: needed with --endpoint-selector"),
        (
            "--endpoint-selector a=b --endpoint-target-ports 80,http",
            "--endpoint-target-ports: 'http' is no port",
        ),
        ("--endpoint-selector a=b --endpoint-target-ports 0", "is no port"),
        ("--pool-name=x --pool-group=inference.networking.x-k8s.io", "--pool-group: only InferencePool v1"),
        ("--pool-name=x --drain-timeout=30", "--drain-timeout: '30' is no duration like 30s"),
        ("--pool-name=x --secure-serving=maybe", "--secure-serving: 'maybe' is neither true nor false"),
        ("--pool-name=x --tracing=maybe", "--tracing: 'maybe' is neither true nor false"),
        ("--pool-name", "--pool-name: needs a value"),
        ("--pool-name=x --config-file", "--config-file: needs a value"),
        ("--pool-name=x --zap-encoder=xml", "'xml' is not one of"),
        ("--pool-name=x --grpc-port=70000", "epp: grpc_port: must be less than or equal to 65535"),
        ("--pool-name=x --grpc-port=9003", "9003 is where grpc_port listens already"),
        ("--pool-name=x --cert-path=/absent", "/absent/tls.crt cannot be read"),
        ("--pool-name=x --metrics-cert-dir=/certs", "--metrics-cert-dir: /metrics has no TLS here"),
        ("--pool-nmae=x", "No such option: --pool-nmae"),
        ("--pool-name=x stray", "unexpected extra argument"),
        ("--config=/absent.json", "/absent.json: cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said(started: Started, flags: str, words: str) -> None:
    assert started.epp(*flags.split()) == 2
    assert words in started.error


class TestFlags:
    BOOLEANS = frozenset({"secure-serving"})
    VALUED = frozenset({"pool-name", "v"})

    def read(self, *arguments: str) -> tuple[list[str], list[str]]:
        return read_flags(arguments, self.BOOLEANS, self.VALUED)

    def test_spellings(self) -> None:
        for spelling in (["--pool-name", "x"], ["-pool-name", "x"], ["--pool-name=x"], ["-pool-name=x"]):
            assert self.read(*spelling) == (["--pool-name", "x"], [])
        assert self.read("-v=4", "-v", "4") == (["--v", "4"] * 2, [])
        assert self.read("--pool-name=a=b") == (["--pool-name", "a=b"], [])
        assert self.read("--pool-name", "--x") == (["--pool-name", "--x"], []), "as Go reads it"
        for word, expected in (("true", "--"), ("T", "--"), ("1", "--"), ("false", "--no-"), ("F", "--no-")):
            assert self.read(f"--secure-serving={word}") == ([f"{expected}secure-serving"], [])

    def test_each_that_is_ignored_says_why_unless_it_asks_for_what_is_done(self) -> None:
        for name, ignored in IGNORED.items():
            if ignored.boolean:
                for value in ("true", "false"):
                    ours, notes = self.read(f"--{name}={value}")
                    assert ours == []
                    assert bool(notes) is (value != ignored.as_here), name
                assert self.read(f"--{name}") == self.read(f"--{name}=true") or self.read(f"--{name}")[1]
            else:
                for spelling in ([f"--{name}", "a b"], [f"-{name}=a b"]):
                    assert self.read(*spelling, "--pool-name=x") == (
                        ["--pool-name", "x"],
                        [f"--{name}=a b is ignored: {ignored.why}"],
                    )

    def test_each_that_would_protect_less_is_refused(self) -> None:
        for name in REFUSED:
            with pytest.raises(FlagError):
                self.read(f"--{name}=x")

    @given(
        st.lists(st.one_of(st.text(max_size=12), st.sampled_from(["--tracing", "--pool-name", "-v", "--"])))
    )
    def test_anything_is_read_or_refused(self, arguments: list[str]) -> None:
        try:
            ours, notes = self.read(*arguments)
        except FlagError:
            return
        assert len(ours) <= 2 * len(arguments)
        assert len(notes) <= len(arguments)


def test_durations() -> None:
    for text, expected in (
        ("0", 0.0),
        ("30s", 30.0),
        ("1m30s", 90.0),
        ("1h", 3600.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        (".5s", 0.5),
        ("1us", 1e-6),
    ):
        assert read_duration("f", text) == pytest.approx(expected)
    for text in ("", "30", "s", "-5s", "1 m", "1d", "1m30", "٣s", "1e3s"):
        with pytest.raises(FlagError):
            read_duration("f", text)
