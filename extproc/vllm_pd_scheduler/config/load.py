"""Reads a configuration file, and reports everything that is wrong with it at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..models import InstanceRole, PDInstance
from .instances import InstanceConfig, InstancesFile, Listed
from .listeners import clashes, listeners_of
from .problems import describe_error, duplicates, find_problems
from .schema import SchedulerConfig
from .yaml_text import NotYaml, read_yaml


class ConfigError(ValueError):
    """The configuration cannot be used. ``problems`` has a line for each reason, the message all of them."""

    def __init__(self, source: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))
        self.problems = problems


Complete = Callable[[dict[str, Any]], dict[str, Any]]
"""Puts into a configuration, as ``json.loads`` returns it, what else there is to say."""


def load_config(path: str | os.PathLike[str], complete: Complete | None = None) -> SchedulerConfig:
    """Return the checked configuration of a JSON file, completed if there is more than that says.

    Raise :exc:`ConfigError` with every problem at once, each with the path of its key.
    """
    source = os.fspath(path)
    raw = _read(path)
    if complete is not None and isinstance(raw, dict):
        raw = complete(raw)
    config = parse_config(raw, source)
    if config.state_file is not None and _is_same_file(config.state_file, path):
        raise ConfigError(source, ["state_file: that is this file itself, which it would replace"])
    return config


def load_instances(path: str | os.PathLike[str]) -> InstancesFile:
    """Return the instances of a JSON or YAML file; raise :exc:`ConfigError` as :func:`load_config` does."""
    source = os.fspath(path)
    raw = _read(path, yaml=source.endswith((".yaml", ".yml")))
    if not isinstance(raw, dict):
        raise ConfigError(source, [f"must be an object, not {_json_type(raw)}"])
    try:
        found = InstancesFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            source, [describe_error(each, InstancesFile) for each in error.errors(include_url=False)]
        ) from None
    if problems := duplicates(found.listed()):
        raise ConfigError(source, problems)
    return found


def read_instances(path: str, config: SchedulerConfig) -> list[PDInstance]:
    """Return the instances in a file, with their keys; raise :exc:`ConfigError` with all that is wrong."""
    found = []
    listed = list(load_instances(path).listed())
    problems = list(clashes(listeners_of(config), listed)) if listed else []
    for role, key, item in listed:
        try:
            found.append(config.instance(role, item))
        except ValueError as error:
            problems.append(f"{key}.{error}")
    if problems:
        raise ConfigError(path, problems)
    return found


def _read(path: str | os.PathLike[str], yaml: bool = False) -> Any:
    """Return what a file holds; raise :exc:`ConfigError`."""
    source = os.fspath(path)
    try:
        content = Path(path).read_bytes()
        return read_yaml(content) if yaml else json.loads(content, object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(source, [f"cannot be read: {error.strerror}"]) from None
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        raise ConfigError(source, [problem]) from None
    except NotYaml as error:
        raise ConfigError(source, [str(error)]) from None
    except (UnicodeDecodeError, RecursionError):
        raise ConfigError(source, [f"is not UTF-8 encoded {'YAML' if yaml else 'JSON'}"]) from None
    except _DuplicateKey as error:
        raise ConfigError(source, [str(error)]) from None
    except ValueError:  # the only other one that json raises: Python reads ints of at most 4,300 digits
        raise ConfigError(source, ["a number in it has too many digits"]) from None


def parse_config(raw: Any, source: str = "configuration") -> SchedulerConfig:
    """Return the checked configuration in ``raw``, as ``json.loads`` returns it.

    ``source`` is its name in messages. Raise :exc:`ConfigError` as :func:`load_config` does.
    """
    if not isinstance(raw, dict):
        raise ConfigError(source, [f"must be a JSON object, not {_json_type(raw)}"])
    try:
        config = SchedulerConfig.model_validate(raw)
    except ValidationError as error:
        problems = [describe_error(each, SchedulerConfig) for each in error.errors(include_url=False)]
        raise ConfigError(source, problems + _problems_beside(raw, error)) from None
    if problems := find_problems(config) + _problems_of_files(config):
        raise ConfigError(source, problems)
    return config


def _problems_of_files(config: SchedulerConfig) -> list[str]:
    """Return a line for each problem of a file with instances, which names the file."""
    problems: list[str] = []
    for path in config.instance_files:
        try:
            read_instances(path, config)
        except ConfigError as error:
            problems += str(error).splitlines()
    return problems


def _problems_beside(raw: dict[str, Any], error: ValidationError) -> list[str]:
    """Return the problems of the keys that ``error`` does not name.

    pydantic stops before the checks that need the whole configuration. They are made here for what is well
    formed, so that one run shows everything.
    """
    bad = {str(detail["loc"][0]) for detail in error.errors()}
    lists = {f"{role}_instances": role for role in InstanceRole}
    listed: list[Listed] = []
    for key, role in lists.items():
        for index, item in enumerate(raw[key] if isinstance(raw.get(key), list) else []):
            if isinstance(item, dict):
                listed.append((role, f"{key}[{index}]", _mended(item, f"{key}-{index}")))
    rest = {key: value for key, value in raw.items() if key not in bad and key not in lists}
    problems = find_problems(SchedulerConfig.model_validate(rest), listed, bad)
    return [problem for problem in problems if problem.split(":")[0] not in bad]


def _mended(item: dict[str, Any], name: str) -> InstanceConfig:
    """Return an entry without what is malformed in it, so that a duplicate id beside that is found too."""
    blank = {"id": name, "host": f"{name}.invalid", "port": 1}
    try:
        return InstanceConfig.model_validate({**blank, **item})
    except ValidationError as error:
        bad = {detail["loc"][0] for detail in error.errors()}
    if bad & {"host", "port"}:  # one without the other is no address
        bad |= {"host", "port"}
    return InstanceConfig.model_validate({**blank, **{k: v for k, v in item.items() if k not in bad}})


def _is_same_file(one: str, other: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there yet
        return False


class _DuplicateKey(ValueError):
    """An object of the file has a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise :exc:`_DuplicateKey`, where ``json`` itself would take the last value."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(f"{key}: this key is given twice")
        result[key] = value
    return result


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
