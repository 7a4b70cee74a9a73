"""The operators' commands, against a real admin server over a real socket."""

import json
import os
import pty
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from tests.support.admin_thread import AdminThread
from tests.support.certificates import make_certificates
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler import __version__
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config import ConfigError, Reloaded
from vllm_pd_scheduler.fleet.registry import UnknownInstance
from vllm_pd_scheduler.models import By, InstanceRole, InstanceState, PDInstance
from vllm_pd_scheduler.records.events import EventKind

PROGRAM = [sys.executable, "-m", "vllm_pd_scheduler"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "TOKEN", "CA_FILE"):
        monkeypatch.delenv(f"PD_SCHEDULER_{name}", raising=False)


@pytest.fixture
def admin() -> Iterator[AdminThread]:
    with AdminThread() as found:
        yield found


def call(url: str, *arguments: str, **variables: str) -> Any:
    """Run a command in this process."""
    variables.setdefault("PD_SCHEDULER_URL", url)
    return CliRunner().invoke(
        app, list(arguments), prog_name="vllm-pd-scheduler", env={"COLUMNS": "200", **variables}
    )


def done(url: str, *arguments: str, **variables: str) -> str:
    """Run a command that succeeds; return what it prints."""
    ended = call(url, *arguments, **variables)
    assert (ended.exit_code, ended.stderr) == (0, ""), ended.output
    return str(ended.stdout)


def refused(url: str, *arguments: str, status: int = 1, **variables: str) -> str:
    """Run a command that fails; return what it says."""
    ended = call(url, *arguments, **variables)
    assert (ended.exit_code, ended.stdout) == (status, ""), ended.output
    assert "Traceback" not in ended.stderr
    return str(ended.stderr).strip()


def server_context(made: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made["cert"], made["key"])
    return context


def state(admin: AdminThread, name: str) -> InstanceState:
    return admin.do(lambda: admin.router.registry.get(name).state)


class TestStatus:
    def test_for_people(self, admin: AdminThread) -> None:
        registry = admin.router.registry
        for _ in range(2):
            admin.do(lambda: registry.probed(registry.get("decode-1"), "connection refused"))
        shown = done(admin.url, "status")
        head, strategy, queue, prefill, decode, *_ = shown.splitlines()
        assert head.startswith(f"vLLM PD Scheduler {__version__}, up ")
        assert head.endswith(": ready")
        assert strategy == "strategy  least_load"
        assert queue == "queue     0 requests, 0 B; bodies held: 0 B"
        assert (prefill, decode) == ("prefill   1 of 1 can serve", "decode    1 of 2 can serve")
        rows = {line.split()[0]: line for line in shown.splitlines()[6:] if line.strip()}
        assert {"INSTANCE", "prefill-0", "decode-0", "decode-1"} <= rows.keys()
        assert rows["decode-1"].split()[1:3] == ["decode", "unhealthy"]
        assert rows["decode-1"].rstrip().endswith("connection refused")

    def test_of_a_large_fleet_those_that_need_a_look(self, admin: AdminThread) -> None:
        def grow() -> None:
            for number in range(100):
                instance = PDInstance(f"more-{number}", InstanceRole.DECODE, "10.1.0.1", 1 + number)
                admin.router.registry.probed(admin.router.registry.add(instance), None)
            admin.router.drain_instance("more-7")

        admin.do(grow)
        shown = done(admin.url, "status")
        assert "more-7 " in shown
        assert "more-8" not in shown
        assert "102 healthy instances are not shown" in shown
        assert "more-99" in done(admin.url, "status", "--all")

    def test_json_is_the_schedulers(self, admin: AdminThread) -> None:
        found = json.loads(done(admin.url, "status", "--json"))
        assert found["version"] == __version__
        assert found["roles"]["decode"] == {"total": 2, "routable": 2}

    def test_top_in_a_pipe_prints_once(self, admin: AdminThread) -> None:
        shown = done(admin.url, "top")
        assert "strategy  least_load" in shown
        assert [name for name in ("prefill-0", "decode-0", "decode-1") if name not in shown] == []


