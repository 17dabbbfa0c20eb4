# SPDX-License-Identifier: Apache-2.0
"""Middleware around every request: it checks the sender, adds headers and logs.

The log has the method, the declared route, the status and the time of each request. For
an unexpected error it has the type and the place in the code. The log never has an
address, a query, a header, a body or the text of an unexpected error, because these may
contain tokens, keys and the requests of users.
"""

import contextlib
import ipaddress
import socket
import sys
import time
import traceback
import urllib.parse

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synister_jax.serve.service import SAFE_METHODS

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": (
        "camera=(), clipboard-read=(), display-capture=(), geolocation=(), "
        "microphone=(), payment=(), usb=()"
    ),
    "Cache-Control": "no-store",
}


# The largest body that FastAPI reads as a whole. The routes in `_STREAMED` read their
# bodies piece by piece, with a limit of their own (uploads.py).
_MOST_BYTES = 64 << 10
_STREAMED = ("/api/checks", "/api/jobs")


class Guard:
    """The ASGI middleware that guards the service.

    Args:
      app: The application that answers the requests.
      host: The host name or address at which the server listens.
      public_url: The address of the proxy in front of the server, or None.
    """

    def __init__(self, app: ASGIApp, host: str, public_url: str | None) -> None:
        self._app = app
        public = urllib.parse.urlsplit(public_url or "")
        names = {"localhost", host.lower(), public.hostname, socket.gethostname()}
        self._names = {name.lower() for name in names if name}
        self._https = public.scheme == "https"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if self._https:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
            await send(message)

        if scope["path"] not in _STREAMED:
            receive = _bounded(receive)
        try:
            refused = self._refuse(scope)
            await (refused or self._app)(scope, receive, send_guarded)
        except ClientDisconnect:
            status = status or 499  # the client has gone, so nobody reads an answer
        except Exception as error:
            _tell(error)
            if status:
                raise ConnectionAbortedError from None  # the answer stays incomplete
            why = {"detail": "unexpected error; the log of the server says where"}
            await JSONResponse(why, 500)(scope, receive, send_guarded)
        finally:
            found = scope.get("route")
            route = getattr(found, "path_format", getattr(found, "path", "-"))
            milliseconds = 1000 * (time.perf_counter() - started)
            line = f"{scope['method']} {route} {status} {milliseconds:.0f} ms"
            with contextlib.suppress(OSError):  # nobody reads the log any more
                print(line, flush=True)

    def _refuse(self, scope: Scope) -> ASGIApp | None:
        """Returns an error answer for a forbidden request, or None for an allowed one.

        Allowed are requests of the service's own pages and of programs. A page of
        another site could let its own host name point to this machine, to read the
        answers (DNS rebinding). So the header Host must have a known name. An IP
        address is always allowed, because it cannot be pointed elsewhere.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(f"//{host}"):
            why = {
                "detail": "the service is not known by this host name; see --public_url"
            }
            return JSONResponse(why, 400)
        if scope["path"] not in _STREAMED and _is_large(headers):
            return JSONResponse({"detail": "the body is too large"}, 413)
        if scope["method"] in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        same = headers.get("sec-fetch-site", "none") in ("same-origin", "none")
        if same and (origin is None or self._is_own(origin, host)):
            return None
        return JSONResponse({"detail": "a page of another site sent this request"}, 403)

    def _is_ours(self, address: str) -> bool:
        try:
            name = urllib.parse.urlsplit(address).hostname or ""
            if name in self._names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_own(self, origin: str, host: str) -> bool:
        """Returns whether an origin (with its port) belongs to this service."""
        try:
            there = urllib.parse.urlsplit(origin)
            # A proxy may send another host name than the browser sent to the proxy.
            public = self._https and there.hostname in self._names
        except ValueError:
            return False
        return there.netloc.lower() == host.lower() or public


def _is_large(headers: Headers) -> bool:
    given = headers.get("content-length", "0")
    return not given.isdecimal() or int(given[:20]) > _MOST_BYTES


def _bounded(receive: Receive) -> Receive:
    """Raises ValueError after `_MOST_BYTES`, even if the headers name less."""
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _MOST_BYTES:
            raise ValueError("the body is too large")  # FastAPI answers 400
        return message

    return receive_bounded


def _tell(error: Exception) -> None:
    where = traceback.extract_tb(error.__traceback__)
    lines = traceback.format_list(where)
    with contextlib.suppress(OSError):
        print(
            f"{''.join(lines)}{type(error).__qualname__}", file=sys.stderr, flush=True
        )
