"""``drain-envoy``: what comes before the stop of an Envoy of the operator's own."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from .options import DEFAULT_PORTS, EnvoyAdminPortOption, fail


def drain_envoy(
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, max=604_800, help="Seconds that requests may take to end.")
    ] = 30.0,
    envoy_admin_port: EnvoyAdminPortOption = DEFAULT_PORTS.admin,
) -> None:
    """Take the Envoy of this machine out of load balancers, and wait until its requests have ended.

    Run it before that Envoy is stopped, and while the scheduler still runs. Ends with 1 if some requests
    have not ended in time. An Envoy that is not there any more has none.
    """
    from ..envoy.drain import begin_drain, finish_drain

    admin = f"http://127.0.0.1:{envoy_admin_port}"

    async def drained() -> int:
        if not await begin_drain(admin):
            typer.echo(
                f"no Envoy answers at {admin}, so nothing was drained: if one runs, give the port of its "
                "admin interface by --envoy-admin-port",
                err=True,
            )
            return 0
        return await finish_drain(admin, timeout)

    if active := asyncio.run(drained()):
        fail(f"{active} requests still run in Envoy after {timeout:g} s")