class TestSteering:
    def test_strategy(self, admin: AdminThread) -> None:
        assert done(admin.url, "strategy").startswith(
            "prefill    least_load\ndecode     least_load\nthere are"
        )
        assert done(admin.url, "strategy", "slo", "--role", "decode") == (
            "prefill    least_load\ndecode     slo\n"
        )
        assert json.loads(done(admin.url, "strategy", "weighted", "--json"))["strategy"] == "weighted"
        assert admin.do(lambda: admin.router.scheduler.strategies.name) == "weighted"

    def test_one_that_does_not_exist(self, admin: AdminThread) -> None:
        reason = refused(admin.url, "strategy", "fastest")
        assert reason.startswith("vllm-pd-scheduler: strategy: unknown strategy 'fastest'")
        assert "least_load" in reason
        assert admin.do(lambda: admin.router.scheduler.strategies.name) == "least_load"

    def test_drain_and_undrain(self, admin: AdminThread) -> None:
        registry = admin.router.registry
        running = admin.do(lambda: registry.work.reserve(registry.get("decode-0")))
        assert done(admin.url, "drain", "decode-0") == "decode-0 is draining: 1 requests are left there\n"
        assert state(admin, "decode-0") is InstanceState.DRAINING
        timer = threading.Timer(0.05, lambda: admin.do(running.release))
        timer.start()
        assert done(admin.url, "drain", "decode-0", "--wait") == "decode-0 is drained\n"
        timer.join()
        assert done(admin.url, "undrain", "decode-0") == "decode-0 (decode, 10.0.0.1:8001) is healthy\n"

    def test_a_drain_that_does_not_end(self) -> None:
        with AdminThread(drain_timeout=0.1) as admin:
            admin.do(lambda: admin.router.registry.work.reserve(admin.router.registry.get("decode-0")))
            ended = call(admin.url, "drain", "decode-0", "--wait")
            assert (ended.exit_code, ended.stdout) == (1, "decode-0 is draining: 1 requests are left there\n")
            ended = call(admin.url, "drain", "decode-0", "--wait", "--json")
            assert ended.exit_code == 1
            assert json.loads(ended.stdout)["remaining"] == {"in_flight": 1, "pending_handoffs": 0}

    def test_the_last_one_of_a_role(self, admin: AdminThread) -> None:
        for command in ("drain", "remove"):
            reason = refused(admin.url, command, "prefill-0")
            assert reason.startswith("vllm-pd-scheduler: prefill-0 is the last prefill instance")
            assert "--force" in reason
            assert state(admin, "prefill-0") is InstanceState.HEALTHY
        assert done(admin.url, "drain", "prefill-0", "--force") == "prefill-0 is drained\n"
        assert done(admin.url, "undrain", "prefill-0")
        assert done(admin.url, "remove", "prefill-0", "--force") == "prefill-0 was removed\n"
        with pytest.raises(UnknownInstance):
            state(admin, "prefill-0")

    def test_add(self, admin: AdminThread) -> None:
        shown = done(admin.url, "add", "decode-2", "10.0.0.9:8200", "--role", "decode")
        assert shown == "decode-2 (decode, 10.0.0.9:8200) is starting: not probed yet\n"
        shown = done(admin.url, "add", "decode-3", "[fd00::1]:8200", "--role", "decode", "--json")
        assert json.loads(shown)["address"] == "[fd00::1]:8200"
        assert "the id 'decode-2' is taken" in refused(
            admin.url, "add", "decode-2", "10.0.0.8:8200", "--role", "decode"
        )

    @pytest.mark.parametrize("command", ["drain", "undrain", "remove"])
    @pytest.mark.parametrize("name", ["nobody", "../strategy", "a?wait=true", "\u0661"])
    def test_an_instance_that_there_is_not(self, admin: AdminThread, command: str, name: str) -> None:
        assert refused(admin.url, command, name) == f"vllm-pd-scheduler: no instance has the id {name!r}"

    @pytest.mark.parametrize(
        "arguments",
        [
            ("add", "d", "10.0.0.1", "--role", "decode"),
            ("add", "d", ":80", "--role", "decode"),
            ("add", "d", "10.0.0.1:x", "--role", "decode"),
            ("add", "d", "10.0.0.1:80"),
            ("add", "d", "10.0.0.1:80", "--role", "both"),
            ("strategy", "--role", "decode"),
            ("strategy", "slo", "--role", "both"),
            ("drain",),
            ("explain",),
            ("events", "--limit", "0"),
            ("status", "--url", "ftp://127.0.0.1"),
            ("status", "--url", "http://"),
            ("status", "--url", "http://h:port"),
            ("status", "--url", ""),
            ("status", "--token-file", "/no/such/file"),
            ("status", "--ca-file", "/no/such/file"),
            ("status", "--ca-file", __file__),
        ],
    )
    def test_arguments_that_cannot_be(self, arguments: tuple[str, ...]) -> None:
        refused("http://127.0.0.1:1", *arguments, status=2)


