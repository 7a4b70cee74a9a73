"""The configuration: what it may hold (:mod:`.schema`) and how it is read (:mod:`.load`)."""

from .load import ConfigError, load_config, parse_config
from .problems import describe_error
from .schema import InstanceConfig, SchedulerConfig, SecretSource, is_loopback
from .tls import InstanceTlsConfig, TlsConfig
from .tracing import TracingConfig

__all__ = [
    "ConfigError", "InstanceConfig", "InstanceTlsConfig", "SchedulerConfig", "SecretSource", "TlsConfig",
    "TracingConfig", "describe_error", "is_loopback", "load_config", "parse_config",
]  # fmt: skip
