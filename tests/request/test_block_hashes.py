"""Hashes of blocks: of one key, the same in all processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.json_text import finish
from vllm_pd_scheduler.request.prompt import read_prompt

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBOR" * 100}}
LONG = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBOR" * 20_000}}
TEXT = {"type": "text", "text": "What is it? " * 300}
BODIES = {
    "text": {"model": "m", "prompt": "p " * 2000},
    "ids": {"model": "m", "prompt": list(range(1000))},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "p " * 2000}]},
    "image": {"model": "m", "messages": [{"role": "user", "content": [IMAGE, TEXT]}]},
    "long image": {"model": "m", "messages": [{"role": "user", "content": [LONG, TEXT]}]},
    "salt": {"model": "m", "cache_salt": "s", "prompt": "p " * 2000},
}
SCRIPT = """
import json, sys
from tests.request.test_block_hashes import blocks
print(json.dumps(blocks(json.loads(sys.stdin.read()), 17)))
"""


def blocks(body: object, key: int) -> list[int]:
    parsed = JsonBody.parse(json.dumps(body).encode())
    return list(finish(read_prompt(parsed, key)).blocks)


@pytest.mark.parametrize("name", BODIES)
def test_all_processes_with_a_key_hash_alike(name: str) -> None:
    body = BODIES[name]
    ours = blocks(body, 17)
    assert len(ours) >= 3
    assert all(0 <= block < 1 << 60 for block in ours)
    command = [sys.executable, "-c", SCRIPT]
    other = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == ours


def test_each_key_has_its_own() -> None:
    found = [blocks(BODIES["text"], key) for key in (17, 18, 0)]
    assert not set(found[0]) & set(found[1])
    assert not set(found[0]) & set(found[2])


def test_what_extends_a_prompt_extends_its_blocks() -> None:
    short, long = ({"model": "m", "prompt": "p " * count} for count in (2000, 3000))
    assert blocks(long, 17)[: len(blocks(short, 17))] == blocks(short, 17)
    assert len({*blocks(long, 17)}) == len(blocks(long, 17))
