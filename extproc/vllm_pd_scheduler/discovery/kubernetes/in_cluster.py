"""A pod's own access to the API server of its cluster."""

from __future__ import annotations

import os
from pathlib import Path

from ...models import join_address
from .access import Access, CredentialsError, read_file, read_token

DIRECTORY = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Kubernetes puts a pod's token. It replaces the file long before the token ends."""


def available() -> bool:
    """Whether this process runs in a pod that may ask the API server."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and os.path.exists(f"{DIRECTORY}/token")


def read() -> Access:
    """Return the access of the pod's service account; raises :exc:`CredentialsError`."""
    host, port = (
        os.environ.get("KUBERNETES_SERVICE_HOST", ""),
        os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
    )
    if not host or not port.isdigit():
        raise CredentialsError("KUBERNETES_SERVICE_HOST or KUBERNETES_SERVICE_PORT is not as in a pod")
    namespace = Path(f"{DIRECTORY}/namespace")
    return Access(
        server=f"https://{join_address(host, int(port))}",
        namespace=read_file(str(namespace)).decode(errors="replace").strip()
        if namespace.exists()
        else "default",
        token=read_token(f"{DIRECTORY}/token"),
        ca=read_file(f"{DIRECTORY}/ca.crt"),
    )
