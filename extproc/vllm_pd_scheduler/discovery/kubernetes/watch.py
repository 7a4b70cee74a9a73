"""Keeps in step with the objects of one kind that an API server has: a list first, then a watch."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from .api import CUT, SILENT, Api, Problem, refusal
from .backoff import Backoff
from .objects import Bookmark, Event, HasMetadata, Metadata, Named, ObjectList, Status

log = logging.getLogger(__name__)

PAGE = 200
"""Objects of one page of a list: few enough that to read one keeps nothing else waiting."""

WATCH_S = (300, 600)
"""Seconds after which a watch is to end, at least and at most; then another one goes on where it was."""

ABSENT_S = 300.0
"""Seconds until it is asked again for a kind that need not be there."""

STEADY_S = 2.0
"""Seconds for which a watch must have run before all is taken to be well."""

T = TypeVar("T", bound=HasMetadata)

_LIST = msgspec.json.Decoder(ObjectList)
_EVENT = msgspec.json.Decoder(Event)
_BOOKMARK = msgspec.json.Decoder(Bookmark)
_NAMED = msgspec.json.Decoder(Named)
_STATUS = msgspec.json.Decoder(Status)


class Watcher(Protocol):
    """Who wants to know of the objects of one kind."""

    def changed(self) -> None:
        """Hear that there may be other objects than before, or that they are known for the first time."""

    def alive(self) -> None:
        """Hear that what is known is what there is."""

    def lost(self, reason: str) -> None:
        """Hear that nobody can tell what there is now; what was known stays."""


@dataclass(frozen=True, slots=True)
class Resource(Generic[T]):
    """A kind of objects, as the API server calls it, and how they are read."""

    version: str
    """Group and version, as in ``apiVersion``."""
    plural: str
    type: type[T]

    def path(self, namespace: str) -> str:
        """Return where those of a namespace are."""
        root = "apis" if "/" in self.version else "api"
        return f"/{root}/{self.version}/namespaces/{namespace}/{self.plural}"


class ListWatch(Generic[T]):
    """The objects of one kind in a namespace, or those of them that selectors choose.

    What is known stays as it is while the API server is away. An object that makes no sense leaves the
    others as they are, and what was known of it. A kind that is ``optional`` may be unknown to the API
    server: then there are no such objects.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource[T],
        namespace: str,
        watcher: Watcher,
        *,
        labels: str | None = None,
        fields: str | None = None,
        optional: bool = False,
    ) -> None:
        self.objects: dict[str, T] = {}
        """By name."""
        self.listed = False
        """Whether it is known which there are."""
        self._api = api
        self._what = f"{resource.plural} in namespace {namespace}"
        self._path = resource.path(namespace)
        self._watcher = watcher
        self._selectors = {
            key: value for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value
        }
        self._read = msgspec.json.Decoder(resource.type).decode
        self._optional = optional
        self._version: str | None = None
        """Up to where all is known, as the API server calls it; ``None``: it must be listed."""
        self._backoff = Backoff()
        self._told: set[str] = set()
        """Kinds of the problems that were told since all was well."""
        self._senseless: dict[str, str] = {}
        """What makes no sense, by name: it is logged once."""

    async def follow(self) -> None:
        """Keep in step until this is cancelled."""
        while True:
            try:
                if self._version is None:
                    await self._list()
                await self._watch()
            except Problem as problem:
                await self._pause(problem)

    async def _pause(self, problem: Problem) -> None:
        """Wait after a problem, and tell of it unless it is an everyday one that follows no other."""
        if self._optional and problem.code == 404 and not self.listed:
            self._watcher.changed()
            await asyncio.sleep(ABSENT_S)
            return
        pause = self._backoff.pause()
        everyday = problem.kind in (CUT, SILENT) or problem.code == 410
        if pause or problem.kind != CUT:
            self._version = None
        unanswered = self._optional and problem.code is None  # the watch of what must be there tells that
        if (pause or not everyday) and not unanswered and problem.kind not in self._told:
            self._told.add(problem.kind)
            self._watcher.lost(f"{self._what}: {problem}")
        log.debug("%s: %s; again in %.1f s", self._what, problem, pause)
        await asyncio.sleep(max(pause, problem.retry_after))

    def _is_steady(self) -> None:
        self._backoff.reset()
        self._told.clear()
        self._watcher.alive()

    async def _list(self) -> None:
        found: dict[str, T] = {}
        names: set[str] = set()
        parameters = {**self._selectors, "limit": str(PAGE)}
        while True:
            body = await self._api.get(self._path, parameters)
            try:
                page = _LIST.decode(body)
            except msgspec.MsgspecError as error:
                raise Problem("nonsense", f"the API server's list makes no sense: {error}") from None
            names.update(self._take(raw, found).name for raw in page.items or ())
            if not page.metadata.continue_:
                break
            parameters["continue"] = page.metadata.continue_
        self._version = page.metadata.resource_version
        self.objects, self.listed = found, True
        self._senseless = {name: why for name, why in self._senseless.items() if name in names}
        self._watcher.changed()

    async def _watch(self) -> None:
        """Follow what changes until the watch ends in good order."""
        loop = asyncio.get_running_loop()
        parameters = {
            **self._selectors,
            "watch": "1",
            "resourceVersion": self._version or "",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(*WATCH_S)),
        }
        async with await self._api.watch(self._path, parameters) as watch:
            begun = loop.time()
            steady = loop.call_later(STEADY_S, self._is_steady)
            try:
                while (lines := await watch.lines()) is not None:
                    self._take_all(lines)
                    if steady.when() < loop.time():
                        self._watcher.alive()
            finally:
                steady.cancel()
        if loop.time() - begun < STEADY_S:
            raise Problem(CUT, "the watch ends at once")

    def _take_all(self, lines: list[bytes]) -> None:
        try:
            for line in lines:
                self._take_event(line)
        finally:
            self._watcher.changed()

    def _take_event(self, line: bytes) -> None:
        try:
            event = _EVENT.decode(line)
            if event.type == "BOOKMARK":
                self._version = _BOOKMARK.decode(event.object).metadata.resource_version or self._version
            elif event.type == "ERROR":
                status = _STATUS.decode(event.object)
                raise refusal(status, status.code or 500)
            elif event.type == "DELETED":
                metadata = _NAMED.decode(event.object).metadata
                self.objects.pop(metadata.name, None)
                self._senseless.pop(metadata.name, None)
                self._version = metadata.resource_version or self._version
            elif event.type in ("ADDED", "MODIFIED"):
                found = self._take(event.object, self.objects)
                self._version = found.resource_version or self._version
        except msgspec.MsgspecError as error:
            raise Problem("nonsense", f"the API server's watch makes no sense: {error}") from None

    def _take(self, raw: msgspec.Raw, objects: dict[str, T]) -> Metadata:
        """Take an object as it is now, or keep it as it was."""
        try:
            found = self._read(raw)
        except msgspec.MsgspecError as error:
            return self._leave(raw, str(error), objects)
        self._senseless.pop(found.metadata.name, None)
        objects[found.metadata.name] = found
        return found.metadata

    def _leave(self, raw: msgspec.Raw, why: str, objects: dict[str, T]) -> Metadata:
        """Keep an object that makes no sense as it was, if it was known."""
        try:
            metadata = _NAMED.decode(raw).metadata
        except msgspec.MsgspecError:
            metadata = Metadata("")
        if (before := self.objects.get(metadata.name)) is not None:
            objects[metadata.name] = before
        if self._senseless.get(metadata.name) != why:
            self._senseless[metadata.name] = why
            log.warning("%s: %r makes no sense and is left as it was: %s", self._what, metadata.name, why)
        return metadata
