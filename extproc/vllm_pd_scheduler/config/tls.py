"""Certificates: those of the scheduler's own servers, and what it wants of the instances'."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..models import is_ip
from .self_signed import show_self_signed

LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
"""One part of a DNS name, as a regular expression."""


def _is_a_name(name: str) -> str:
    if is_ip(name) or not re.fullmatch(rf"{LABEL}(\.{LABEL})*", name):
        raise ValueError("must be a DNS name, as the certificate has it")
    return name


ServerName = Annotated[str, Field(max_length=253), AfterValidator(_is_a_name)]

_SYSTEM_CA = (
    ssl.get_default_verify_paths().cafile,
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)
"""Where systems keep their authorities in one file; ``SSL_CERT_FILE`` comes first."""


class TlsConfig(BaseModel):
    """PEM files of one of the scheduler's servers, which are [read again](security.md#tls) when they change,
    or a certificate that nobody has signed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    cert: str | None = None
    """The server's certificate, with the chain to its authority."""
    key: str | None = None
    """Its private key, not encrypted; belongs to `cert`."""
    self_signed: bool = False
    """In place of the two: `true` makes a certificate at each start, for clients that check none, as
    inference gateways do. Needs the package `cryptography` (extra `self-signed`)."""
    client_ca: str | None = None
    """Authorities whose certificates clients must show. Without it any client is admitted."""

    @model_validator(mode="after")
    def _one_certificate(self) -> TlsConfig:
        if self.self_signed:
            if self.cert is not None or self.key is not None:
                raise ValueError('"self_signed" takes the place of "cert" and "key": leave them out')
        elif self.cert is None or self.key is None:
            raise ValueError('"cert" and "key" belong together: give both, or "self_signed": true')
        return self

    def context(self) -> ssl.SSLContext:
        """Return a server's context, TLS 1.2 or later; raises :exc:`ValueError` naming a bad file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in self.files():
            _read(path)
        if self.cert is None or self.key is None:
            show_self_signed(context)
        else:
            _show(context, self.cert, self.key)
        if self.client_ca is not None:
            _trust(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def files(self) -> tuple[str, ...]:
        """Return the paths of the files."""
        return tuple(path for path in (self.cert, self.key, self.client_ca) if path is not None)


class InstanceTlsConfig(BaseModel):
    """TLS to the instances. The PEM files are read at start by the scheduler and by Envoy; the scheduler
    [reads them again](security.md#tls) when they change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    ca: str | None = None
    """Authorities that sign the instances' certificates; without it those that the system trusts."""
    cert: str | None = None
    """Certificate to show to instances that ask for one."""
    key: str | None = None
    """Its private key, not encrypted; belongs to `cert`."""
    server_name: ServerName | None = None
    """DNS name that the instances' certificates must be for, if it is not each instance's `host`."""

    @model_validator(mode="after")
    def _both_or_none(self) -> InstanceTlsConfig:
        if (self.cert is None) != (self.key is None):
            raise ValueError('"cert" and "key" belong together: give both, or neither')
        return self

    def ca_file(self) -> str:
        """Return the PEM file of the authorities; raises :exc:`ValueError` if the system has none."""
        if self.ca is not None:
            return self.ca
        for path in _SYSTEM_CA:
            if path is not None and Path(path).is_file():
                return path
        raise ValueError("no file with the system's certificate authorities is found: name one as ca")

    def context(self) -> ssl.SSLContext:
        """Return a client's context, TLS 1.2 or later; raises :exc:`ValueError` naming a bad file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and its name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in self.files():
            _read(path)
        _trust(context, self.ca_file())
        if self.cert is not None and self.key is not None:
            _show(context, self.cert, self.key)
        return context

    def files(self) -> tuple[str, ...]:
        """Return the paths of the files; raises likewise."""
        return tuple(path for path in (self.ca_file(), self.cert, self.key) if path is not None)


def _show(context: ssl.SSLContext, cert: str, key: str) -> None:
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        raise ValueError(
            f"{cert} and {key} are not a PEM certificate and its unencrypted key ({_reason(error)})"
        ) from None


def _trust(context: ssl.SSLContext, ca: str) -> None:
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"{ca} has no PEM certificate ({_reason(error)})") from None


def _read(path: str) -> bytes:
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ValueError("it is not a file")  # a pipe would keep us waiting
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return (isinstance(error, OSError) and error.strerror) or str(error)
