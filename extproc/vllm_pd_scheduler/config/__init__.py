"""The configuration: what it may hold (:mod:`.schema`) and how it is read (:mod:`.load`)."""

from .instances import InstanceConfig, SecretSource, connector_choice
from .kv_events import KvEventsConfig
from .listeners import is_loopback
from .load import ConfigError, load_config, load_instances, parse_config, read_instances
from .presets import PRESETS
from .problems import describe_error, find_problems
from .reload import Reloaded, compare
from .replicas import ReplicasConfig
from .schema import SchedulerConfig
from .tls import InstanceTlsConfig, TlsConfig
from .tracing import TracingConfig

__all__ = [
    "PRESETS",
    "ConfigError",
    "InstanceConfig",
    "InstanceTlsConfig",
    "KvEventsConfig",
    "Reloaded",
    "ReplicasConfig",
    "SchedulerConfig",
    "SecretSource",
    "TlsConfig",
    "TracingConfig",
    "compare",
    "connector_choice",
    "describe_error",
    "find_problems",
    "is_loopback",
    "load_config",
    "load_instances",
    "parse_config",
    "read_instances",
]  # fmt: skip
