"""Which prompts D need not tokenize again: P's answer has the token ids, which D gets with the hand-off."""

from __future__ import annotations

from ..request.api import CHAT, COMPLETIONS
from ..request.body import JsonBody
from ..request.prompt import BLOCK_BYTES

MIN_BYTES = 2048
"""Of a body. To template and tokenize a shorter one takes D less than the ids take everybody on the way."""

MAX_BYTES = 4 << 20
"""A million tokens. Of more, their ids would take much of a request's way through the scheduler and Envoy."""

_OTHER_PARTS = (b'"image', b'"audio', b'"video', b'"input_', b'"file')
"""How the kinds of parts of a message begin that are no text. D must look at those itself."""


def tokens_linked(body: JsonBody) -> bool:
    """Whether the token ids of a prompt say what is cached of it: of a completion that is hashed."""
    return body.api is COMPLETIONS and BLOCK_BYTES <= len(body.raw) <= MAX_BYTES


def tokens_once(body: JsonBody) -> bool:
    """Whether P should tell the token ids of a request's prompt: of a chat of text, neither short nor huge.

    vLLM reads them in chats alone. Text that looks like another kind of part is taken for one.
    """
    if body.api is not CHAT or not MIN_BYTES <= len(body.raw) <= MAX_BYTES:
        return False
    return not any(kind in body.raw for kind in _OTHER_PARTS)
