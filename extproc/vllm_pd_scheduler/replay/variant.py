"""What a replay compares: a strategy or preset of ours, another router's policy, or the lower bound."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import PRESETS, ConfigError, SchedulerConfig, parse_config
from ..strategies import UnknownStrategy, load_strategy, strategy_names
from .peers import PEERS, Peer

LOWER_BOUND = "lower_bound"
"""A fleet that no router can be better than: each role as one instance with the speed and cache of all of its
instances, the shortest prompt first, and steps that cost no more than their tokens."""

_STRATEGY_KEYS = ("strategy", "prefill_strategy", "decode_strategy")


@dataclass(frozen=True, slots=True)
class Sharing:
    """How many schedulers there are, and what they know of each other's requests."""

    replicas: int = 1
    delay: float | None = 0.01
    """Seconds that a message takes; ``None``: they tell each other nothing."""
    loss: float = 0.0
    """Share of the messages that are lost."""
    dies: float | None = None
    """Seconds from the start until one of them dies."""
    joins: float | None = None
    """Seconds from the start until one more joins, which knows nothing yet."""

    @property
    def label(self) -> str:
        """What there is to say of it, for people."""
        telling = "alone" if self.delay is None else f"{self.delay * 1000:g} ms"
        lost = f", {self.loss:.3g} lost" if self.loss and self.delay is not None else ""
        outages = (("dies", self.dies), ("joins", self.joins))
        return telling + lost + "".join(f", one {what} at {at:g} s" for what, at in outages if at is not None)


@dataclass(frozen=True)
class Variant:
    """A strategy and settings of the scheduler, such as ``predicted_latency+late_binding``."""

    label: str
    """As the user wrote it."""
    strategy: str
    """Name or dotted path of a strategy, a key of ``PEERS`` or :data:`LOWER_BOUND`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of the scheduler's configuration and their values."""
    sharing: Sharing = Sharing()

    def shared(self, sharing: Sharing) -> Variant:
        """Return the same for several schedulers."""
        return replace(self, label=f"{self.label} x{sharing.replicas} ({sharing.label})", sharing=sharing)

    def config(self) -> SchedulerConfig:
        """Return the scheduler's configuration, with one placeholder instance for each role.

        A peer's policy is not in it, since no name of a strategy stands for it.
        """
        config = _config(self.settings)
        if self.strategy == LOWER_BOUND:
            return config.model_copy(update={"strategy": "predicted_latency"})
        if self.strategy not in PEERS:
            return config.model_copy(update={"strategy": self.strategy})
        policy = self.policy()
        often = policy.scrape_interval_s if policy is not None else None
        if often is not None and "health_check_interval" not in self.settings:
            return config.model_copy(update={"health_check_interval": often})
        return config

    def policy(self) -> type[Peer] | None:
        """Return the policy of another router, if it has more than a choice of instances to it."""
        found = PEERS.get(self.strategy)
        return found if found is not None and issubclass(found, Peer) else None


def variant_names() -> list[str]:
    """Return the names that :func:`parse_variant` accepts: our strategies and presets, peers', the bound."""
    return [*strategy_names(), *PRESETS, *PEERS, LOWER_BOUND]


def parse_variant(text: str) -> Variant:
    """Return the variant that a user wrote as ``strategy+setting+setting=value``.

    A setting without a value is true; values are JSON, or else text. Raise :exc:`ValueError`, which says
    what is wrong.
    """
    name, *parts = (part.strip() for part in text.split("+"))
    if ":" not in name and name not in (known := variant_names()):
        raise ValueError(
            f"unknown strategy {name!r}; choose from {', '.join(known)}, or 'package.module:Class'"
        )
    settings, strategy = _settings(parts), name
    if name in PRESETS:
        settings, strategy = {"preset": name, **settings}, PRESETS[name]["strategy"]
    if name == LOWER_BOUND:
        settings = {"late_binding": True, **settings}
    elif name not in PEERS:
        try:
            load_strategy(strategy)
        except UnknownStrategy as error:
            raise ValueError(str(error)) from None
    # Beside a strategy of ours, the other role may have another one; a peer's policy has both roles.
    for key in _STRATEGY_KEYS if name in PEERS else _STRATEGY_KEYS[:1]:
        if key in settings:
            raise ValueError(f"{key}: cannot be set beside {name}")
    try:
        _config(settings)
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from None
    return Variant(text, strategy, settings)


def _settings(parts: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in parts:
        key, has_value, value = part.partition("=")
        try:
            settings[key] = json.loads(value) if has_value else True
        except ValueError:
            settings[key] = value
    return settings


def _config(settings: dict[str, Any]) -> SchedulerConfig:
    # A configuration needs an instance of each role; the run makes its own.
    prefill = {"id": "one", "host": "127.0.0.1", "port": 1}
    decode = {"id": "other", "host": "127.0.0.1", "port": 2}
    return parse_config({"prefill_instances": [prefill], "decode_instances": [decode], **settings})
