"""A Docker engine, by the SDK. All of it blocks: it is for threads of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import docker
import requests
from docker.context import ContextAPI
from docker.errors import APIError, DockerException, NotFound
from docker.tls import TLSConfig
from docker.utils import kwargs_from_env
from urllib3.exceptions import HTTPError

from .containers import ROLE_LABEL

CALL_S = 5.0
"""Seconds that the engine may be silent in a call."""

_CHANGES = [
    "start", "restart", "die", "stop", "destroy", "oom", "kill", "pause", "unpause", "rename", "health_status",
    "connect", "disconnect",
]  # fmt: skip
"""The events that are listened to."""

_ENDS = {"die", "stop", "destroy", "start", "restart"}
"""Those after which a container stops no more: it has ended, or runs again."""

_FATAL = {signal.SIGHUP: False, signal.SIGINT: True, signal.SIGQUIT: True, signal.SIGTERM: True, signal.SIGKILL: True}


class EngineAway(Exception):
    """The engine cannot be asked; ``args[0]`` says why, for people."""
