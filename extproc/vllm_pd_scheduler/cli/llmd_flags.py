"""The flags of llm-d's picker, as charts and Go spell them, and those that are not followed here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

TRUE, FALSE = frozenset({"1", "t", "true"}), frozenset({"0", "f", "false"})

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class FlagError(ValueError):
    """A flag cannot be used; ``flag`` is its name."""

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(reason)
        self.flag = flag


@dataclass(frozen=True, slots=True)
class Ignored:
    """A flag of llm-d's that changes nothing here."""

    why: str
    boolean: bool = False
    as_here: str = ""
    """The value with which it asks for what is done here anyway: then there is nothing to say."""


_METRIC = "the metrics that are read are vLLM's"
_ALWAYS = "true"
_NEVER = "false"

IGNORED: Mapping[str, Ignored] = {
    "config-file": Ignored(
        "it has llm-d's plugins, which do not run here: strategy and all else are in the file of --config"
    ),
    "config-text": Ignored("it has llm-d's plugins: see --config-file"),
    "allow-experimental-plugins": Ignored("no plugin of llm-d's runs here", True, _NEVER),
    "ha-enable-leader-election": Ignored(
        "every replica serves and is ready; each knows only its own requests", True, _NEVER
    ),
    "enable-cert-reload": Ignored("certificates are always read again when they change", True, _ALWAYS),
    "health-checking": Ignored("health is always answered, on both ports", True, _ALWAYS),
    "tracing": Ignored("the key tracing of --config says whether and where traces go", True, _NEVER),
    "metrics-endpoint-auth": Ignored(
        "/metrics is open to whoever reaches the port: limit that by a NetworkPolicy", True, _NEVER
    ),
    "enable-pprof": Ignored("there is no pprof", True, _NEVER),
    "enable-grpc-stream-metrics": Ignored("the metrics have the requests in flight anyway", True, _NEVER),
    "disable-endpoint-subset-filter": Ignored("a gateway's subset is always kept to", True, _NEVER),
    "grpc-max-recv-msg-size": Ignored("the key max_body_bytes of --config limits bodies"),
    "grpc-max-send-msg-size": Ignored("messages to a gateway have 62,000 bytes of a body at most"),
    "refresh-metrics-interval": Ignored("the key health_check_interval of --config says how often"),
    "refresh-prometheus-metrics-interval": Ignored("metrics are worked out when they are asked for"),
    "metrics-staleness-threshold": Ignored("a load that was not read three times is not believed"),
    "total-queued-requests-metric": Ignored(_METRIC),
    "total-running-requests-metric": Ignored(_METRIC),
    "kv-cache-usage-percentage-metric": Ignored(_METRIC),
    "lora-info-metric": Ignored(_METRIC),
    "cache-info-metric": Ignored(_METRIC),
    "zap-devel": Ignored("--zap-encoder and -v say how and what is logged", True, _NEVER),
    "zap-log-level": Ignored("-v says what is logged"),
    "zap-stacktrace-level": Ignored("errors that are bugs have their traceback"),
    "zap-time-encoding": Ignored("times are UTC, as ISO 8601"),
}
"""By name, without dashes."""

REFUSED: Mapping[str, str] = dict.fromkeys(
    ("metrics-client-ca-file", "metrics-cert-dir"),
    "/metrics has no TLS here: leave it out, and limit who reaches the port by a NetworkPolicy",
)
"""Flags without which less would be protected than was asked for."""


def read_flags(
    arguments: Collection[str], booleans: Collection[str], valued: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the arguments in our spelling, and a line for each flag that is not followed.

    ``booleans`` and ``valued`` are the names, without dashes, of the flags that are. Go takes one dash as
    two, ``--flag=false`` for booleans, and ``-v=4``. Raises :exc:`FlagError`.
    """
    ours: list[str] = []
    notes: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or argument == "--":
            ours.append(argument)
        elif name in REFUSED:
            raise FlagError(name, REFUSED[name])
        elif name in booleans or (name in IGNORED and IGNORED[name].boolean):
            on = _truth(name, value) if equals else True
            if name in booleans:
                ours.append(f"--{name}" if on else f"--no-{name}")
            elif ("true" if on else "false") != IGNORED[name].as_here:
                notes.append(_note(name, argument))
        elif name in valued or name in IGNORED:
            value = value if equals else _next(name, rest)
            if name in valued:
                ours += [f"--{name}", value]
            else:
                notes.append(_note(name, f"--{name}={value}"))
        else:
            ours.append(argument)
    return ours, notes


def _truth(name: str, value: str) -> bool:
    if value.lower() not in TRUE | FALSE:
        raise FlagError(name, f"{value!r} is neither true nor false")
    return value.lower() in TRUE


def _next(name: str, rest: Iterator[str]) -> str:
    try:
        return next(rest)
    except StopIteration:
        raise FlagError(name, "needs a value") from None


def _note(name: str, argument: str) -> str:
    return f"--{argument.lstrip('-')} is ignored: {IGNORED[name].why}"


def read_duration(name: str, text: str) -> float:
    """Return the seconds of a duration as Go writes it, ``1m30s`` say; raises :exc:`FlagError`."""
    if text == "0":
        return 0.0
    if not text or _DURATION.sub("", text):
        raise FlagError(name, f"{text!r} is no duration like 30s or 1m30s")
    return sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(text))


def read_ports(name: str, texts: Collection[str]) -> list[int]:
    """Return the ports in lists with commas, each once; raises :exc:`FlagError`."""
    ports: dict[int, None] = {}
    for text in ",".join(texts).split(","):
        if not (text.strip().isdecimal() and text.isascii() and 0 < int(text.strip()[:6]) < 65536):
            raise FlagError(name, f"{text!r} is no port: give numbers with commas between them")
        ports[int(text)] = None
    return list(ports)
