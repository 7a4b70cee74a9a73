"""Access as kubeconfig files describe it, as ``kubectl`` reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml

from .access import Access, CredentialsError, as_token, from_base64, read_file, read_token
from .exec_plugin import ExecPlugin

_FILE = "__file__"
"""The key under which an entry has the file that it is from: paths in it are relative to that."""


def read_default(context: str | None, plugin: ExecPlugin) -> Access:
    """Return the same of the file, or several as in a PATH, that is read where none is named."""
    path = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    if not any(map(os.path.exists, _paths(path))):
        raise CredentialsError(
            f"there is no {path}, nor a service account as in a pod: name a file by kubeconfig or KUBECONFIG"
        )
    return read(path, context, plugin)


def read(path: str, context: str | None, plugin: ExecPlugin) -> Access:
    """Return the access that a context of the file (or of several) describes: that it says is current.

    It blocks, and raises :exc:`CredentialsError`.
    """
    found = _Merged(path)
    name = context or found.current
    if not name:
        raise CredentialsError(f"{path} has no current-context: name one as context")
    chosen = found.entry("contexts", "context", name)
    cluster = found.entry("clusters", "cluster", chosen.get("cluster"))
    user = found.entry("users", "user", chosen["user"]) if chosen.get("user") else {}
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith(("https://", "http://")):
        raise CredentialsError(f"{cluster[_FILE]}: the cluster of context {name!r} has no server")
    token, cert, key = _user(user, cluster, plugin)
    return Access(
        server=server,
        namespace=str(chosen.get("namespace") or "default"),
        token=token,
        ca=_content(cluster, "certificate-authority"),
        cert=cert,
        key=key,
        server_name=cluster.get("tls-server-name") or None,
        verify=not cluster.get("insecure-skip-tls-verify"),
        proxy=cluster.get("proxy-url") or None,
    )


def _paths(path: str) -> list[str]:
    return [os.path.expanduser(each) for each in path.split(os.pathsep) if each]


class _Merged:
    """Several files as one: of two entries with one name the first counts."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.current: str | None = None
        self._entries: dict[tuple[str, str], Mapping[str, Any]] = {}
        paths = _paths(path)
        there = [each for each in paths if os.path.exists(each)]  # as kubectl does, but one is needed
        for each in there or paths[:1]:
            self._add(each, _load(each))

    def _add(self, file: str, content: Mapping[str, Any]) -> None:
        self.current = self.current or content.get("current-context")
        for kind, key in (("clusters", "cluster"), ("contexts", "context"), ("users", "user")):
            listed = content.get(kind) or ()
            for each in listed if isinstance(listed, list) else ():
                if isinstance(each, dict) and isinstance(each.get(key), dict):
                    self._entries.setdefault((kind, str(each.get("name"))), {**each[key], _FILE: file})

    def entry(self, kind: str, key: str, name: object) -> Mapping[str, Any]:
        """Return an entry; raises :exc:`CredentialsError`."""
        try:
            return self._entries[kind, str(name)]
        except KeyError:
            raise CredentialsError(f"{self._path} has no {key} {name!r}") from None


def _load(path: str) -> Mapping[str, Any]:
    try:
        found = yaml.load(read_file(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, CredentialsError):
            raise
        raise CredentialsError(f"{path} is not valid YAML") from None
    if not isinstance(found, dict):
        raise CredentialsError(f"{path} is not a kubeconfig file")
    return found


def _user(
    user: Mapping[str, Any], cluster: Mapping[str, Any], plugin: ExecPlugin
) -> tuple[str | None, bytes | None, bytes | None]:
    """Return a token, and a certificate with its key, of those that there are."""
    cert, key = _content(user, "client-certificate"), _content(user, "client-key")
    if user.get("tokenFile"):
        return read_token(_beside(user, user["tokenFile"])), cert, key
    if user.get("token"):
        return as_token(str(user["token"]), f"{user[_FILE]}: the user"), cert, key
    if isinstance(spec := user.get("exec"), dict):
        known = {name: value for name, value in cluster.items() if name != _FILE}
        found = plugin.credential(spec, known, os.path.dirname(os.path.abspath(user[_FILE])))
        return found.token, found.cert or cert, found.key or key
    if user.get("auth-provider"):
        raise CredentialsError(f"{user[_FILE]}: auth-provider is not supported, as in kubectl; use exec")
    return None, cert, key


def _content(entry: Mapping[str, Any], key: str) -> bytes | None:
    """Return what an entry has in itself, or in a file that it names."""
    if entry.get(f"{key}-data"):
        return from_base64(entry[f"{key}-data"], f"{entry[_FILE]}: {key}-data")
    return read_file(_beside(entry, entry[key])) if entry.get(key) else None


def _beside(entry: Mapping[str, Any], path: object) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(entry[_FILE])), str(path))
