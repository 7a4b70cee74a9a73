"""Makes this scheduler one of several: what it does is told to the others, and what they do counts here."""

from __future__ import annotations

import secrets
import socket
from hashlib import blake2b

from .. import __version__
from ..admin.changes import AdminChanges
from ..models import PD_ROLES
from ..replicas import FleetKey, Replica
from ..router import PDRouter
from ..sync.channel import Channel
from ..sync.greeting import Greeting, hashed, settings_of
from ..sync.sync import Sync

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
    router.sync = Sync(
        replica,
        channel,
        greeting,
        router.events,
        waiting=waiting,
        news=router.wake,
        changed=log.changed,
        clock=router.clock,
    )
    return router.sync
