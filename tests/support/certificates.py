"""Certificates for tests: two authorities, a server's and a client's certificate by the first."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of PEM files."""

    ca: str
    server: dict[str, str]
    client: dict[str, str]
    stranger: dict[str, str]
    """A client's, by an authority that nobody knows."""

    def client_context(self, who: dict[str, str] | None = None) -> ssl.SSLContext:
        """Return a context of a client that trusts the server, and shows a certificate if it has one."""
        context = ssl.create_default_context(cafile=self.ca)
        if who is not None:
            context.load_cert_chain(who["cert"], who["key"])
        return context


def make_certificates(directory: Path) -> Certificates:
    """Write certificates for 127.0.0.1 into a directory."""
    ours, unknown = trustme.CA(), trustme.CA()
    ca = directory / "ca.pem"
    ours.cert_pem.write_to_path(ca)

    def issue(authority: trustme.CA, name: str) -> dict[str, str]:
        issued = authority.issue_cert("127.0.0.1", "localhost")
        cert, key = directory / f"{name}.pem", directory / f"{name}.key"
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(cert, append=number > 0)
        issued.private_key_pem.write_to_path(key)
        return {"cert": str(cert), "key": str(key)}

    return Certificates(str(ca), issue(ours, "server"), issue(ours, "client"), issue(unknown, "stranger"))