class TestPast:
    def test_events(self, admin: AdminThread) -> None:
        done(admin.url, "drain", "decode-0")
        lines = done(admin.url, "events", "--limit", "2").splitlines()
        assert [line.partition("  ")[2] for line in lines] == [
            "INFO     decode-0 is draining  by admin 127.0.0.1",
            "INFO     decode-0 is drained: nothing that was sent there is left  by admin 127.0.0.1",
        ]
        found = json.loads(done(admin.url, "events", "--json"))["events"]
        assert found[0]["kind"] == "state"

    def test_what_would_steer_a_terminal_is_shown(self, admin: AdminThread) -> None:
        text = "[red]odd[/red] \x1b[2J\u202eevil"
        admin.do(lambda: admin.router.events.add(EventKind.STATE, text, by=By.PROBE))
        shown = done(admin.url, "events", "--limit", "1")
        assert r"[red]odd[/red] \x1b[2J\u202eevil" in shown

    def test_following_ends_with_ctrl_c(self, admin: AdminThread) -> None:
        command = [*PROGRAM, "events", "--follow", "--limit", "1", "--url", admin.url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as following:
            assert following.stdout is not None
            assert "decode-1 is healthy" in following.stdout.readline()
            done(admin.url, "drain", "decode-1")
            assert "decode-1 is draining" in following.stdout.readline()
            following.send_signal(signal.SIGINT)
            _, said = following.communicate(timeout=HUNG_S)
            assert (following.returncode, said) == (0, "")

    def test_following_ends_with_the_scheduler(self, admin: AdminThread) -> None:
        command = [*PROGRAM, "events", "--follow", "--json", "--url", admin.url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as following:
            assert following.stdout is not None
            while not admin.do(lambda: admin.router.events._listeners):
                pass
            admin.stop()
            _, said = following.communicate(timeout=HUNG_S)
            assert following.returncode == 3
            assert said == f"vllm-pd-scheduler: the scheduler at {admin.url} has ended the stream: it stops\n"


class TestTop:
    def test_live_until_q(self, admin: AdminThread) -> None:
        ours, its = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140", "LINES": "30"}
        command = [*PROGRAM, "top", "--url", admin.url]
        with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment) as showing:
            os.close(its)
            read_until(ours, b"least_load")
            admin.do(lambda: admin.router.scheduler.strategies.use("weighted"))
            read_until(ours, b"weighted")
            admin.stop()
            read_until(ours, b"cannot be reached")
            os.write(ours, b"q")
            assert showing.wait(HUNG_S) == 0
        os.close(ours)


def read_until(terminal: int, wanted: bytes) -> None:
    """Read what a program shows until something is there."""
    seen = b""
    while wanted not in seen:
        assert select.select([terminal], [], [], HUNG_S)[0], seen
        seen += os.read(terminal, 1 << 16)


class TestFailures:
    def test_nobody_listens(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
            for command in (["status"], ["top"], ["drain", "d"], ["events", "--follow"], ["decisions"]):
                reason = refused(url, *command, status=3)
                assert reason.startswith(f"vllm-pd-scheduler: the scheduler at {url} cannot be reached: ")
                assert reason.endswith("Give its address by --url or PD_SCHEDULER_URL")

    def test_a_host_that_there_is_not(self) -> None:
        assert "cannot be reached" in refused("http://no.such.host.invalid:1", "status", status=3)

    def test_a_wrong_token(self, tmp_path: Path) -> None:
        file = tmp_path / "token"
        file.write_text("right\n")
        with AdminThread(token="right") as admin:
            assert "--token-file or PD_SCHEDULER_TOKEN" in refused(admin.url, "status")
            assert "needs the admin token" in refused(admin.url, "status")
            assert "is not the right one" in refused(admin.url, "status", PD_SCHEDULER_TOKEN="wrong")
            assert done(admin.url, "status", PD_SCHEDULER_TOKEN="right")
            assert done(admin.url, "status", "--token-file", str(file), PD_SCHEDULER_TOKEN="wrong")
        file.write_text("two\nlines")
        assert "more than one" in refused(admin.url, "status", "--token-file", str(file), status=2)

    def test_tls(self, tmp_path: Path) -> None:
        made = make_certificates(tmp_path)
        with AdminThread(tls=server_context(made.server)) as admin:
            assert "ready" in done(admin.url, "status", "--ca-file", made.ca)
            reason = refused(admin.url, "status", status=3)
            assert reason.endswith("name its CA by --ca-file")
            assert "https://?" in refused(admin.url.replace("https", "http"), "status", status=3)
        with AdminThread() as plain:
            assert "http://?" in refused(plain.url.replace("http", "https"), "status", status=3)

    def test_an_older_scheduler(self, admin: AdminThread) -> None:
        reason = refused(admin.url, "decisions", "--url", f"{admin.url}/old")
        assert reason == (
            f"vllm-pd-scheduler: the scheduler at {admin.url}/old is older and has no GET /decisions: "
            f"this needs {__version__} or later"
        )

    @pytest.mark.parametrize(
        "answer",
        [
            web.Response(text="<html>", content_type="text/html"),
            web.Response(text="no", status=404),
            web.Response(text="{}", status=500, content_type="application/json"),
            web.Response(status=302, headers={"location": "/"}),
            web.Response(text="[]", status=400, content_type="application/json"),
        ],
    )
    def test_another_server(self, answer: web.Response) -> None:
        with AdminThread(extra={"/other/status": lambda _: answer}) as admin:
            reason = refused(admin.url, "status", "--url", f"{admin.url}/other", status=3)
        assert "is this a scheduler's admin interface?" in reason

    def test_one_that_does_not_speak_http(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 mail ready\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            assert "does not answer in HTTP" in refused(url, "status", status=3)
            thread.join()

    def test_a_reader_that_leaves(self, admin: AdminThread) -> None:
        for _ in range(900):
            admin.do(lambda: admin.router.events.add(EventKind.STATE, "x" * 200, by=By.PROBE))
        command = f"{' '.join(PROGRAM)} events --limit 1000 --url {admin.url} | head -1"
        ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=HUNG_S)
        assert ended.stdout.count("\n") == 1
        assert "Traceback" not in ended.stderr


class TestShell:
    def test_version(self) -> None:
        assert done("", "--version") == f"vllm-pd-scheduler {__version__}\n"

    def test_what_is_slow_to_load_is_not_loaded(self) -> None:
        """Each completion of a word in a shell is a start of the program."""
        code = "import sys, vllm_pd_scheduler.cli; print(*sys.modules)"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HUNG_S)
        loaded = set(ended.stdout.split())
        assert "vllm_pd_scheduler.cli" in loaded
        assert not loaded & {"aiohttp", "pydantic", "uvloop", "yaml", "google.protobuf", "prometheus_client"}

    def test_help_is_in_groups(self) -> None:
        shown = done("", "--help")
        places = [
            shown.index(f" {title} ") for title in ("Run", "serve", "Operate", "status", "Try out", "sim")
        ]
        assert places == sorted(places)

    def test_completion_knows_the_instances(self, admin: AdminThread) -> None:
        environment = {
            **os.environ,
            "_VLLM_PD_SCHEDULER_COMPLETE": "complete_bash",
            "COMP_WORDS": "vllm-pd-scheduler drain dec",
            "COMP_CWORD": "2",
        }
        for url, found in ((admin.url, ["decode-0", "decode-1"]), ("http://127.0.0.1:1", []), ("odd:", [])):
            environment["PD_SCHEDULER_URL"] = url
            ended = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, timeout=HUNG_S)
            assert (ended.stdout.split(), ended.stderr) == (found, "")


