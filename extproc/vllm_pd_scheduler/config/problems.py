"""Finds what is wrong with a configuration, and says it in words for the person who writes it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from ..connectors import UnknownConnector
from ..models import PD_ROLES, InstanceRole, join_address
from ..strategies import UnknownStrategy, load_strategy
from .fleet_instance import check_connector, rank_count, tls_name
from .instances import ConnectorConfig, Listed, SecretSource, connector_choice
from .kv_events import KvEventsConfig
from .listeners import clashes, is_loopback, listeners_of
from .presets import hint
from .replicas import ReplicasConfig
from .schema import SchedulerConfig
from .sources import SOURCE_TYPES, source_problems
from .tls import InstanceTlsConfig, TlsConfig
from .tracing import TracingConfig
from .values import MEANING


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
    for role, key, item in items:
        problems += _unreadable(f"{key}.api_key", item.api_key)
        problems += _unknown_connector(f"{key}.connector", item.connector, role)
        try:
            if "instance_tls" not in malformed:
                tls_name(item, config.instance_tls)
            rank_count(item, config.connector, config.prefill_leg)
        except ValueError as error:
            problems.append(f"{key}.{error}")
    problems += _unreadable("api_key", config.api_key) + _unreadable("admin_token", config.admin_token)
    problems += _unreadable("grpc_tls", config.grpc_tls) + _unreadable("admin_tls", config.admin_tls)
    problems += _unreadable("instance_tls", config.instance_tls)
    problems += _unreadable("metaserver_tls", config.metaserver_tls) + _unreachable_metaserver(config, items)
    for key in ("tracing", "replicas", "kv_events"):
        problems += _unusable(key, getattr(config, key))
    problems += _kv_events_that_clash(config, items)
    problems += source_problems(config.discovery)
    if config.admin_token is None and not is_loopback(config.admin_host):
        problems.append(
            f"admin_token: needed because admin_host {config.admin_host} can be reached from other "
            'machines; give {"env": NAME} or {"file": PATH}'
        )
    if config.grpc_socket is not None and config.grpc_tls is not None:
        problems.append(
            "grpc_tls: not with grpc_socket, which only this user can open: leave one of them out"
        )
    if config.self_check_interval is not None and config.prefill_leg == "sidecar":
        problems.append(
            'self_check_interval: not with "prefill_leg": "sidecar", where the scheduler calls no P itself'
        )
    if config.encode_instances and config.prefill_leg == "sidecar":
        problems.append(
            'encode_instances: not with "prefill_leg": "sidecar", where sidecars have a stage of their own'
        )
    listeners = [listener for listener in listeners_of(config) if listener[0] not in malformed]
    problems += clashes(listeners, items)
    problems += _unusable_state_file(config.state_file)
    for role in PD_ROLES:
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
            problems.append(f"{key}: {error}{hint(name)}")
    return problems


def _unknown_connector(
    key: str, setting: str | ConnectorConfig | None, role: InstanceRole = InstanceRole.PREFILL
) -> list[str]:
    try:
        if setting is not None:
            check_connector(role, connector_choice(setting))
    except UnknownConnector as error:
        settings = {} if isinstance(setting, str | None) else setting.model_extra or {}
        beside = sorted(settings.keys() & SchedulerConfig.model_fields.keys())
        hint = (
            f". {beside[0]} is a key of the configuration, beside connector and not in it" if beside else ""
        )
        return [f"{key}: {error}{hint}"]
    return []


def _unreachable_metaserver(config: SchedulerConfig, items: Iterable[Listed]) -> list[str]:
    """Return a line if D that begin, and ask for prefills, could not do that."""
    of_all = config.connector
    for role, key, item in items:
        setting = item.connector or of_all
        name = setting if isinstance(setting, str) else setting.type
        if role is not InstanceRole.DECODE or name != "ascend-layerwise":
            continue
        if config.metaserver_port is None:
            return [
                f"metaserver_port: needed because {key} asks there for prefills; give a free port of this "
                "machine, and as metaserver_host an address that D can reach"
            ]
        here = is_loopback(config.metaserver_host) and config.metaserver_url is None
        if here and not is_loopback(item.host):
            return [
                f"metaserver_host: {config.metaserver_host} cannot be reached from {key}, {item.host}; "
                "0.0.0.0 listens on all addresses"
            ]
    return []


def _kv_events_that_clash(config: SchedulerConfig, items: Iterable[Listed]) -> list[str]:
    """Return a line for each instance whose engines could not publish and repeat KV events at its ports."""
    problems: list[str] = []
    if (of_all := config.kv_events) is None:
        return problems
    for _, key, item in items:
        port = item.kv_events_port or of_all.port
        replay, ranks = item.kv_events_replay_port or of_all.replay_port, item.data_parallel_size
        if replay is not None and abs(port - replay) < ranks:
            each = "" if ranks == 1 else f" and the {ranks - 1} after it, one for each rank"
            problems.append(
                f"{key}: its KV events have port {port}{each}, and so has their replay {replay}: give ports "
                f"that are {ranks} apart at least"
            )
    return problems


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


def _unusable(key: str, section: TracingConfig | ReplicasConfig | KvEventsConfig | None) -> list[str]:
    try:
        if section is not None:
            section.check()
    except ValueError as error:
        return [f"{key}: {error}"]
    return []


def describe_error(detail: Any, within: type[BaseModel] | None = None) -> str:
    """Return a line for one entry of pydantic's ``errors()``: the key's path, then what is wrong.

    With ``within``, the model that was read, an unknown key is told with the one that was meant, if any is
    like it.
    """
    loc, kind = list(detail["loc"]), detail["type"]
    if kind == "extra_forbidden":
        text = "unknown key" + _closest(str(loc[-1]), _known_keys(within, loc[:-1]))
    elif kind == "missing":
        text = "missing"
    else:
        text = _what_is_wrong(kind, str(detail["msg"]), detail.get("ctx", {}))
    if loc[:1] == ["discovery"]:
        del loc[2:3]  # which kind of source it is, which the entry says itself
    if loc and loc[-1] == "[key]":
        text = f"the key {loc[-2]!r} {text}"
        loc = loc[:-2]
    if kind.startswith("union_tag"):
        loc.append("type")
    path = _path(loc)
    return f"{path}: {text}" if path else text


def _path(loc: Iterable[str | int]) -> str:
    path = ""
    for part in loc:
        name = repr(part) if isinstance(part, str) and not part.isprintable() else str(part)
        path += f"[{name}]" if isinstance(part, int) else f".{name}" if path else name
    return path


def _what_is_wrong(kind: str, message: str, context: Mapping[str, Any]) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch" and context["pattern"] in MEANING:
        return MEANING[context["pattern"]]
    if kind == "model_type" and context["class_name"] == SecretSource.__name__:
        return 'must be {"env": NAME} or {"file": PATH}'
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a JSON object"
    if kind == "union_tag_invalid":
        return f"must be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"missing; one of {', '.join(map(repr, SOURCE_TYPES))}"
    if kind in ("too_short", "string_too_short"):
        return (
            "must not be empty"
            if context["min_length"] == 1
            else f"must have {context['min_length']} or more"
        )
    meant = message.removeprefix("Input should be ")
    return f"must be {meant}" if meant != message else message


def _known_keys(within: type[BaseModel] | None, loc: Iterable[str | int]) -> Iterable[str]:
    """Return the keys that the object at ``loc`` may have."""
    models = [] if within is None else [within]
    for part in loc:
        if fields := [each.model_fields[part] for each in models if part in each.model_fields]:
            models = [model for each in fields for model in _models_in(each.annotation)]
        elif chosen := [each for each in models if _type_of(each) == part]:
            models = chosen
    return [key for each in models for key in each.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that a type has in it: those of a list, of a union, of values of an object."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in _models_in(each)]


def _type_of(model: type[BaseModel]) -> str | None:
    """Return the ``type`` that objects of a model must have, if there is one alone."""
    field = model.model_fields.get("type")
    names = () if field is None else get_args(field.annotation)
    return names[0] if names else None


def _closest(key: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean {match[0]!r}?" if match else ""
