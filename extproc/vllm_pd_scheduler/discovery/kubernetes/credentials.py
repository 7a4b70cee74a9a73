"""Chooses how to speak with the API server, and reads it again each time: tokens and certificates change."""

from __future__ import annotations

from functools import partial

from ...system.daemon_thread import in_daemon_thread
from . import in_cluster, kubeconfig
from .access import Access
from .exec_plugin import ExecPlugin


class Credentials:
    """As what the configuration says: a kubeconfig file, else the pod's own, else kubectl's file.

    A ``context`` is one of a kubeconfig file.
    """

    def __init__(self, path: str | None = None, context: str | None = None) -> None:
        self._path = path
        self._context = context
        self._plugin = ExecPlugin()

    async def read(self) -> Access:
        """Return the access as it is now; raises :exc:`CredentialsError`."""
        if self._path is None and self._context is None and in_cluster.available():
            return await in_daemon_thread(in_cluster.read)
        if self._path is None:
            return await in_daemon_thread(partial(kubeconfig.read_default, self._context, self._plugin))
        return await in_daemon_thread(partial(kubeconfig.read, self._path, self._context, self._plugin))

    def refused(self) -> None:
        """Note that the API server does not take them: what is kept of them is void."""
        self._plugin.forget()
