"""A client that speaks to simulated instances."""

import json
from typing import Any

import aiohttp

from tests.support.sim_fleet import SimInstance

PROMPT = "Prefill and decode are apart; the cache travels. " * 12
SEND = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY = {"prompt": PROMPT, "max_tokens": 24}
HELLO = {"messages": [{"role": "user", "content": "Hello there"}]}


class Client:
    """Posts to instances and keeps the last status and headers."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.status = 0
        self.headers: dict[str, str] = {}

    async def get(self, instance: SimInstance, path: str) -> Any:
        async with self.session.get(instance.url + path) as response:
            return await self._read(response)

    async def post(self, instance: SimInstance, path: str, body: Any, **headers: str) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        async with self.session.post(instance.url + path, data=data, headers=headers) as response:
            return await self._read(response)

    async def _read(self, response: aiohttp.ClientResponse) -> Any:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        text = await response.text()
        if response.content_type == "text/event-stream":
            events = text.split("\n\n")
            assert events.pop() == ""
            return [event.removeprefix("data: ") for event in events]
        return json.loads(text) if response.content_type == "application/json" else text

    async def prefill(self, instance: SimInstance, body: dict[str, Any], path: str = COMPLETIONS) -> Any:
        answer = await self.post(instance, path, {**body, "max_tokens": 1, "kv_transfer_params": SEND})
        return answer["kv_transfer_params"]

    async def text(self, instance: SimInstance, body: dict[str, Any], params: Any = None) -> str:
        more = {"kv_transfer_params": params} if params else {}
        answer = await self.post(instance, COMPLETIONS, {**body, **more})
        assert self.status == 200, answer
        return str(answer["choices"][0]["text"])

    async def stats(self, instance: SimInstance) -> dict[str, Any]:
        stats: dict[str, Any] = await self.get(instance, "/_sim/stats")
        return stats

    async def last(self, instance: SimInstance) -> dict[str, Any]:
        entry: dict[str, Any] = (await self.get(instance, "/_sim/requests"))[-1]
        return entry

    async def metric(self, instance: SimInstance, name: str, label: str = "") -> float:
        """The value of the one series with that name, and with that label if one is given."""
        lines = (await self.get(instance, "/metrics")).splitlines()
        found = [line for line in lines if line.startswith(name + "{") and label in line]
        assert len(found) == 1, (name, found)
        return float(found[0].rsplit(" ", 1)[1])
