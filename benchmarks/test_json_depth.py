"""What it costs to see how deeply a body is nested: the usual one, source code in a prompt, the worst."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_pd_scheduler.request import json_depth

LIMIT = 200
CODE = Path(json_depth.__file__).read_text() * 30
MIB = 1 << 20


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps({"prompt": "word " * 200}).encode(), id="1KB"),
        pytest.param(json.dumps({"messages": [{"content": CODE[:100_000]}]}).encode(), id="100KB-of-code"),
        pytest.param(b"[" + b'["[",],' * (64 * MIB // 7) + b"1]", id="64MiB-hostile"),
    ],
)
def test_nested_deeper(benchmark: Any, text: bytes) -> None:
    assert not benchmark(json_depth.nested_deeper, text, LIMIT)
