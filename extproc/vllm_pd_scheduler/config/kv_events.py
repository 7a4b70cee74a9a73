"""KV events: where engines tell what they have cached."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..system.extras import install_command
from .instances import Port


class KvEventsConfig(BaseModel):
    """Where the engines publish their [KV events](scheduling.md#what-engines-tell); `{}`: at vLLM's port."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    port: Port = 5557
    """The port of `endpoint` in the engines' `--kv-events-config`, at each instance's `host`. That of a
    data-parallel rank is greater by the rank, as vLLM has it."""
    replay_port: Port | None = None
    """The port of their `replay_endpoint`, likewise. With it, what was lost on the way is asked for again,
    and so is what was published before the scheduler began."""
    topic: Annotated[str, Field(max_length=255)] = ""
    """How the `topic` of all of them begins."""

    def check(self) -> None:
        """Raise :exc:`ValueError` if events cannot be heard here."""
        if find_spec("zmq") is None:
            raise ValueError(f"pyzmq is not installed: `{install_command('kv-events')}` installs it")
