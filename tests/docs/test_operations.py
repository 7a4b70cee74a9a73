"""The runbook against the alerts, the metrics and the code's log lines."""

import ast
import errno
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import typer.main

from tests.deploy.test_prometheus import ALERTS
from tests.docs.test_docs import TEXTS, quoted, rows, section
from tests.support.compose_file import ROOT
from tests.support.known_metrics import known_series, problems
from vllm_pd_scheduler.admin import AdminServer
from vllm_pd_scheduler.cli import app
from vllm_pd_scheduler.config import SchedulerConfig
from vllm_pd_scheduler.router import PDRouter

PAGE = "docs/operations.md"
CODE = ROOT / "extproc" / "vllm_pd_scheduler"
LEVELS = {"exception": "ERROR"}
SAYING = {"_add", "_warn", "complain", "say"}
"""Methods that log a text that they are given."""
ANY = {"DEBUG", "INFO", "WARNING", "ERROR"}
_HOLE = re.compile(r"%[-#0 +]*\d*(?:\.\d+)?[a-z]")
_LETTERS = 8
"""Least fixed letters by which a line of the log can be told from others."""


def alerts() -> dict[str, str]:
    """The text of each section, by the alert that it is named after."""
    parts = re.split(r"\n### (\w+)\n", section(PAGE, "## Alerts"))[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    assert sorted(alerts()) == sorted(ALERTS)


@pytest.mark.parametrize("name", alerts())
def test_a_section_leads_from_the_symptom_by_metrics_to_what_to_do(name: str) -> None:
    text = alerts()[name]
    intro, *parts = re.split(r"\n- \*\*(Clients|Look at|Do):\*\* ", text)
    assert parts[::2] == ["Clients", "Look at", "Do"]
    assert all(parts[1::2])
    assert f"({ALERTS[name]['labels']['severity']})" in intro
    assert [word for word in quoted(parts[3]) if re.match(r"(pd_scheduler|envoy|vllm:|process|up\b)", word)]


def test_every_metric_exists() -> None:
    known = known_series()
    for kind in ("_bucket", "_count", "_sum"):  # a histogram is named as a whole
        known |= {name.removesuffix(kind): labels for name, labels in known.items() if name.endswith(kind)}
    named = [
        word for word in quoted(TEXTS[PAGE]) if re.match(r"(pd_scheduler|envoy|process)_|vllm:|up\{", word)
    ]
    assert len(named) > 50
    for expression in named:
        assert problems(expression, known) == [], expression


def test_every_command_and_every_request_exists() -> None:
    group: Any = typer.main.get_command(app)
    commands = set(re.findall(r"`vllm-pd-scheduler ([a-z][a-z-]*)", TEXTS[PAGE]))
    assert commands <= set(group.commands)
    assert len(commands) > 8
    server = AdminServer(PDRouter(SchedulerConfig()), is_ready=lambda: True)
    real = {
        f"{route.method} {route.resource.canonical}"
        for route in server.application().router.routes()
        if route.resource is not None
    }
    requests = re.findall(r"(?:GET|PUT|POST|DELETE) /[a-z{}/-]*", section(PAGE, "## First look"))
    assert set(requests) <= real
    assert len(set(requests)) > 8


class LogCall(NamedTuple):
    """A call in the code that logs."""

    levels: set[str]
    line: re.Pattern[str]
    where: str

    def makes(self, level: str, line: str) -> bool:
        return level in self.levels and self.line.fullmatch(line) is not None


def log_calls() -> Iterator[LogCall]:
    """Those whose words say what they log; some only pass on what another part of the code says."""
    for path in sorted(CODE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("log"), level), [ast.Constant(str(text)), *_]):
                    levels, parts = {LEVELS.get(level, level.upper())}, _HOLE.split(text)
                case ast.Call(ast.Attribute(_, method), arguments) if method in SAYING or is_event(node):
                    levels, parts = ANY, max(map(fixed_parts, arguments), key=letters, default=[])
                case _:
                    continue
            if letters(parts) >= _LETTERS:
                words = "(?s:.+?)".join(map(re.escape, parts))
                # The id of an instance may come before, and who did it after.
                line = re.compile(rf"(?:\S+ )?{words}(?: \(by .+\))?")
                yield LogCall(levels, line, f"{path.relative_to(CODE)}:{node.lineno}")


def is_event(call: ast.Call) -> bool:
    match call:
        case ast.Call(ast.Attribute(_, "add"), [ast.Attribute(ast.Name("EventKind")), *_]):
            return True
    return False


def fixed_parts(node: ast.expr) -> list[str]:
    """What is fixed in a string, between the values that are put in; nothing if it is no string."""
    match node:
        case ast.Constant(str(text)):
            return [text] if " " in text else []  # a single word is a name
        case ast.JoinedStr(values):
            return "".join(
                str(each.value) if isinstance(each, ast.Constant) else "\0" for each in values
            ).split("\0")
    return []


def letters(parts: list[str]) -> int:
    return len(re.findall("[a-z]", "".join(parts)))


def words_of_the_code() -> set[str]:
    """All words in strings of the code, docstrings left out."""
    words: set[str] = set()
    for path in CODE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                words.update(re.findall("[a-z]+", node.value))
    return words


def samples() -> list[tuple[str, str]]:
    """Level and line."""
    found = [row for row in rows(section(PAGE, "## Log lines")) if len(row) == 3]
    return [(level, line.strip("`").replace(r"\|", "|")) for level, line, _ in found]


def test_every_log_line_of_the_code_has_a_sample() -> None:
    calls = list(log_calls())
    assert len(calls) > 25
    for call in calls:
        assert any(call.makes(*sample) for sample in samples()), call


def test_every_sample_is_a_log_line_of_the_code() -> None:
    calls, words = list(log_calls()), words_of_the_code()
    of_the_system = sorted({os.strerror(number) for number in errno.errorcode}, key=len, reverse=True)
    for level, line in samples():
        assert level in ANY
        if any(call.makes(level, line) for call in calls):
            continue
        rest = re.sub(r" \(by .+\)$", "", line)
        for text in (*of_the_system, "Name or service not known"):
            rest = rest.replace(text, "")
        said = [word.strip(",;:") for word in rest.split() if re.fullmatch(r"[a-z']+[,;:]?", word)]
        assert said, line
        assert [word for word in said if word not in words and word.split("'")[0] not in words] == [], line
