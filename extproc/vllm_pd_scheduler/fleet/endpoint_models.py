"""Which models an endpoint serves, and which of its LoRA adapters are loaded there."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import force_setattr as _set

from ..models import ANY_MODEL


class EndpointModels(Struct, frozen=True, eq=False):
    """What an endpoint has listed, and what of it counts. Strategies can only read it."""

    configured: frozenset[str] | None
    """Those that the configuration names; ``None``: what it lists counts."""
    listed: frozenset[str] | None = None
    """Names that its ``/v1/models`` has, LoRA adapters among them; ``None``: not known."""
    names: frozenset[str] | None = None
    """Names of the models that it serves: those configured, else ``listed``; ``None``: not known."""
    adapters: frozenset[str] = frozenset()
    """Those of ``listed`` that are LoRA adapters."""
    loaded: tuple[str, ...] = ()
    """Adapters that are taken for loaded there, the one used last at the end."""
    slots: int = 1
    """How many it holds at once: as scraped, else vLLM's default for ``--max-loras``."""

    @property
    def serves_any(self) -> bool:
        """Whether it may serve a model that it does not list, as the configuration says."""
        return self.configured is not None and ANY_MODEL in self.configured

    def configure(self, models: frozenset[str] | None) -> None:
        """Take which ones the configuration names."""
        _set(self, "configured", models)
        self._name()

    def found(self, models: frozenset[str] | None, adapters: frozenset[str] = frozenset()) -> bool:
        """Note what it lists, and which of that are adapters; return whether that is a change."""
        if self.listed == models and self.adapters == adapters:
            return False
        _set(self, "listed", models)
        _set(self, "adapters", adapters)
        _set(self, "loaded", tuple(each for each in self.loaded if each in adapters))
        self._name()
        return True

    def forget(self) -> None:
        """Take nothing for listed or loaded: its process is another one."""
        self.found(None)

    def holds(self, slots: int) -> None:
        """Note how many adapters it holds at once."""
        _set(self, "slots", slots)

    def used(self, adapter: str) -> bool:
        """Note that a request uses an adapter; return whether another set is loaded now.

        vLLM holds ``slots`` of them, and replaces the one that was used the longest time ago.
        """
        before = self.loaded
        if before and before[-1] == adapter:
            return False
        _set(self, "loaded", (*(e for e in before if e != adapter), adapter)[-self.slots :])
        return adapter not in before

    def _name(self) -> None:
        """Find the names that it is known to serve."""
        configured, listed = self.configured, self.listed
        if configured is None:
            names = listed
        elif ANY_MODEL in configured:
            names = (configured - {ANY_MODEL}) | (listed or frozenset())
        else:
            names = configured
        _set(self, "names", names)
