"""Which objects a selector chooses."""

from __future__ import annotations

from collections.abc import Iterator

from tests.support.kubernetes_objects import Json


def matches(found: Json, labels: str, fields: str) -> bool:
    """Whether selectors choose an object: ``a=b``, ``a!=b``, ``a in (b,c)``, ``a``; ``metadata.name=b``."""
    has = found["metadata"].get("labels") or {}
    if fields and found["metadata"]["name"] != fields.removeprefix("metadata.name="):
        return False
    for part in split_selector(labels):
        if " in " in part:
            key, _, values = part.partition(" in ")
            if has.get(key.strip()) not in values.strip("() ").split(","):
                return False
        elif "!=" in part:
            key, value = part.split("!=")
            if has.get(key) == value:
                return False
        elif "=" in part:
            key, value = part.replace("==", "=").split("=")
            if has.get(key) != value:
                return False
        elif part not in has:
            return False
    return True


def split_selector(labels: str) -> Iterator[str]:
    part = ""
    for character in labels + ",":
        if character == "," and part.count("(") == part.count(")"):
            if part:
                yield part.strip()
            part = ""
        else:
            part += character
