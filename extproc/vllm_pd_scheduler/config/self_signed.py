"""A certificate that nobody has signed, for peers that encrypt and do not ask whom they speak with."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime, timedelta

from ..system.extras import install_command

_VALID = timedelta(days=3650)
"""A choice. It is made anew at each start."""

_NAME = "vllm-pd-scheduler"


def show_self_signed(context: ssl.SSLContext) -> None:
    """Have a server's context show a certificate that is made now, and never written to a disk.

    Raises :exc:`ValueError` if the package for that is missing.
    """
    cert, key = _make()
    held = [_in_memory(cert), _in_memory(key)]
    try:
        context.load_cert_chain(*(f"/proc/self/fd/{each}" for each in held))
    finally:
        for each in held:
            os.close(each)


def _make() -> tuple[bytes, bytes]:
    """Return a certificate and its key, in PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        command = install_command("self-signed")
        raise ValueError(f"self_signed needs the package cryptography: {command}") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME), x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    unencrypted = serialization.NoEncryption()
    return made.public_bytes(pem), key.private_bytes(pem, serialization.PrivateFormat.PKCS8, unencrypted)


def _in_memory(content: bytes) -> int:
    """Return a file in memory, which OpenSSL reads by its path."""
    made = os.memfd_create(_NAME)
    os.write(made, content)
    return made
