"""What the configuration says of models: aliases, and which model a request for one gets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..request.rewrites import Rewrite, Target
from .instances import ModelName, StrictModel


class AliasConfig(StrictModel):
    """What requests get that ask for a name."""

    targets: Annotated[
        dict[ModelName, Annotated[int, Field(ge=0, le=1_000_000)]], Field(min_length=1, max_length=64)
    ]
    """The models that they get, each with its weight: `{"chat-v1": 95, "chat-v2": 5}` gives one in twenty the
    second one. One target is an alias. A weight of 0 gives a model none."""

    @model_validator(mode="after")
    def _gives_something(self) -> AliasConfig:
        if not any(self.targets.values()):
            raise ValueError("targets: at least one weight must be above 0")
        return self

    def rewrite(self, name: str) -> Rewrite:
        """Return it as a rule for the requests that ask for ``name``."""
        return Rewrite(name, [Target(model, weight) for model, weight in self.targets.items()])
