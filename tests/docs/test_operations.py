"""The runbook against the alerts, the metrics and the code's log lines."""

import ast
import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.deploy.test_prometheus import ALERTS
from tests.docs.test_docs import TEXTS, quoted, rows, section
from tests.support.compose_file import ROOT
from tests.support.known_metrics import known_series, problems

PAGE = "docs/operations.md"
CODE = ROOT / "extproc" / "vllm_pd_scheduler"
LEVELS = {"exception": "ERROR"}
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


class LogCall(NamedTuple):
    """A call in the code that logs."""

    level: str
    line: re.Pattern[str]
    where: str


def log_calls() -> Iterator[LogCall]:
    """Those whose words say what they log; some only pass on what another part of the code says."""
    for path in sorted(CODE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("log"), level), [ast.Constant(str(text)), *_]):
                    fixed = _HOLE.split(text)
                    if len(re.findall("[a-z]", "".join(fixed))) >= _LETTERS:
                        pattern = re.compile("(?s:.+?)".join(map(re.escape, fixed)))
                        where = f"{path.relative_to(CODE)}:{node.lineno}"
                        yield LogCall(LEVELS.get(level, level.upper()), pattern, where)


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
        assert [line for level, line in samples() if level == call.level and call.line.fullmatch(line)], call


def test_every_sample_is_a_log_line_of_the_code() -> None:
    calls, words = list(log_calls()), words_of_the_code()
    of_the_system = sorted({os.strerror(number) for number in errno.errorcode}, key=len, reverse=True)
    for level, line in samples():
        assert level in ("DEBUG", "INFO", "WARNING", "ERROR")
        if any(call.line.fullmatch(line) for call in calls):
            continue
        rest = line
        for text in (*of_the_system, "Name or service not known"):
            rest = rest.replace(text, "")
        said = [word.strip(",;:") for word in rest.split() if re.fullmatch(r"[a-z']+[,;:]?", word)]
        assert said, line
        assert [word for word in said if word not in words and word.split("'")[0] not in words] == [], line
