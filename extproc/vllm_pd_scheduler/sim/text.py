"""What a simulated model reads and writes: tokens of four bytes, and greedy text that is a pure function.

Every instance that has read the same prompt writes the same words, so a test can tell a right hand-off
from a wrong one by comparing texts, as one would with a real model at temperature 0.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

TOKEN_BYTES: Final = 4
_MARK: Final = 1 << (8 * TOKEN_BYTES)


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


_ADJECTIVES: Final = _words("quiet bright little ancient gentle clever golden distant patient silver curious")
_NOUNS: Final = _words(
    "river teacher engine garden lantern sailor city mountain letter orchard planet library"
)
_VERBS: Final = _words("follows carries remembers paints answers guides watches builds crosses finds")
_PLACES: Final = _words("under beside beyond near above behind across around toward past")
_SENTENCE: Final = (
    ("The", "One", "Every", "Another"),
    _ADJECTIVES,
    _NOUNS,
    _VERBS,
    ("the", "this", "that", "some"),
    _ADJECTIVES,
    _NOUNS,
    _PLACES,
    ("the", "this", "each", "its"),
    tuple(noun + "." for noun in _NOUNS),
)
# What comes of wrong KV shares no word with good text, so that one token is enough to tell them apart.
_NOISE: Final = _words("zxq vrrl bnk qwp fnord glib'h xyzz mrph tkk ooq plf jhg zzt wub kree")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine sees it: its length in tokens (at least 1) and what its KV cache is like.

    `pieces` are the bytes of its tokens: of a text four a token, of token ids one item a token.
    """

    tokens: int
    digest: str
    key: bytes = field(default=b"", repr=False, compare=False)
    pieces: bytes | Sequence[bytes] = field(default=b"", repr=False, compare=False)

    def block_hashes(self, block_size: int) -> list[int]:
        """Chained hashes of its full blocks: equal ones mean that all is equal up to there, the model too."""
        hashes: list[int] = []
        before = b""
        for at in range(self.tokens // block_size):
            data = self._bytes(at * block_size, (at + 1) * block_size)
            before = blake2b(before + data, digest_size=8, key=self.key).digest()
            hashes.append(int.from_bytes(before))
        return hashes

    def _bytes(self, start: int, stop: int) -> bytes:
        if isinstance(self.pieces, bytes):
            return self.pieces[start * TOKEN_BYTES : stop * TOKEN_BYTES]
        return b"".join(self.pieces[start:stop])


def tokenize(text: str) -> list[int]:
    """Token ids of a text, one per four bytes of UTF-8; an id holds its bytes, so no text is lost."""
    data = text.encode("utf-8", "surrogatepass")
    chunks = [data[at : at + TOKEN_BYTES] for at in range(0, len(data), TOKEN_BYTES)]
    return [int.from_bytes(b"\x01" + chunk) for chunk in chunks]


def read_prompt(model: str, prompt: str | Sequence[int]) -> Prompt:
    """Normalise a text or a list of token ids: the ids of a text count as that text."""
    pieces: bytes | list[bytes]
    if isinstance(prompt, str):
        data = pieces = prompt.encode("utf-8", "surrogatepass")
        tokens = -(-len(data) // TOKEN_BYTES)
    else:
        pieces = list(map(_token_bytes, prompt))
        data = b"".join(pieces)
        tokens = len(prompt)
    key = model.encode("utf-8", "surrogatepass")[-64:]
    return Prompt(max(1, tokens), blake2b(data, digest_size=16, key=key).hexdigest(), key, pieces)


def _token_bytes(token: int) -> bytes:
    if _MARK <= token < 2 * _MARK:
        return (token - _MARK).to_bytes(TOKEN_BYTES)
    for size in range(1, TOKEN_BYTES):
        if token >> (8 * size) == 1:
            return (token - (1 << (8 * size))).to_bytes(size)
    return b"\x00" + struct.pack(
        ">Q", token & 0xFFFF_FFFF_FFFF_FFFF
    )  # not of this tokenizer; still one prompt


def render_chat(messages: Sequence[dict[str, Any]]) -> str:
    """One prompt text from chat messages, whose content is a string or a list of parts."""
    return "".join(f"<|{m.get('role')}|>{_content(m.get('content'))}\n" for m in messages) + "<|assistant|>"


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(
            part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str) else repr(part)
            for part in content
        )
    return content if isinstance(content, str) else repr(content)


class Answer:
    """The greedy answer to a prompt, word by word; `choice` tells apart the answers of one request.

    `spoilt` is what comes out when the KV cache was some other prompt's: words of no sense, and no error.
    """

    def __init__(self, prompt: Prompt, choice: int = 0, *, spoilt: bool = False) -> None:
        self._seed = int(prompt.digest[:16], 16) + choice
        self._spoilt = spoilt

    def word(self, index: int) -> str:
        """Token `index` as text, with the space before it."""
        words = _NOISE if self._spoilt else _SENTENCE[index % len(_SENTENCE)]
        word = words[_mix(self._seed + index * 0x9E37_79B9_7F4A_7C15) % len(words)]
        return f" {word}" if index else word

    def text(self, length: int) -> str:
        """The first `length` tokens."""
        return "".join(map(self.word, range(length)))

    @property
    def natural_length(self) -> int:
        """Tokens after which the model stops by itself: 20 to 60, whole sentences."""
        return len(_SENTENCE) * (2 + _mix(self._seed) % 5)


def _mix(value: int) -> int:
    """Spread the bits of a number over 64 bits (the finaliser of SplitMix64)."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & 0xFFFF_FFFF_FFFF_FFFF
    return value ^ (value >> 31)
