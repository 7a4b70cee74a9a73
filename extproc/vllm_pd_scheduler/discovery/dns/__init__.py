"""DNS names as a source of instances: ``lookup`` asks for them, ``source`` follows one."""

from .source import DnsNames

__all__ = ["DnsNames"]
