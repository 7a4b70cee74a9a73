"""The configuration: what it may hold (:mod:`.schema`) and how it is read (:mod:`.load`)."""

from .load import ConfigError, load_config, parse_config
from .problems import read_problem
from .schema import InstanceConfig, SchedulerConfig, SecretSource, is_loopback
from .tls import InstanceTlsConfig, TlsConfig

__all__ = [
    "ConfigError", "InstanceConfig", "InstanceTlsConfig", "SchedulerConfig", "SecretSource", "TlsConfig",
    "is_loopback", "load_config", "parse_config", "read_problem",
]  # fmt: skip
