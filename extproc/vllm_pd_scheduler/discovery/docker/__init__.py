"""A Docker engine as a source of instances.

``engine`` asks it, ``containers`` reads what it says of one, ``view`` makes instances of all, ``source``
follows it.
"""

from .source import DockerContainers

__all__ = ["DockerContainers"]
