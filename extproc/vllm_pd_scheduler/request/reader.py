"""Reads from a request's headers and body what routing may know of it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from ..prediction.load_model import FleetLoad
from . import headers as names
from .body import JsonBody
from .context import RequestContext
from .fingerprint import fingerprint, fingerprint_of_all
from .json_text import Steps
from .objectives import MAX_PRIORITY, Objectives
from .prompt import BLOCK_BYTES, read_prompt

_PRIORITY = re.compile(r"-?[0-9]{1,10}")
_MILLISECONDS = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,10})?")
"""As llm-d's clients write them."""
_MAX_NAME = 256
"""Characters of a tenant or session that count; more is cut off."""
_ASKED = frozenset(
    (
        *(names.PRIORITY, names.TENANT, names.TTFT_SLO, names.TPOT_SLO),
        *(*names.OBJECTIVE, *names.FAIRNESS_ID, *names.LLMD_TTFT_SLO, *names.LLMD_TPOT_SLO),
    )
)
"""Headers by which a client asks for something. Most ask for nothing."""


class HeaderError(ValueError):
    """A header of the client's cannot be used; the message is for the client."""


class RequestSettings(Protocol):
    """What reading a request needs of the configuration."""

    @property
    def session_header(self) -> str:
        """Name of the header that names a conversation, in lower case."""
        ...

    @property
    def ttft_slo(self) -> float | None:
        """Seconds to the first token, for a request that asks for none."""
        ...

    @property
    def tpot_slo(self) -> float | None:
        """Seconds for each further token, for a request that asks for none."""
        ...


class RequestReader:
    """Reads requests; ``fleet`` says how long their prompts and answers will be.

    Of what a client asks for, our own headers count before those of llm-d.
    """

    def __init__(self, config: RequestSettings, fleet: FleetLoad) -> None:
        self.objectives = Objectives()
        self.hash_key = secrets.randbits(64)
        """Keeps hashes of prompts apart from those of other processes, unless these have the same."""
        self._config = config
        self._fleet = fleet

    def read(
        self, path: str, headers: Mapping[str, str], body: JsonBody, now: float, *, prefixes: bool
    ) -> Steps[RequestContext]:
        """Return the context of a request whose body is read; ``prefixes``: with its prompt's hashes.

        Raises :exc:`HeaderError`.
        """
        name = body.get("model")
        model = name if isinstance(name, str) else None
        ratio = self._fleet.bytes_per_token(model)
        if prefixes:
            prompt = yield from read_prompt(body, self.hash_key)
            blocks, size, exact = prompt.blocks, prompt.size, prompt.tokens
        else:
            blocks, size, exact = (), sum(map(body.length, body.api.prompt)), None
        tokens = size / ratio if exact is None else exact
        limit, usual = body.answer_limit, self._fleet.output_tokens
        return self._context(
            path,
            headers,
            len(body.raw),
            now,
            model=model,
            prompt_bytes=size if exact is None else 0,
            prompt_tokens=tokens,
            output_tokens=usual if limit is None else min(usual, limit),
            answer_limit=limit,
            blocks=blocks,
            block_tokens=tokens * BLOCK_BYTES / max(1, size) if prefixes else 0.0,
            fingerprint=fingerprint(body),
            stream=body.wants_stream,
            session=self.session(headers, body),
        )

    def passed(
        self,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        stream: bool,
        now: float,
        model: str | None = None,
    ) -> RequestContext:
        """Return the context of a request that is not split, nor read further; raises :exc:`HeaderError`."""
        return self._context(
            path, headers, len(body), now, stream=stream, model=model, fingerprint=fingerprint_of_all(body)
        )

    def _context(
        self, path: str, headers: Mapping[str, str], size: int, now: float, **of_body: Any
    ) -> RequestContext:
        config = self._config
        context = RequestContext(
            path,
            body_bytes=size,
            headers=MappingProxyType(headers),
            ttft_slo=config.ttft_slo,
            tpot_slo=config.tpot_slo,
            arrived=now,
            now=now,
            **of_body,
        )
        if not _ASKED.isdisjoint(headers):
            context.asks(
                priority=self._priority(headers),
                tenant=(headers.get(names.TENANT) or _either(headers, names.FAIRNESS_ID) or "")[:_MAX_NAME],
                ttft_slo=_seconds(headers, names.TTFT_SLO, names.LLMD_TTFT_SLO),
                tpot_slo=_seconds(headers, names.TPOT_SLO, names.LLMD_TPOT_SLO),
            )
        return context

    def _priority(self, headers: Mapping[str, str]) -> int:
        if names.PRIORITY in headers:
            return _priority(headers[names.PRIORITY])
        objective = _either(headers, names.OBJECTIVE)
        return self.objectives.priority(objective) if objective else 0

    def session(self, headers: Mapping[str, str], body: JsonBody) -> str | None:
        """Return what the requests of its conversation have in common, if it says so."""
        if found := headers.get(self._config.session_header):
            return found[:_MAX_NAME]
        for key in ("prompt_cache_key", "user"):
            if isinstance(value := body.get(key), str):
                return value[:_MAX_NAME]
        return None


def _priority(text: str) -> int:
    value = int(text) if _PRIORITY.fullmatch(text) else MAX_PRIORITY + 1
    if abs(value) > MAX_PRIORITY:
        limits = f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        raise HeaderError(f"The header {names.PRIORITY} must be {limits}.")
    return value


def _either(headers: Mapping[str, str], wanted: tuple[str, str]) -> str | None:
    """Return the first of two headers that is there and not empty."""
    return headers.get(wanted[0]) or headers.get(wanted[1])


def _seconds(headers: Mapping[str, str], name: str, llmds: tuple[str, str]) -> float | None:
    text = headers.get(name)
    if text is None:
        # llm-d takes no notice of one that it cannot read, or that is 0.
        text = _either(headers, llmds)
        return float(text) / 1000 or None if text and _MILLISECONDS.fullmatch(text) else None
    if not (text.isascii() and text.isdigit() and int(text[:10]) > 0 and len(text) <= 10):
        raise HeaderError(f"The header {name} must be a whole number of milliseconds above 0.")
    return int(text) / 1000
