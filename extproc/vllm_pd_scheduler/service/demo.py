"""The demonstration: a simulated fleet, alone (``sim``) or behind the scheduler and Envoy (``demo``)."""

from __future__ import annotations

import json
import shlex
import signal
import time

import aiohttp
from rich.console import Console

from ..config import SchedulerConfig
from ..envoy.ports import EnvoyPorts
from ..models import join_address
from ..request import headers as names
from ..sim.fleet import Fleet, FleetError
from ..sim.options import KvConnector
from .run import Started

_BODY = {
    "messages": [{"role": "user", "content": "What are prefill and decode?"}],
    "max_tokens": 40,
    "stream": True,
}


class Demo(Fleet):
    """A simulated fleet on unused ports, and what to print once everything in front of it runs."""

    def show(self, config: SchedulerConfig, ports: EnvoyPorts) -> Started:
        """Return what sends a streamed request through Envoy, and prints its answer and the addresses."""

        async def started() -> None:
            console = Console(highlight=False, soft_wrap=True)
            url = f"http://127.0.0.1:{ports.ingress}/v1/chat/completions"
            await _show_answer(console, url)
            admin = f"http://{join_address(config.admin_host, config.admin_port)}"
            console.print()
            console.print(f"  listener        http://127.0.0.1:{ports.ingress}   (OpenAI API)")
            console.print(f"  dashboard       {admin}/")
            console.print(f"  metrics         {admin}/metrics")
            console.print(f"  Envoy's admin   http://127.0.0.1:{ports.admin}")
            console.print()
            for each in self.instances:
                address = join_address(each.host, each.port)
                console.print(f"  {each.id:<14}  {address:<21}  process {each.process.pid}")
            self._show_what_to_try(console, url, f"{admin}/instances")
            console.print("\nCtrl-C ends everything.")

        return started

    def _show_what_to_try(self, console: Console, url: str, instances: str) -> None:
        body = shlex.quote(json.dumps(_BODY))
        prefill, decode = self.prefill[0], self.decode[0]
        tries = {
            "Ask again; the headers say who served it:": [
                f"curl -Ni {url} -H 'content-type: application/json' -d {body}"
            ],
            "See what the scheduler knows of each instance:": [f"curl -s {instances} | python3 -m json.tool"],
            "Take one out of service, and back. What runs there ends first:": [
                f"curl -X POST {instances}/{decode.id}/drain",
                f"curl -X POST {instances}/{decode.id}/undrain",
            ],
            "Kill a P and a D, and ask again. The others answer:": [
                f"kill -9 {prefill.process.pid} {decode.process.pid}"
            ],
        }
        console.print("\n[bold]Try it[/bold], in another terminal:")
        for what, commands in tries.items():
            console.print(f"\n  {what}")
            for command in commands:
                console.print(f"    {command}", markup=False)


async def _show_answer(console: Console, url: str) -> None:
    """Send the request and print its answer as it comes, who served it, and the time to first token."""
    console.print(f"\n[bold]POST {url}[/bold]  {_BODY['messages'][0]['content']!r}\n")  # type: ignore[index]
    start, first = time.monotonic(), 0.0
    async with aiohttp.ClientSession() as session, session.post(url, json=_BODY) as response:
        if response.status != 200:
            console.print(f"  {response.status}: {await response.text()}", markup=False)
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.monotonic()
            choices = json.loads(line.removeprefix(b"data: "))["choices"]
            if choices:
                text = choices[0]["delta"].get("content") or ""
                console.print(text, end="", style="green", markup=False)
        console.print(
            f"\n\n  prefilled by {response.headers.get(names.PREFILL)}, decoded by "
            f"{response.headers.get(names.DECODE)}; first token after {(first - start) * 1000:.0f} ms"
        )


def run_sim(prefill: int, decode: int, base_port: int, connector: KvConnector) -> int:
    """Run a simulated fleet until SIGTERM or Ctrl-C; return the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the same as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        with Fleet(prefill, decode, base_port=base_port, connector=connector) as fleet:
            console.print_json(json.dumps(fleet.config()))
            Console(stderr=True).print("Ctrl-C ends them.")
            while True:
                time.sleep(1.0)  # signal.pause() would not see a signal that came just before it
    except KeyboardInterrupt:
        return 0
    except (FleetError, ValueError) as error:
        Console(stderr=True).print(f"vllm-pd-scheduler: {error}", markup=False, soft_wrap=True)
        return 1
    return 0
