"""Tokens and text of the simulated model: a token is four bytes, and the answer a pure function of the
prompt.

So every instance answers a prompt with the same words, and a test sees by the text whether a hand-off was of
this prompt, as with a real model at temperature 0.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Final

TOKEN_BYTES: Final = 4
"""Bytes of text for each token, as with English text and today's vocabularies."""
_MARK: Final = 1 << (8 * TOKEN_BYTES)
"""Set in the id of a full token, so that leading zero bytes of its text are not lost."""


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
_SAID: Final = 1 << (8 * TOKEN_BYTES + 1)
"""Set in the id of a token of an answer: beside it, the hash of its word."""
# Text from a wrong KV cache shares no word with right text, so that one token is enough to tell them apart.
_NOISE: Final = _words("zxq vrrl bnk qwp fnord glib'h xyzz mrph tkk ooq plf jhg zzt wub kree")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt."""

    tokens: int
    """Length, at least 1."""
    digest: str
    """Identifies the prompt and the model, and so its KV cache."""
    key: bytes = field(default=b"", repr=False, compare=False)
    """Hash key: the model's name."""
    pieces: bytes | Sequence[bytes] = field(default=b"", repr=False, compare=False)
    """Bytes of the tokens: for a text its bytes, four for each token; for token ids an item for each."""

    said: int = 0
    """Tokens at the end that the model itself has answered: what follows is the rest of that answer."""
    asked: str = ""
    """``digest`` of what is before those."""

    def block_hashes(self, block_size: int, salt: str = "") -> list[int]:
        """Return chained hashes of the full blocks: equal ones mean equal model, salt and tokens so far."""
        hashes: list[int] = []
        before = salt.encode()
        for at in range(self.tokens // block_size):
            data = self._bytes(at * block_size, (at + 1) * block_size)
            before = blake2b(before + data, digest_size=8, key=self.key).digest()
            hashes.append(int.from_bytes(before))
        return hashes

    def token_ids(self) -> list[int]:
        """Return the ids of the tokens of a text."""
        return _ids(self._bytes(0, self.tokens))

    def _bytes(self, start: int, stop: int) -> bytes:
        if isinstance(self.pieces, bytes):
            return self.pieces[start * TOKEN_BYTES : stop * TOKEN_BYTES]
        return b"".join(self.pieces[start:stop])


def tokenize(text: str) -> list[int]:
    """Return the token ids of a text, one for each four bytes of UTF-8; an id contains its bytes."""
    return _ids(text.encode("utf-8", "surrogatepass"))


def _ids(data: bytes) -> list[int]:
    chunks = [data[at : at + TOKEN_BYTES] for at in range(0, len(data), TOKEN_BYTES)]
    return [int.from_bytes(b"\x01" + chunk) for chunk in chunks]


def read_prompt(model: str, prompt: str | Sequence[int]) -> Prompt:
    """Return the prompt of a text or of token ids; the ids of a text make the same prompt as the text."""
    pieces: bytes | list[bytes]
    if isinstance(prompt, str):
        data = pieces = prompt.encode("utf-8", "surrogatepass")
        tokens = -(-len(data) // TOKEN_BYTES)
    else:
        pieces = list(map(_token_bytes, prompt))
        data = b"".join(pieces)
        tokens = len(prompt)
    key = model.encode("utf-8", "surrogatepass")[-64:]
    whole = Prompt(max(1, tokens), blake2b(data, digest_size=16, key=key).hexdigest(), key, pieces)
    said = 0
    while not isinstance(prompt, str) and said < tokens and _SAID <= prompt[-1 - said] < 2 * _SAID:
        said += 1
    if not said or said == tokens:
        return whole
    asked = blake2b(whole._bytes(0, tokens - said), digest_size=16, key=key).hexdigest()
    goes_on = replace(whole, said=said, asked=asked)
    is_its_own = Answer(goes_on).ids(-said, 0) == list(prompt[tokens - said :])
    return goes_on if is_its_own else whole


def said_id(word: str) -> int:
    """Return the token id of a word of an answer."""
    return _SAID | int.from_bytes(blake2b(word.encode(), digest_size=TOKEN_BYTES).digest())


def _token_bytes(token: int) -> bytes:
    """Return the text of a token id, or other bytes for an id that :func:`tokenize` never returns."""
    if _MARK <= token < 2 * _MARK:
        return (token - _MARK).to_bytes(TOKEN_BYTES)
    for size in range(1, TOKEN_BYTES):
        if token >> (8 * size) == 1:
            return (token - (1 << (8 * size))).to_bytes(size)
    return b"\x00" + struct.pack(">Q", token & 0xFFFF_FFFF_FFFF_FFFF)


def render_chat(messages: Sequence[dict[str, Any]]) -> str:
    """Return the prompt text of chat messages, whose content is a string or a list of parts."""
    return "".join(f"<|{m.get('role')}|>{_content(m.get('content'))}\n" for m in messages) + "<|assistant|>"


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(
            part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str) else repr(part)
            for part in content
        )
    return content if isinstance(content, str) else repr(content)


class Answer:
    """The greedy answer to a prompt, one word for each token.

    ``choice`` is the number of the answer among those of one request. With ``wrong_kv`` it is what a model
    writes that decodes from another prompt's KV cache: nonsense, without any error.
    """

    def __init__(self, prompt: Prompt, choice: int = 0, *, wrong_kv: bool = False) -> None:
        self._seed = int((prompt.asked or prompt.digest)[:16], 16) + choice
        self._said = prompt.said
        self._wrong_kv = wrong_kv

    def word(self, index: int) -> str:
        """Return token ``index`` as text, with a space before it."""
        index += self._said
        words = _NOISE if self._wrong_kv else _SENTENCE[index % len(_SENTENCE)]
        word = words[_mix(self._seed + index * 0x9E37_79B9_7F4A_7C15) % len(words)]
        return f" {word}" if index else word

    def ids(self, start: int, stop: int) -> list[int]:
        """Return the token ids of some tokens: negative numbers are those at the end of the prompt."""
        return [said_id(self.word(index)) for index in range(start, stop)]

    def text(self, length: int) -> str:
        """Return the text of the first ``length`` tokens."""
        return "".join(map(self.word, range(length)))

    @property
    def natural_length(self) -> int:
        """Tokens after which the model stops by itself: 20 to 60, a whole number of sentences."""
        return max(1, len(_SENTENCE) * (2 + _mix(self._seed) % 5) - self._said)


def _mix(value: int) -> int:
    """Return a 64-bit hash of a number: the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9) & 0xFFFF_FFFF_FFFF_FFFF
    value = ((value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB) & 0xFFFF_FFFF_FFFF_FFFF
    return value ^ (value >> 31)
