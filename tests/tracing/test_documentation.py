"""docs/tracing.md against the code."""

import re
from pathlib import Path

import pytest

from vllm_pd_scheduler.tracing import attributes

PAGE = (Path(__file__).parents[2] / "docs/tracing.md").read_text(encoding="utf-8")
NAMES = {value for name, value in vars(attributes).items() if name.isupper() and isinstance(value, str)}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_attribute_is_documented(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_no_other_attribute_is() -> None:
    found = re.findall(r"`((?:pd_scheduler|gen_ai|http|url|server|error)\.[a-z_.]+)`", PAGE)
    assert set(found) == NAMES
