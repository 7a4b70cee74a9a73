"""Reads YAML as strictly as JSON is read: no key twice, no objects of Python's."""

from __future__ import annotations

from typing import Any

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, 10 times as fast, where it was built


class NotYaml(ValueError):
    """A text is no YAML that can be used; the message says where and why."""


class _Strict(_Loader):  # type: ignore[misc,valid-type]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; raise :exc:`NotYaml` where YAML itself would take a key's last value."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise NotYaml(f"line {key.start_mark.line + 1}: {key.value}: this key is given twice")
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def read_yaml(content: bytes) -> Any:
    """Return what YAML says; raise :exc:`NotYaml`."""
    try:
        return yaml.load(content, _Strict)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise NotYaml(f"{where}not valid YAML: {error.problem}") from None
    except yaml.YAMLError:
        raise NotYaml("is not UTF-8 encoded YAML") from None
    except NotYaml:
        raise
    except ValueError as error:  # of a date that there is not
        raise NotYaml(f"not valid YAML: {error}") from None
