"""What an engine has prefilled for others, until they have it."""

import asyncio
import time
from collections import Counter

from .engine import Engine, Fetch, HandOff
from .handoff import Connector, FetchCall, FetchReply
from .job import EngineFailed, Job
from .metrics import Metrics
from .mooncake import PullCall, sent_as
from .nixl_push import base_id
from .text import Prompt


class Lending:
    """The prompts whose blocks are, or will be, pinned on an engine, and who asks for them.

    - ``agent`` identifies this process to other engines.
    - ``outcomes`` counts what becomes of them: fetched, released or expired.
    - ``changed`` is set when blocks are free again.
    """

    def __init__(
        self,
        engine: Engine,
        connector: Connector,
        metrics: Metrics,
        agent: str,
        outcomes: Counter[str],
        changed: asyncio.Event,
    ) -> None:
        self._engine = engine
        self._connector = connector
        self._metrics = metrics
        self._agent = agent
        self._outcomes = outcomes
        self._changed = changed
        self._sent: dict[str, Prompt] = {}
        """By request id."""
        self._registered: set[str] = set()
        """Ids for which another engine has asked before anything was there for it to be pushed."""
        self._receivers: dict[str, str] = {}
        """Of prefills that are for one engine only, its address."""
        self._pulled: dict[str, asyncio.Event] = {}
        """By the name of a prefill that is not there yet and for which somebody waits."""
        self._awaited: dict[str, asyncio.Future[str]] = {}
        """By the name of a prefill that is answered when it was fetched: what has become of it."""

    def begin(self, job: Job) -> None:
        """Know of a prefill that others will have, if it is one."""
        if job.request.hand_off is HandOff.SEND:
            self._sent[job.request.request_id] = job.prompt
            if receiver := self._connector.receiver(job.params):
                self._receivers[job.request.request_id] = receiver

    def drop(self, request_id: str) -> None:
        """Forget a prefill that has not ended."""
        self._sent.pop(request_id, None)

    def computed(self, request_id: str) -> None:
        """Tell who waits for it that a prefill has ended."""
        if there := self._pulled.pop(request_id, None):
            there.set()

    async def handed_over(self, job: Job) -> None:
        """Wait until a prefill's blocks were fetched; raise EngineFailed if they are not, and free them."""
        name = job.request.request_id
        try:
            outcome = "fetched"
            if name in self._sent:
                outcome = await self._awaited.setdefault(name, asyncio.get_running_loop().create_future())
            if outcome != "fetched":
                raise EngineFailed(f"Prefill transfer failed: {outcome}")
        finally:
            self._awaited.pop(name, None)
            if self._engine.release(name):
                self._forget(name, "released")
                self._changed.set()

    def abort(self, request_id: str) -> bool:
        """Whether a prefill waited to be fetched, and does not any more."""
        if (awaited := self._awaited.get(request_id)) is None or awaited.done():
            return False
        awaited.set_result("aborted")
        return True

    def fetch(self, call: FetchCall) -> FetchReply | None:
        """Return the answer to another engine's fetch; None if it is meant for another process."""
        if call.agent not in (None, self._agent):
            return None
        if self._receivers.get(call.request_id, call.receiver) != call.receiver:
            return None  # it writes somewhere else
        if self._connector.pushes:
            return self._register(call.request_id)
        found = self._engine.fetch(call.request_id, call.block_ids, time.monotonic())
        if found is Fetch.INVALID:
            return FetchReply(self._agent, invalid=True)
        prompt = self._forget(call.request_id, "fetched")
        self._changed.set()
        return FetchReply(self._agent, prompt.digest if prompt and found is Fetch.GOOD else None)

    def _register(self, request_id: str) -> FetchReply:
        """Return of which prompt the blocks are that are pushed to another engine's request."""
        base = base_id(request_id)
        found = next(
            (each for each in self._sent if base_id(each) == base and self._engine.release(each)), None
        )
        prompt = found and self._forget(found, "fetched")
        if not prompt or base in self._registered:  # in the second case they went to whoever asked first
            self._registered.add(base)
            return FetchReply(self._agent, unmatched=True)
        self._changed.set()
        return FetchReply(self._agent, prompt.digest, tokens=prompt.tokens)

    async def pull(self, call: PullCall) -> FetchReply:
        """Return the answer to a pull, as soon as there is a hand-off of its name."""
        request_id, engine = sent_as(call.transfer_id), self._engine
        try:
            async with asyncio.timeout(engine.profile.lease):
                while not engine.pinned_blocks(request_id):
                    await self._pulled.setdefault(request_id, asyncio.Event()).wait()
        except TimeoutError:
            return FetchReply(self._agent, late=True)
        engine.release(request_id)
        prompt = self._forget(request_id, "released" if call.release else "fetched")
        self._changed.set()
        return FetchReply(self._agent, prompt.digest if prompt else None)

    def release(self, request_id: str) -> None:
        """Unpin one that nobody will fetch."""
        if self._engine.release(request_id):
            self._forget(request_id, "released")
            self._changed.set()

    def expired(self, request_ids: list[str]) -> None:
        """Forget those whose leases are over."""
        self._metrics.expired(len(request_ids))
        for request_id in request_ids:
            self._forget(request_id, "expired")

    def _forget(self, request_id: str, outcome: str) -> Prompt | None:
        prompt = self._sent.pop(request_id, None)
        self._receivers.pop(request_id, None)
        if (awaited := self._awaited.get(request_id)) is not None and not awaited.done():
            awaited.set_result(outcome)
        if prompt:
            self._outcomes[outcome] += 1
        return prompt
