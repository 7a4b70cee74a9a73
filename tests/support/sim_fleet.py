"""The simulated fleet, started as the other processes of the tests are."""

from __future__ import annotations

import os
import subprocess
from typing import IO, Any

from tests.support import template
from tests.support.waiting import HUNG_S
from vllm_pd_scheduler.sim import fleet
from vllm_pd_scheduler.sim.fleet import FleetError, SimInstance

__all__ = ["Fleet", "FleetError", "SimInstance"]


class Fleet(fleet.Fleet):
    """A :class:`vllm_pd_scheduler.sim.fleet.Fleet` whose instances are forks, and have time to start."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"timeout": HUNG_S, **more})

    def _start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        return template.start(command, log, dict(os.environ))
