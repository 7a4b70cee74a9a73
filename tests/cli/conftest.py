"""What all tests of the command line need."""

import pytest


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the terminal's width, which pytest-xdist tells its workers: output goes to a pipe here."""
    monkeypatch.delenv("COLUMNS", raising=False)
