"""What it takes to speak with an API server: where it is, whom to trust there, and as whom."""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
from dataclasses import dataclass, field


class CredentialsError(ValueError):
    """There are no credentials that can be used; the message says where that is, and why."""


@dataclass(frozen=True, slots=True)
class Access:
    """An API server, and as whom it is asked. Files are read already: these are their contents."""

    server: str
    """Its URL, without a slash at the end."""
    namespace: str
    """The one that is meant where none is named."""
    token: str | None = field(default=None, repr=False)
    ca: bytes | None = None
    """PEM of the authorities that may have signed its certificate; ``None``: those of the system."""
    cert: bytes | None = None
    """PEM of a certificate to show, with its key."""
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    """The name that its certificate must be for, if it is not the URL's."""
    verify: bool = True
    proxy: str | None = None

    def tls(self) -> ssl.SSLContext:
        """Return a context for its connections; raises :exc:`CredentialsError`."""
        try:
            # Not ssl.create_default_context: from Python 3.13 on it refuses authorities that clusters make.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            elif self.ca is not None:
                context.load_verify_locations(cadata=self.ca.decode("ascii"))
            else:
                context.load_default_certs()
            if self.cert is not None and self.key is not None:
                _show(context, self.cert, self.key)
        except (ssl.SSLError, ValueError) as error:  # a text that is not ASCII is a ValueError too
            raise CredentialsError(f"the TLS credentials for {self.server} are not PEM: {error}") from None
        return context


def _show(context: ssl.SSLContext, cert: bytes, key: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="pd-") as directory:  # only its owner may look into it
        path = os.path.join(directory, "client.pem")
        with open(path, "wb") as file:
            file.write(cert + b"\n" + key)
        context.load_cert_chain(path, password=lambda: b"")


def read_file(path: str) -> bytes:
    """Return what a file holds; raises :exc:`CredentialsError` naming it."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise CredentialsError(f"{path} cannot be read: {error.strerror}") from None


def read_token(path: str) -> str:
    """Return the token in a file; raises :exc:`CredentialsError` naming it."""
    return as_token(read_file(path), path)


def as_token(data: bytes | str, where: str) -> str:
    """Return a token that can be sent in a header; raises :exc:`CredentialsError` naming the place."""
    try:
        token = (data if isinstance(data, str) else data.decode("ascii")).strip()
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise CredentialsError(f"{where} has no token")
    return token


def from_base64(text: object, where: str) -> bytes:
    """Return what is encoded; raises :exc:`CredentialsError` naming the place."""
    try:
        return base64.b64decode(str(text), validate=True)
    except ValueError:
        raise CredentialsError(f"{where} is not base64") from None
