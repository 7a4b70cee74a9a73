"""An HTTP server of the scheduler's: where it listens, and how what goes wrong is answered."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from ..fleet.registry import UnknownInstance
from .refusals import CannotTurn, LastRoutable, Leaving, NotKept, NotShared
from .route import Refused, Route, error_answer

log = logging.getLogger(__name__)

_of_peers = logging.getLogger(f"{__name__}.peers")
_of_peers.setLevel(logging.CRITICAL)
"""What aiohttp has to say of what is no HTTP, with a traceback each: whoever reaches the port could fill the
log. What fails here is logged by :func:`errors_as_json`."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SHUTDOWN_S = 1.0
"""Seconds that running calls get to end when the server stops.

Only streams, which end at once, and those that wait for a drain run longer than a moment; the latter notice
the shutdown within :data:`.instances_api.DRAIN_POLL_S`.
"""


class HttpServer:
    """Serves an application at one address."""

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        raise NotImplementedError

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listen on an address, without TLS if ``tls`` is ``None``; raise :exc:`OSError` if that fails.

        ``::`` is all addresses, those of IPv4 too.
        """
        everywhere = None if host == "::" else host  # which asyncio would take for IPv6 alone
        await self._listen(web.TCPSite(await self._set_up(), everywhere, port, ssl_context=tls))

    async def start_on_socket(self, path: str) -> None:
        """Listen on a Unix socket, in a directory of this user alone; raise :exc:`OSError` if that fails."""
        await self._listen(web.UnixSite(await self._set_up(), path))

    async def _listen(self, site: web.BaseSite) -> None:
        try:
            await site.start()
        except OSError:
            await self.stop()  # what the application does beside answering has begun
            raise

    async def _set_up(self) -> web.AppRunner:
        self._runner = web.AppRunner(
            self.application(),
            access_log=None,
            logger=_of_peers,
            shutdown_timeout=SHUTDOWN_S,
            auto_decompress=False,  # a few KB could take the event loop for seconds
        )
        await self._runner.setup()
        return self._runner

    async def stop(self) -> None:
        """Stop listening and close open connections."""
        if self._runner is not None:
            await self._runner.cleanup()


def add_routes(app: web.Application, routes: Iterable[Route]) -> None:
    """Have an application serve routes."""
    for route in routes:
        for method in (route.method, "HEAD") if route.reads_only else (route.method,):
            app.router.add_route(method, route.path, route.checked())


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer what a handler raises."""
    try:
        return await handler(request)
    except Refused as error:
        return error_answer(*error.args)
    except UnknownInstance as error:
        return error_answer(404, str(error))
    except (CannotTurn, LastRoutable, Leaving) as error:
        return error_answer(409, str(error))
    except NotKept as error:
        return error_answer(507, f"nothing was changed, since it could not be kept in state_file: {error}")
    except NotShared as error:
        return error_answer(503, f"the log of the replicas does not take the change: {error}")
    except web.HTTPException as error:
        headers = {"allow": error.headers["allow"]} if "allow" in error.headers else None
        more = "; GET / lists what there is" if error.status == 404 else ""
        return error_answer(error.status, f"{request.method} {request.path}: {error.reason}{more}", headers)
    except (web.RequestPayloadError, ConnectionResetError) as error:  # or it has gone: nobody reads this
        return error_answer(400, f"the body cannot be read: {type(error).__name__}")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_answer(500, "the scheduler has failed: its log says where")
