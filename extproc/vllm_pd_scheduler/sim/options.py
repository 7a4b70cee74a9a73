"""The options of a simulated server, and how they are read from a command line."""

import argparse
import json
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from .profile import EngineProfile

Role = Literal["prefill", "decode", "encode", "both"]
EcConnector = Literal["none", "cpu", "example"]
KvConnector = Literal[
    "nixl",
    "nixl-push",
    "shared-store",
    "mooncake",
    "ascend-mooncake",
    "ascend-layerwise",
    "moriio-read",
    "moriio-write",
    "offloading-p2p",
    "sglang",
    "none",
]
WITHOUT_PARAMS = frozenset({"shared-store", "none"})
"""Engines that read no ``kv_transfer_params``. Here no store has anything yet when D looks: D computes it."""
LEASES = {
    "mooncake": 480.0,
    "ascend-mooncake": 480.0,
    "moriio-read": 60.0,
    "moriio-write": 60.0,
    "offloading-p2p": 60.0,
    "sglang": 300.0,
}
"""Seconds for which other engines than those with NIXL keep blocks."""
FAIL_DELAYS = {"offloading-p2p": 30.0}
"""Seconds until a dead sender is given up, where that takes longer than with NIXL."""
DEFAULT_MAX_MODEL_LEN = 32_768


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a server; ``--help`` describes each one. With ``port`` 0 it takes any unused port."""

    port: int
    role: Role = "both"
    host: str = "127.0.0.1"
    model: str = "sim-model"
    max_model_len: int = DEFAULT_MAX_MODEL_LEN
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    engine_id: str | None = None
    kv_connector: KvConnector = "nixl"
    kv_events_port: int | None = None
    kv_events_replay_port: int | None = None
    ec_connector: EcConnector = "none"
    ec_storage: str | None = None
    data_parallel_size: int = 1
    recompute: bool = False
    fail_delay: float = 0.5
    profile: EngineProfile = field(default_factory=EngineProfile)
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = ssl.CERT_NONE
    reuse_port: bool = False
    parent: int | None = None
    enable_lora: bool = False
    max_loras: int = 1
    lora_modules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError if the longest request would not fit into the KV cache, or there is no engine."""
        if self.data_parallel_size < 1:
            raise ValueError(f"data_parallel_size {self.data_parallel_size} must be 1 or more")
        if self.data_parallel_size > 1 and self.kv_connector in ("offloading-p2p", "ascend-layerwise"):
            raise ValueError(
                f"data_parallel_size: several engines with {self.kv_connector} are not simulated"
            )
        if not 1 < self.max_model_len <= self.profile.capacity:
            raise ValueError(
                f"max_model_len {self.max_model_len} must be 2 to {self.profile.capacity}, the tokens that "
                f"{self.profile.num_blocks} blocks of {self.profile.block_size} hold"
            )

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the TLS context for vLLM's options of these names; None for plain HTTP.

        Raise OSError (of which ssl.SSLError is a subclass) for files that cannot be used.
        """
        if self.ssl_certfile is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        context.verify_mode = ssl.VerifyMode(self.ssl_cert_reqs)
        if self.ssl_ca_certs:
            context.load_verify_locations(self.ssl_ca_certs)
        return context

    @property
    def kv_host(self) -> str:
        """The host that hand-offs name: of a server that listens on all addresses, the machine's name."""
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Return the options of a command line; print a message and exit if it is wrong, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_pd_scheduler.sim.server", description="A simulated vLLM instance."
    )
    add = parser.add_argument
    add("--port", type=int, required=True, help="0: any unused port")
    add(
        "--role",
        choices=get_args(Role),
        default="both",
        help="any role serves any request; encode hands encodings over",
    )
    add("--host", default="127.0.0.1")
    add("--model", default="sim-model", help="the served model name")
    add(
        "--max-model-len",
        type=int,
        help=f"context in tokens (default: {DEFAULT_MAX_MODEL_LEN}, or what fits)",
    )
    add("--api-key", help="ask for it on /v1/*")
    add("--allowed-origins", type=json.loads, default=[], help="JSON list of web pages that may read answers")
    add("--engine-id", help="NIXL engine id (default: another one at each start)")
    add("--kv-connector", choices=get_args(KvConnector), default="nixl", help="how blocks are handed over")
    add("--kv-events-port", type=int, help="publish KV events there, a rank at a port; needs pyzmq")
    add("--kv-events-replay-port", type=int, help="and give them again there")
    add("--data-parallel-size", type=int, default=1, help="engines behind the one port (default: 1)")
    add(
        "--ec-connector",
        choices=get_args(EcConnector),
        default="none",
        help="how encoded images, video and audio are handed over, by instances of the role encode",
    )
    add("--ec-storage", metavar="DIRECTORY", help="with the connector example: where encodings are")
    add(
        "--load-fail-policy",
        choices=("fail", "recompute"),
        default="fail",
        help="when a hand-off does not arrive",
    )
    add("--load-fail-delay", type=float, help="seconds until a dead sender is given up (default: 0.5 or 30)")
    add("--instant", action="store_true", help="an engine whose steps and transfers take no time")
    add("--enable-lora", action="store_true", help="have LoRA adapters, which can be loaded as it runs")
    add("--max-loras", type=int, default=1, help="adapters in use at once, as the metrics tell")
    add("--lora-modules", type=_module, nargs="+", default=[], metavar="NAME=PATH", help="adapters at start")
    add("--ssl-certfile", help="serve TLS with this certificate (PEM)")
    add("--ssl-keyfile", help="its key, if it is in another file")
    add("--ssl-ca-certs", help="who signs the certificates of clients")
    add("--ssl-cert-reqs", type=int, choices=(0, 1, 2), default=0, help="2: clients must have one")
    add("--reuse-port", action="store_true", help=argparse.SUPPRESS)
    add("--die-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    engine = parser.add_argument_group("engine")
    for item in fields(EngineProfile):
        name = f"--{item.name.replace('_', '-')}"
        help = f"{item.metadata['help']} (default: {item.default})"
        if isinstance(item.default, bool):
            engine.add_argument(name, action=argparse.BooleanOptionalAction, help=help)
        else:
            engine.add_argument(name, type=float if isinstance(item.default, float) else int, help=help)
    given = parser.parse_args(arguments)
    try:
        return _options(given)
    except ValueError as error:
        parser.error(str(error))


def _module(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not (name and found and path):
        raise argparse.ArgumentTypeError("must be NAME=PATH")
    return name, path


def _options(given: argparse.Namespace) -> Options:
    base = EngineProfile.instant() if given.instant else EngineProfile()
    base = replace(base, lease=LEASES.get(given.kv_connector, base.lease))
    values = {item.name: getattr(given, item.name) for item in fields(EngineProfile)}
    defaults = {item.name: getattr(base, item.name) for item in fields(EngineProfile)}
    profile = EngineProfile(
        **{**defaults, **{name: value for name, value in values.items() if value is not None}}
    )
    length = given.max_model_len
    return Options(
        port=given.port,
        role=given.role,
        host=given.host,
        model=given.model,
        max_model_len=min(DEFAULT_MAX_MODEL_LEN, profile.capacity) if length is None else length,
        api_key=given.api_key,
        allowed_origins=tuple(given.allowed_origins),
        engine_id=given.engine_id,
        kv_connector=given.kv_connector,
        kv_events_port=given.kv_events_port,
        kv_events_replay_port=given.kv_events_replay_port,
        ec_connector=given.ec_connector,
        ec_storage=given.ec_storage,
        data_parallel_size=given.data_parallel_size,
        recompute=given.load_fail_policy == "recompute",
        fail_delay=FAIL_DELAYS.get(given.kv_connector, 0.5)
        if given.load_fail_delay is None
        else given.load_fail_delay,
        profile=profile,
        ssl_certfile=given.ssl_certfile,
        ssl_keyfile=given.ssl_keyfile,
        ssl_ca_certs=given.ssl_ca_certs,
        ssl_cert_reqs=given.ssl_cert_reqs,
        reuse_port=given.reuse_port,
        parent=given.die_with_parent,
        enable_lora=given.enable_lora,
        max_loras=given.max_loras,
        lora_modules=tuple(given.lora_modules),
    )
