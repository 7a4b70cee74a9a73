"""What tests of the Helm chart need: helm, and what its pods have mounted."""

from pathlib import Path

import pytest

from tests.support.certificates import make_certificates
from tests.support.helm import ToolMissing, tool


@pytest.fixture
def helm() -> None:
    try:
        tool("helm")
    except ToolMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pods have mounted."""
    folder = tmp_path_factory.mktemp("mounts")
    made = make_certificates(folder)
    for secret in ("admin-tls", "grpc-tls", "instance-tls"):
        (folder / secret).mkdir()
        (folder / secret / "ca.crt").write_bytes(Path(made.ca).read_bytes())
        (folder / secret / "tls.crt").write_bytes(Path(made.server["cert"]).read_bytes())
        (folder / secret / "tls.key").write_bytes(Path(made.server["key"]).read_bytes())
    secrets = ("admin", "token"), ("api-key", "api-key"), ("valkey", "password")
    for secret, name in secrets:
        (folder / secret).mkdir()
        for key in (name, "key"):
            (folder / secret / key).write_text("s3cret")
    return folder
