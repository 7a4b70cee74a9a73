"""Finds what is wrong with a configuration, and says it in words for the person who writes it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable
from typing import Any

from pydantic import BaseModel

from ..connectors import UnknownConnector, settings_of
from ..models import InstanceRole, join_address
from ..strategies import UnknownStrategy, load_strategy
from .instances import ConnectorConfig, InstanceConfig, Listed, SecretSource, connector_choice
from .listeners import clashes, listeners_of
from .schema import MEANING, SchedulerConfig, is_loopback
from .sources import source_problems
from .tls import InstanceTlsConfig, TlsConfig
from .tracing import TracingConfig


def find_problems(
    config: SchedulerConfig, listed: Iterable[Listed] | None = None, malformed: Collection[str] = ()
) -> list[str]:
    """Return a line for each problem that only the whole configuration, or this machine, shows.

    Such are duplicate ids and addresses, unknown strategies, secrets that cannot be read and an admin port
    that is open to others without a token. For a file in which something is malformed, ``listed`` replaces
    its instances, and ``malformed`` has the keys whose values are not known.
    """
    problems = _unknown_strategies(config) + _unknown_connector("connector", config.connector)
    items = list(config.listed() if listed is None else listed)
    problems += duplicates(items)
    for _, key, item in items:
        problems += _unreadable(f"{key}.api_key", item.api_key)
        problems += _unknown_connector(f"{key}.connector", item.connector)
        try:
            if "instance_tls" not in malformed:
                config.tls_name(item)
        except ValueError as error:
            problems.append(f"{key}.{error}")
    problems += _unreadable("api_key", config.api_key) + _unreadable("admin_token", config.admin_token)
    problems += _unreadable("grpc_tls", config.grpc_tls) + _unreadable("admin_tls", config.admin_tls)
    problems += _unreadable("instance_tls", config.instance_tls)
    problems += _untraceable(config.tracing) + source_problems(config.discovery)
    if config.admin_token is None and not is_loopback(config.admin_host):
        problems.append(
            f"admin_token: needed because admin_host {config.admin_host} can be reached from other "
            'machines; give {"env": NAME} or {"file": PATH}'
        )
    if config.grpc_socket is not None and config.grpc_tls is not None:
        problems.append(
            "grpc_tls: not with grpc_socket, which only this user can open: leave one of them out"
        )
    listeners = [listener for listener in listeners_of(config) if listener[0] not in malformed]
    problems += clashes(listeners, items)
    problems += _unusable_state_file(config.state_file)
    for role in InstanceRole:
        elsewhere = config.instance_files or config.discovery or "discovery" in malformed
        if not elsewhere and not any(role is item_role for item_role, _, _ in items):
            problems.append(
                f'{role}_instances: there are none; list at least one {{"id": …, "host": …, "port": …}}'
            )
    return problems


def _unknown_strategies(config: SchedulerConfig) -> list[str]:
    problems = []
    for key in ("strategy", "prefill_strategy", "decode_strategy", "shadow_strategy"):
        name = getattr(config, key)
        try:
            if name is not None:
                load_strategy(name)
        except UnknownStrategy as error:
            problems.append(f"{key}: {error}")
    return problems


def _unknown_connector(key: str, setting: str | ConnectorConfig | None) -> list[str]:
    try:
        if setting is not None:
            settings_of(connector_choice(setting))
    except UnknownConnector as error:
        return [f"{key}: {error}"]
    return []


def duplicates(items: Iterable[Listed]) -> list[str]:
    """Return a line for each id and each address that is given twice."""
    problems: list[str] = []
    ids: dict[str, str] = {}
    addresses: dict[tuple[str, int], str] = {}
    for _, key, item in items:
        if (first := ids.setdefault(item.id, key)) != key:
            problems.append(f"{key}.id: {item.id!r} is the id of {first} already")
        if (first := addresses.setdefault((item.host.removesuffix("."), item.port), key)) != key:
            address = join_address(item.host, item.port)
            problems.append(f"{key}: {address} is the address of {first} already")
    return problems


def _unusable_state_file(state_file: str | None) -> list[str]:
    if state_file is None:
        return []
    directory = os.path.dirname(os.path.abspath(state_file))
    if os.path.lexists(state_file) and not os.path.isfile(state_file):
        return [f"state_file: {state_file} is not a file"]
    if not os.path.isdir(directory):
        return [f"state_file: there is no directory {directory}"]
    if not os.access(directory, os.W_OK | os.X_OK):
        return [f"state_file: the directory {directory} is not writable"]
    if os.path.ismount(state_file):
        return [f"state_file: {state_file} is mounted itself and cannot be replaced: mount {directory}"]
    return []


def _unreadable(key: str, source: SecretSource | TlsConfig | InstanceTlsConfig | None) -> list[str]:
    if source is None:
        return []
    try:
        source.read() if isinstance(source, SecretSource) else source.context()
    except ValueError as error:
        return [f"{key}: {error}"]
    return []


def _untraceable(tracing: TracingConfig | None) -> list[str]:
    try:
        if tracing is not None:
            tracing.check()
    except ValueError as error:
        return [f"tracing: {error}"]
    return []


def describe_error(detail: Any) -> str:
    """Return a line for one entry of pydantic's ``errors()``: the key's path, then what is wrong."""
    path = ""
    for depth, part in enumerate(detail["loc"]):
        if depth == 2 and detail["loc"][0] == "discovery":
            continue  # which kind of source it is, which the entry says itself
        name = part if isinstance(part, int) or part.isprintable() else repr(part)
        path += f"[{name}]" if isinstance(part, int) else f".{name}" if path else name
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = SchedulerConfig if len(detail["loc"]) == 1 else None
        hint = _closest(str(detail["loc"][-1]), known)
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        return f"{path}: missing"
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "string_pattern_mismatch" and context["pattern"] in MEANING:
        text = MEANING[context["pattern"]]
    elif kind == "model_type":
        secret = context["class_name"] == SecretSource.__name__
        text = "must be " + ('{"env": NAME} or {"file": PATH}' if secret else "a JSON object")
    else:
        message = str(detail["msg"]).removeprefix("Input should be ")
        text = f"must be {message}" if message != detail["msg"] else message
    return f"{path}: {text}" if path else text


def _closest(key: str, model: type[BaseModel] | None) -> str:
    names = list(model.model_fields) if model else list(InstanceConfig.model_fields)
    match = difflib.get_close_matches(key, names, 1)
    return f"; did you mean {match[0]!r}?" if match else ""
