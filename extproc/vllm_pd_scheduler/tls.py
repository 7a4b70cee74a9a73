"""Certificates of the scheduler's own servers: where they are kept, and what makes them unusable."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
from pydantic import BaseModel, ConfigDict


class TlsConfig(BaseModel):
    """PEM files of a server: its certificate chain, its key, and who signs the clients it admits.

    Without ``client_ca`` any client is admitted. The files are read at start: new ones need a restart.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    cert: str
    key: str
    client_ca: str | None = None

    def context(self) -> ssl.SSLContext:
        """Return a server's context, TLS 1.2 or later; raises :exc:`ValueError` naming a bad file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._read()
        try:
            context.load_cert_chain(self.cert, self.key, password=lambda: b"")
        except (ssl.SSLError, OSError) as error:
            raise ValueError(
                f"{self.cert} and {self.key} are not a PEM certificate and its unencrypted key"
                f" ({_reason(error)})"
            ) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError) as error:
                raise ValueError(f"{self.client_ca} has no PEM certificate ({_reason(error)})") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return the same for a gRPC server; raises :exc:`ValueError` likewise."""
        self.context()
        cert, key, clients = self._read()
        return grpc.ssl_server_credentials([(key, cert)], clients, require_client_auth=clients is not None)

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        cert, key = _read(self.cert), _read(self.key)
        return cert, key, None if self.client_ca is None else _read(self.client_ca)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return (isinstance(error, OSError) and error.strerror) or str(error)
