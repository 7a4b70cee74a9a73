"""Programs that hand out credentials, as kubeconfig files of clouds name them (``exec``)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .access import CredentialsError, as_token

TIMEOUT_S = 60.0
"""Seconds that such a program may take: it may have to ask a server of its own."""

EARLY_S = 30.0
"""Seconds before their end that credentials are not used any more."""

_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


@dataclass(frozen=True, slots=True)
class ExecCredential:
    """What such a program has handed out."""

    token: str | None
    cert: bytes | None
    key: bytes | None
    until: float
    """Unix time until which it may be used."""


class ExecPlugin:
    """Runs such a program, and keeps what it handed out while that can be used. It blocks."""

    def __init__(self) -> None:
        self._asked_as: str | None = None
        self._kept: ExecCredential | None = None

    def forget(self) -> None:
        """Run the program again the next time: the API server refuses what it handed out."""
        self._kept = None

    def credential(
        self, spec: Mapping[str, Any], cluster: Mapping[str, Any], directory: str
    ) -> ExecCredential:
        """Return credentials; raises :exc:`CredentialsError`.

        ``spec`` is what a kubeconfig file in ``directory`` says of the program, ``cluster`` what it says of
        the API server.
        """
        asked_as = json.dumps([spec, directory], sort_keys=True, default=str)
        if self._kept is None or self._asked_as != asked_as or self._kept.until - EARLY_S < time.time():
            self._kept, self._asked_as = _run(spec, cluster, directory), asked_as
        return self._kept


def _run(spec: Mapping[str, Any], cluster: Mapping[str, Any], directory: str) -> ExecCredential:
    program, version = str(spec.get("command") or ""), spec.get("apiVersion")
    if not program or version not in _VERSIONS:
        raise CredentialsError(f"exec needs a command, and an apiVersion of {' or '.join(_VERSIONS)}")
    if spec.get("interactiveMode") == "Always":
        raise CredentialsError(f"{program} wants to ask a person (interactiveMode Always); nobody is here")
    if os.sep in program:
        program = os.path.join(directory, program)
    about: dict[str, Any] = {"interactive": False}
    if spec.get("provideClusterInfo"):
        about["cluster"] = dict(cluster)
    asked = {"apiVersion": version, "kind": "ExecCredential", "spec": about}
    extra = {str(each["name"]): str(each["value"]) for each in spec.get("env") or ()}
    try:
        ended = subprocess.run(
            [program, *map(str, spec.get("args") or ())],
            env={**os.environ, **extra, "KUBERNETES_EXEC_INFO": json.dumps(asked)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CredentialsError(f"{program} has not answered for {TIMEOUT_S:g} s") from None
    except (OSError, ValueError) as error:
        hint = f" ({spec['installHint']})" if spec.get("installHint") else ""
        raise CredentialsError(f"{program} cannot be run: {error}{hint}") from None
    if ended.returncode:
        *_, last = ended.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise CredentialsError(f"{program} failed with status {ended.returncode}: {last[:200]}")
    return _credential(ended.stdout, program)


def _credential(answer: bytes, program: str) -> ExecCredential:
    try:
        status = json.loads(answer)["status"]
        token, cert, key = (status.get(n) for n in ("token", "clientCertificateData", "clientKeyData"))
        ends = status.get("expirationTimestamp")
        until = datetime.fromisoformat(ends).timestamp() if ends else float("inf")
        if not (token or (cert and key)):
            raise ValueError
        return ExecCredential(
            token=as_token(token, program) if token else None,
            cert=cert.encode() if cert else None,
            key=key.encode() if key else None,
            until=until,
        )
    except CredentialsError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CredentialsError(f"{program} has printed no credentials") from None