class TestReload:
    def test_it_says_what_has_changed_and_what_needs_a_restart(self) -> None:
        outcomes = [Reloaded(["strategy", "queue_size"], ["grpc_port"]), Reloaded([], [])]

        async def reload(by: str) -> Reloaded:
            assert by == "admin 127.0.0.1"
            return outcomes.pop(0)

        with AdminThread(reload=reload) as admin:
            expected = "changed: strategy, queue_size\nneeds a restart: grpc_port\n"
            assert done(admin.url, "reload") == expected
            assert json.loads(done(admin.url, "reload", "--json")) == {"changed": [], "needs_restart": []}

    def test_a_configuration_that_is_refused(self) -> None:
        async def reload(_: str) -> Reloaded:
            raise ConfigError("c.json", ["queue_sise: unknown key", "strategy: unknown"])

        with AdminThread(reload=reload) as admin:
            said = refused(admin.url, "reload")
        assert "c.json: queue_sise: unknown key; c.json: strategy: unknown" in said

    def test_a_scheduler_without_a_file(self, admin: AdminThread) -> None:
        assert "the configuration comes from no file" in refused(admin.url, "reload")


def test_turn(admin: AdminThread) -> None:
    registry = admin.router.registry
    done(admin.url, "add", "new", "10.0.0.9:8000", "--role", "decode", "--both-roles")
    admin.do(lambda: registry.probed(registry.get("new"), None))
    assert done(admin.url, "turn", "new", "--wait").strip() == "new is a prefill instance now"
    assert "change its role there" in refused(admin.url, "turn", "prefill-0")
    admin.do(lambda: registry.probed(registry.get("new"), None))
    held = admin.do(lambda: registry.work.reserve(registry.get("new")))
    assert done(admin.url, "turn", "new").strip() == (
        "new is draining, to be turned then: 1 requests are left there"
    )
    admin.do(held.release)
