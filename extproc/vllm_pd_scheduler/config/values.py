"""What values of the configuration may be, and what is said of one that may not."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from ..request.path import PUBLIC_PATH
from .instances import INSTANCE_ID, is_host
from .replicas import FLEET_KEY, REPLICA_NAME

WEEK_S = 604_800
Seconds = Annotated[float, Field(ge=0.001, le=WEEK_S)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Revision = Annotated[str, Field(max_length=128)]
Probes = Annotated[int, Field(ge=1, le=1000)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]

HEADER = r"^[a-z0-9-]{1,100}$"
PATH = r"^[^\x00]+$"
BASE_URL = r"^https?://[^\s/?#@\"\\]+$"
SOCKET = r"^/[^\x00]{1,106}$"
MEANING = {
    INSTANCE_ID: "must be 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first",
    HEADER: "must be the name of a header in lower case: letters, digits and '-'",
    PATH: "must be a path",
    BASE_URL: "must be http://HOST:PORT or https://HOST:PORT, without a path",
    SOCKET: "must be an absolute path of at most 107 characters",
    PUBLIC_PATH: "must be a path like '/v1/models', in which '*' can stand for a segment",
    FLEET_KEY: "must be 1 to 64 letters, digits, '.', '_', ':' and '-'",
    REPLICA_NAME: "must be 1 to 16 lower-case letters and digits",
}
"""What is wrong with a string that one of these patterns does not match."""

_LISTENER = re.compile(r"http://(\[[^\[\]/@\s]+\]|[^\[\]/:@\s]+)(?::([0-9]{1,5}))?")


def _can_be_listened_at(host: str) -> str:
    if not is_host(host):
        raise ValueError("must be an IP address, or a name of this machine")
    return host


def _is_a_listener(url: str) -> str:
    found = _LISTENER.fullmatch(url)
    if not found or not is_host(found[1].strip("[]")) or not 0 < int(found[2] or 80) < 65536:
        raise ValueError("must be http://HOST:PORT, without a path")
    return url


def _leads_somewhere(url: str) -> str:
    try:
        parts = urlsplit(url)
        found = is_host(parts.hostname or "") and (parts.port is None or parts.port > 0)
        found = found and parts.hostname not in ("0.0.0.0", "::")
    except ValueError:
        found = False
    if not found:
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT, where D reach this process")
    return url


def _one_problem(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:  # one for each kind of value that it may have
        raise ValueError(
            "must be 'always', 'never', 'auto', 'tpot' or a whole number of tokens above 0"
        ) from None


Disaggregating = Annotated[
    Literal["always", "never", "auto", "tpot"] | Annotated[int, Field(ge=1, le=10**9)],
    WrapValidator(_one_problem),
]
ListenHost = Annotated[str, AfterValidator(_can_be_listened_at)]
ListenerUrl = Annotated[str, AfterValidator(_is_a_listener)]
BaseUrl = Annotated[str, Field(pattern=BASE_URL), AfterValidator(_leads_somewhere)]
