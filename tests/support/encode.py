"""Encode instances that are no I/O, and chats with images."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from vllm_pd_scheduler.fleet.endpoint import Endpoint
from vllm_pd_scheduler.handoff.interfaces import PrefillAnswer


def image(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"https://example.com/{name}.png"}}


def chat(*names: str, **more: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "What is this?"}, *map(image, names)]
    return {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 9, **more}


def where(name: str) -> dict[str, Any]:
    return {"peer_host": "10.0.0.3", "size_bytes": len(name)}


def told(params: Any) -> PrefillAnswer:
    return PrefillAnswer(200, "application/json", json.dumps({"ec_transfer_params": params}).encode())


class EncodeLeg:
    """Answers with an encoding for each item, unless an instance is told to do something else."""

    def __init__(self) -> None:
        self.answers: dict[str, PrefillAnswer | Exception] = {}
        self.sent: list[tuple[str, str]] = []
        self.ids: list[str | None] = []
        self.parents: list[str | None] = []
        self.running = self.most = 0
        self.hold: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def __call__(
        self, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes, own: Mapping[str, str]
    ) -> PrefillAnswer:
        (item,) = json.loads(body)["messages"][0]["content"]
        name = item["image_url"]["url"].rpartition("/")[2].removesuffix(".png")
        self.sent.append((endpoint.id, name))
        self.ids.append(own.get("x-request-id"))
        self.parents.append(own.get("traceparent"))
        self.running += 1
        self.most = max(self.most, self.running)
        self.entered.set()
        try:
            if self.hold is not None:
                await self.hold.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self.running -= 1
        found = self.answers.get(endpoint.id, told({f"hash-{name}": where(name)}))
        if isinstance(found, Exception):
            raise found
        return found

    def of(self, name: str) -> list[str]:
        return [endpoint for endpoint, item in self.sent if item == name]
