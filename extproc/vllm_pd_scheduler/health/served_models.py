"""Read which models an instance serves, and find the instances that serve others than their peers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ..fleet.endpoint import Endpoint
from ..fleet.registry import Registry
from ..models import InstanceRole

log = logging.getLogger(__name__)

MAX_MODELS = 4096
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_SHOWN = 8


class NotAListOfModels(ValueError):
    """``/v1/models`` answers with something else; ``args[0]`` says what is wrong."""


class _Model(msgspec.Struct):
    id: _Name
    parent: Any = None


class _Models(msgspec.Struct):
    data: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_MODELS)]


_decode = msgspec.json.Decoder(_Models).decode
_decode_model = msgspec.json.Decoder(_Model).decode


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What an instance lists."""

    names: frozenset[str]
    """The base model's, all of them, and LoRA adapters'."""
    adapters: frozenset[str]
    """Those that have a parent."""
    cards: Mapping[str, bytes]
    """What it says of each, as it says it: JSON."""


def parse_models(body: bytes) -> ServedModels:
    """Return what is in an answer to ``GET /v1/models``; raises :exc:`NotAListOfModels`."""
    try:
        cards = [(_decode_model(raw), bytes(raw)) for raw in _decode(body).data]
        body.decode()  # what nobody has looked at goes to clients
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise NotAListOfModels(f"it is not a list of models: {error}") from None
    return ServedModels(
        frozenset(model.id for model, _ in cards),
        frozenset(model.id for model, _ in cards if model.parent),
        {model.id: card for model, card in cards},
    )


class OddOnes:
    """Says who serves other models than its peers, once for each change."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._odd: dict[Endpoint, str] = {}
        """As it was last said."""

    def compare(self) -> None:
        """Look at what all instances list now."""
        odd = dict(odd_ones(self._registry))
        for endpoint, difference in odd.items():
            if self._odd.get(endpoint) != difference:
                log.warning(
                    "%s does not serve the models of most %s instances: it %s",
                    endpoint.instance.instance_id,
                    endpoint.instance.role,
                    difference,
                )
        for endpoint in self._odd.keys() - odd.keys():
            if endpoint in self._registry and endpoint.models.listed is not None:
                log.info("%s serves the models of its role again", endpoint.instance.instance_id)
        self._odd = odd


def odd_ones(registry: Registry) -> Iterator[tuple[Endpoint, str]]:
    """Yield who serves other models than most of its role, and in words which, where none are configured.

    Where no set is served by more than any other, that of the first endpoint counts.
    """
    for role in InstanceRole:
        firsts = (ranks[0] for ranks in registry.instances())
        endpoints = (e for e in firsts if e.instance.role is role and e.instance.models is None)
        known = [(each, each.models.listed) for each in endpoints if each.models.listed is not None]
        if not known:
            continue
        usual = Counter(models for _, models in known).most_common(1)[0][0]
        yield from ((each, _difference(models, usual)) for each, models in known if models != usual)


def _difference(models: frozenset[str], usual: frozenset[str]) -> str:
    lacking, more = usual - models, models - usual
    parts = [f"lacks {_listed(lacking)}"] if lacking else []
    parts += [f"has {_listed(more)}"] if more else []
    return " and ".join(parts)


def _listed(models: frozenset[str]) -> str:
    names = [repr(name[:100]) for name in sorted(models)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
