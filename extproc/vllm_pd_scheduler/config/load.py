"""Reading a configuration file: all that is wrong with it is told at once."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..models import InstanceRole
from .problems import problems_of, read_problem
from .schema import InstanceConfig, Listed, SchedulerConfig


class ConfigError(ValueError):
    """The configuration cannot be used. ``problems`` has one line for each reason."""

    def __init__(self, source: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))
        self.problems = problems


def load_config(path: str | os.PathLike[str]) -> SchedulerConfig:
    """Read and check a JSON configuration file.

    Raises :exc:`ConfigError` with every problem at once, each with the path of its key.
    """
    source = os.fspath(path)
    try:
        raw = json.loads(Path(path).read_bytes(), object_pairs_hook=_no_doubles)
    except OSError as error:
        raise ConfigError(source, [f"cannot be read: {error.strerror}"]) from None
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        raise ConfigError(source, [problem]) from None
    except (UnicodeDecodeError, RecursionError):
        raise ConfigError(source, ["is not UTF-8 encoded JSON"]) from None
    except _DoubleKey as error:
        raise ConfigError(source, [str(error)]) from None
    except ValueError:  # what else json raises: Python's limit of 4,300 digits
        raise ConfigError(source, ["a number in it has too many digits"]) from None
    return parse_config(raw, source)


def parse_config(raw: Any, source: str = "configuration") -> SchedulerConfig:
    """Check a configuration that was read already (as ``json.loads`` gives it); see :func:`load_config`."""
    if not isinstance(raw, dict):
        raise ConfigError(source, [f"must be a JSON object, not {_json_type(raw)}"])
    try:
        config = SchedulerConfig.model_validate(raw)
    except ValidationError as error:
        problems = [read_problem(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(source, problems + _problems_of_the_rest(raw, error)) from None
    if problems := problems_of(config):
        raise ConfigError(source, problems)
    return config


def _problems_of_the_rest(raw: dict[str, Any], error: ValidationError) -> list[str]:
    """Check what is well-formed as a whole too, so that one run shows everything."""
    bad = {detail["loc"][0] for detail in error.errors()}
    lists = {f"{role}_instances": role for role in InstanceRole}
    listed: list[Listed] = []
    for key, role in lists.items():
        for index, item in enumerate(raw[key] if isinstance(raw.get(key), list) else []):
            with contextlib.suppress(ValidationError):
                listed.append((role, f"{key}[{index}]", InstanceConfig.model_validate(item)))
    rest = {key: value for key, value in raw.items() if key not in bad and key not in lists}
    found = problems_of(SchedulerConfig.model_validate(rest), listed)
    return [problem for problem in found if problem.split(":")[0] not in bad]


class _DoubleKey(ValueError):
    pass


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DoubleKey(f"{key}: this key is given twice")
        found[key] = value
    return found


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
