"""A simulated vLLM instance as a process: ``python -m vllm_pd_scheduler.sim.server --port 8100``."""

import asyncio
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

from ..system.parent_death import die_with_parent
from .api import Api
from .engine import Engine
from .metrics import Metrics
from .options import Options, parse_options
from .protocols import connector_of
from .ranks import Ranks
from .worker import Worker

if TYPE_CHECKING:
    from .kv_events import Publisher


async def serve(options: Options) -> int:
    """Serve until SIGTERM, SIGINT or the engine's death; return the exit code, 1 if the engine died.

    Raise OSError if the port cannot be bound.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ranks = _ranks(options, stop.set)
    api = Api(options, ranks)
    # The engine learns by the cancellation of a handler that its client has left. As in vLLM, a body is taken
    # as it is, whatever its content-encoding says.
    runner = web.AppRunner(
        api.application(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.1,
        auto_decompress=False,
    )
    await runner.setup()
    publishing = [loop.create_task(each.run()) for each in _publishers(options, ranks)]
    stepping = [loop.create_task(worker.run()) for worker in ranks.workers]
    for each in stepping:
        each.add_done_callback(lambda _: None if ranks.dead else stop.set())
    try:
        tls = options.ssl_context()
        site = web.TCPSite(
            runner,
            options.host,
            options.port,
            reuse_port=options.reuse_port or None,
            backlog=1024,
            ssl_context=tls,
        )
        await site.start()
        port = api.port = runner.addresses[0][1]
        if tls:  # as with NIXL, transfers use a port of their own, without TLS
            await web.TCPSite(runner, options.host, 0).start()
            api.port = runner.addresses[1][1]
        scheme = "https" if tls else "http"
        print(f"{options.role} instance of {options.model} on {scheme}://{options.host}:{port}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()
        for each in (*stepping, *publishing):
            each.cancel()
            with suppress(asyncio.CancelledError):
                await each
        for worker in ranks.workers:
            await worker.close()
            await worker.connector.close()
    return 1 if ranks.dead else 0


def _ranks(options: Options, on_death: Callable[[], None]) -> Ranks:
    """Return the engines, with one set of metrics."""
    workers: list[Worker] = []
    metrics: Metrics | None = None
    offloads = options.kv_connector == "offloading-p2p"  # it waits by itself, and never fails a request
    own_id = options.engine_id or str(uuid.uuid4())
    for rank in range(options.data_parallel_size):
        engine = Engine(options.profile)
        metrics = Metrics(engine, options.model, rank, metrics)
        worker = Worker(
            engine,
            metrics,
            connector_of(options, rank),
            engine_id=own_id if options.data_parallel_size == 1 else f"{own_id}_dp{rank}",
            agent=uuid.uuid4().hex,
            recompute=options.recompute or offloads,
            fail_delay=0.0 if offloads else options.fail_delay,
            on_death=on_death,
        )
        workers.append(worker)
    return Ranks(workers)


def _publishers(options: Options, ranks: Ranks) -> list["Publisher"]:
    """Return what publishes the engines' KV events, if that is asked for."""
    if options.kv_events_port is None:
        return []
    from .kv_events import Publisher  # its package is an extra

    found, replay = [], options.kv_events_replay_port
    for rank, worker in enumerate(ranks.workers):
        engine = worker.engine
        worker.publisher = Publisher(
            engine.pool,
            engine.profile.block_size,
            options.host,
            options.kv_events_port + rank,
            None if replay is None else replay + rank,
            rank,
        )
        found.append(worker.publisher)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a server with command line arguments and return the exit code."""
    options = parse_options(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(options))
    except OSError as error:
        print(f"cannot serve on {options.host}:{options.port}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
