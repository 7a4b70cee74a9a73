"""Sets what only an object's own methods may set, so that a test can begin where it likes."""

from typing import Any

from msgspec import Struct
from msgspec.structs import force_setattr


def give(to: Any, **values: Any) -> None:
    """Set attributes of an endpoint, a load model or a request, which are read-only."""
    for name, value in values.items():
        (force_setattr if isinstance(to, Struct) else object.__setattr__)(to, name, value)
