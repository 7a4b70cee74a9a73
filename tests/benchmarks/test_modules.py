"""The benchmarks do not run with the tests: what they import must be there all the same."""

import importlib
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("test_*.py"))


@pytest.mark.parametrize("name", [*(file.stem for file in FILES), "kubernetes"])
def test_each_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}")
