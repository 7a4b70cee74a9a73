"""Request bodies at random, with and without a hand-off of a client's, and ways to read them."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st

from vllm_pd_scheduler.connectors import Handoff, Splice
from vllm_pd_scheduler.request import body as body_module
from vllm_pd_scheduler.request import chat, pieces, stripping
from vllm_pd_scheduler.request.body import JsonBody
from vllm_pd_scheduler.request.handoff_key import ENCODED_KEY, HANDOFF_KEY
from vllm_pd_scheduler.request.json_text import finish

FIXED = settings(derandomize=True, deadline=None, max_examples=100)
PARAMS = {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_block_ids": [[1, 2]]}
HANDOFF = Handoff(json.dumps(PARAMS).encode())


@contextmanager
def in_steps() -> Iterator[None]:
    """Have bodies of any size, and prompts but the shortest, read as those that are too long for one step."""
    with (
        patch.object(body_module, "AT_ONCE_BYTES", 0),
        patch.object(stripping, "AT_ONCE_BYTES", 0),
        patch.object(chat, "AT_ONCE_BYTES", 20),
        patch.object(pieces, "AT_ONCE_BYTES", 20),
    ):
        yield


def walked(raw: bytes) -> JsonBody:
    """Parse a body of any size as those are that are too long to be decoded at once."""
    with in_steps():
        return JsonBody.parse(raw)


def strip_handoff(raw: bytes) -> bytes:
    return finish(stripping.strip_handoff(raw))


WAYS = (JsonBody.parse, walked)

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["prompt", "model", "max_tokens", "stream", "kv_transfer_param", "xkv_transfer_params", "\\u006b"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    # as a value it is a word like any other
    | st.sampled_from([HANDOFF_KEY, ENCODED_KEY, f'{{"{HANDOFF_KEY}": 1}}'])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
documents = st.dictionaries(keys, values, max_size=5)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """How ``json.dumps`` writes: compact or not, escaped or not."""
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]))
    return {
        "ensure_ascii": draw(st.booleans()),
        "separators": separators,
        "indent": draw(st.sampled_from([None, 2])),
    }


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """The key's name as JSON text, any of its letters as \\uXXXX."""
    text = ""
    for letter in draw(st.sampled_from([HANDOFF_KEY, ENCODED_KEY])):
        how = draw(st.integers(0, 2))
        text += [letter, f"\\u{ord(letter):04x}", f"\\u{ord(letter):04X}"][how]
    return f'"{text}"'


@st.composite
def poisoned(draw: st.DrawFn) -> tuple[str, Any]:
    """A document in which the key stands at some places, and the same without it."""
    chance = random.Random(draw(st.integers(0, 2**16)))
    names = draw(st.lists(spellings(), min_size=1, max_size=4))
    document = draw(documents)
    used = 0

    def write(value: Any) -> str:
        nonlocal used
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        if not isinstance(value, dict):
            return json.dumps(value)
        members = [f"{json.dumps(key)}: {write(item)}" for key, item in value.items()]
        for _ in range(chance.choice((0, 1, 1, 2))):
            members.insert(chance.randint(0, len(members)), f"{chance.choice(names)}: {json.dumps(PARAMS)}")
            used += 1
        return "{" + ",".join(members) + "}"

    text = write(document)
    if not used:
        text = f"{{{names[0]}: null" + (", " if document else "") + text[1:]
    return text, document


def without_key(value: Any) -> Any:
    """An independent reading of what must be left."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in (HANDOFF_KEY, ENCODED_KEY)}
        return {key: without_key(item) for key, item in kept.items()}
    return [without_key(item) for item in value] if isinstance(value, list) else value


def with_field(body: JsonBody, key: str, value: bytes) -> bytes:
    return Splice(*body.one_more(key, value)).into(body.raw)
