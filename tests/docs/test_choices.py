"""What the guide says that each way to choose is worth is what was run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import choices

DOCS = Path(__file__).parents[2] / "docs"
RUNS = "docs/figures/choices.jsonl"


def commands() -> list[str]:
    """Return the options of each command on the page that prints a table of runs that are there."""
    begins = "$ python -m benchmarks.choices "
    lines = (DOCS / "scheduling.md").read_text().splitlines()
    return [line.removeprefix(begins) for line in lines if line.startswith(begins) and RUNS in line]


def test_there_are_commands() -> None:
    assert len(commands()) >= 3


@pytest.mark.parametrize("options", [each for each in commands() if "--full" not in each])
def test_tables(options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(DOCS.parent)
    monkeypatch.setattr("sys.argv", ["choices", *options.split()])
    choices.main()
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") > 1
    assert printed in (DOCS / "scheduling.md").read_text(), "print it anew, and paste it"
