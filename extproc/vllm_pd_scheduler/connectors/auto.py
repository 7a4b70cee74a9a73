"""Find out by its answers which protocol a P speaks, of those that ask for a hand-off as NIXL does.

The first request to a P asks for it as NIXL does, under a request id of its own, which pushing needs and no
other protocol minds. The answer shows the protocol, which the registry remembers, and from then on P gets
what that one needs. A P that answers without a hand-off, as with a shared store, cannot be told from one that
has no connector at all.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from ..request.body import JsonBody
from .ascend_mooncake import AscendMooncakeConnector, AscendMooncakeSettings
from .base import Handoff, Legs
from .nixl import PUSH, NixlConnector, read_handoff
from .nixl_push import TOO_LATE_S, NixlPushConnector, of_its_own, pushed

_PULLS, _PUSHES, _ASCEND, _MORIIO = "nixl", "nixl-push", "ascend-mooncake", "moriio"
_OF_MORIIO = b'"remote_notify_port"'


class AutoConnector(NixlConnector):
    """NIXL, and from P's first answer on what that shows."""

    def __init__(self) -> None:
        self._speaking: dict[str, NixlConnector] = {
            _PUSHES: NixlPushConnector(),
            _ASCEND: AscendMooncakeConnector(),
        }

    def prefill_body(self, body: JsonBody, legs: Legs) -> bytes | None:
        """Return what the protocol that P speaks needs, as far as that is known; ``None`` if that cannot.

        Raise :exc:`ValueError` for a P whose protocol must be configured.
        """
        if legs.prefill.speaks == _MORIIO:
            raise ValueError('P speaks MoRI-IO, which has settings: set its connector to "moriio"')
        known = self._speaking.get(legs.prefill.speaks)
        if known is None:
            return super().prefill_body(body, legs)
        return known.prefill_body(body, legs) if known.can_split(body) else None

    def prefill_headers(self, legs: Legs) -> Mapping[str, str]:
        """Return the headers of the protocol that P speaks; before that is known, those of pushing."""
        return of_its_own(legs) if legs.prefill.speaks in ("", _PUSHES) else super().prefill_headers(legs)

    def handoff(self, answer: bytes, legs: Legs) -> Handoff | None:
        """Return the hand-off as the protocol that P's answer shows needs it, and the name of that.

        One of a protocol that must be configured is not to be used.
        """
        found, params = read_handoff(answer, _PULLS)
        if found is None:
            if _OF_MORIIO in answer:  # what it keeps is left to its lease, and it is asked no more
                return Handoff(b"", lease=TOO_LATE_S, pinned=False, protocol=_MORIIO)
            return None
        if params.transfer_mode != PUSH and params.num_prompt_blocks:
            found = self._speaking[_ASCEND].handoff(answer, _with_defaults(legs))
            return None if found is None else replace(found, protocol=_ASCEND)
        if params.transfer_mode != PUSH:
            return found
        found = pushed(found, params, legs)
        return None if found is None else replace(found, protocol=_PUSHES)

    def release_body(self, handoff: Handoff, model: str | None) -> bytes:
        """Return the body of the release of the hand-off's own protocol."""
        speaking = self._speaking.get(handoff.protocol)
        return (
            super().release_body(handoff, model)
            if speaking is None
            else speaking.release_body(handoff, model)
        )


def _with_defaults(legs: Legs) -> Legs:
    """Return an attempt's legs with the settings that vllm-ascend has by itself."""
    return replace(legs, prefill=replace(legs.prefill, settings=AscendMooncakeSettings()))
