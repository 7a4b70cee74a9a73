"""Makes this scheduler one of several: what it does is told to the others, and what they do counts here."""

from __future__ import annotations

import secrets
import socket
from hashlib import blake2b

from .. import __version__
from ..admin.changes import AdminChanges
from ..config import ReplicasConfig
from ..models import PD_ROLES
from ..replicas import FleetKey, Replica
from ..router import PDRouter
from ..routing.strays import Strays
from ..sync.channel import Channel
from ..sync.greeting import Greeting, hashed, settings_of
from ..sync.local import LocalChannel
from ..sync.sync import Sync
from .certificates import followed
from .parts import Parts
from .startup_error import StartupError
from .worker import Worker

JOIN_S = 1.0
"""Seconds that the start waits for the others at most: what operators have changed should count from the
first request on."""


def join(
    router: PDRouter, changes: AdminChanges, channel: Channel, fleet: str, name: str, secret: str = ""
) -> Sync:
    """Return what joins a router to the others of a fleet, once its ``run`` is started.

    ``name`` is the scheduler's own among them, if it has one; each start has another one beside that. All
    hash prompts alike: with what the fleet and its ``secret`` make, so that clients cannot guess it. With a
    secret, each knows the requests by which another one has the rest of an answer written.
    """
    run = secrets.token_hex(4)
    hash_key = blake2b(f"{fleet}\0{secret}".encode(), digest_size=8).digest()
    router.share_hashes(int.from_bytes(hash_key))
    if secret:  # else clients could know it
        router.going_on.key = blake2b(f"continues\0{fleet}\0{secret}".encode(), digest_size=16).hexdigest()
    replica = Replica(router.registry, f"{name}.{run}" if name else run, FleetKey(fleet))
    settings = {**settings_of(router.config), "replicas.password": hashed(hash_key.hex())}
    greeting = Greeting(replica.name, name, socket.gethostname(), __version__, settings)
    queue = router.dispatcher.queue

    def waiting() -> tuple[int, int]:
        prefill, decode = (queue.waiting(role) for role in PD_ROLES)
        return prefill, decode

    log = changes.share(channel, replica.name)
    strays = Strays(
        lambda data: sync.pass_on(data), router.in_flight.attempt_told_of, router.in_flight.told_of
    )
    router.sync = sync = Sync(
        replica,
        channel,
        greeting,
        router.events,
        waiting=waiting,
        news=router.wake,
        changed=log.changed,
        stray=strays.receive,
        clock=router.clock,
    )
    router.in_flight.pass_on = strays.pass_on
    return sync


async def join_replicas(
    config: ReplicasConfig, router: PDRouter, changes: AdminChanges, name: str, parts: Parts
) -> None:
    """Meet the other replicas; raise :exc:`.StartupError` if what that takes is not there."""
    try:
        config.check()
        from ..sync.valkey import Valkey  # its package is an extra
    except ValueError as error:
        raise StartupError(f"replicas: {error}") from None
    meeting = config.meeting()
    tls = followed("replicas.tls", config.tls_settings(), router.events, parts) if meeting.tls else None
    secret = config.password.read() if config.password is not None else ""
    sync = join(router, changes, Valkey(config, tls), meeting.fleet(config.key), name, secret)
    await _meet(sync, parts)


async def join_workers(
    worker: Worker, router: PDRouter, changes: AdminChanges, name: str, parts: Parts
) -> None:
    """Meet the other workers of this machine."""
    changes.file_first = True
    sync = join(router, changes, LocalChannel(worker.hub), "workers", name, worker.read_secret())
    await _meet(sync, parts)


async def _meet(sync: Sync, parts: Parts) -> None:
    parts.keep_running(sync.run())
    await sync.joined(JOIN_S)
