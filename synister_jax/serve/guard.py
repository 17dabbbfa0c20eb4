# SPDX-License-Identifier: Apache-2.0
"""Around every request: who may send it, headers of the answer, a line in the log.

The log has the method, the route as it is declared, the status and the time, and of an
error that nobody foresaw its type and where it was. Never an address, a query, a header
or a body, nor the text of such an error: tokens, keys and what people ask are in these.
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


# Of a body that a framework reads as a whole; what streams its own has its own limit.
_MOST_BYTES = 64 << 10
_STREAMED = ("/api/checks", "/api/jobs")


class Guard:
    """ASGI middleware.

    Args:
      host: that the server listens at.
      public_url: how browsers reach it, where that is not directly.
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
            status = status or 499  # nobody reads an answer
        except Exception as error:
            _tell(error)
            if status:
                raise ConnectionAbortedError from None  # the rest will not come
            why = {"detail": "something went wrong here; the server's log says where"}
            await JSONResponse(why, 500)(scope, receive, send_guarded)
        finally:
            found = scope.get("route")
            route = getattr(found, "path_format", getattr(found, "path", "-"))
            milliseconds = 1000 * (time.perf_counter() - started)
            line = f"{scope['method']} {route} {status} {milliseconds:.0f} ms"
            with contextlib.suppress(OSError):  # whoever read the log has gone
                print(line, flush=True)

    def _refuse(self, scope: Scope) -> ASGIApp | None:
        """The answer to what is not sent by a page of ours or by no page at all.

        A name that leads to this machine, but is none of its own, is a page of another
        site that would read our answers (DNS rebinding). With a number instead of a
        name that cannot be.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(f"//{host}"):
            why = {"detail": "this service has another name; see --public_url"}
            return JSONResponse(why, 400)
        if scope["path"] not in _STREAMED and _is_large(headers):
            return JSONResponse({"detail": "the body is too large"}, 413)
        if scope["method"] in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        same = headers.get("sec-fetch-site", "none") in ("same-origin", "none")
        if same and (origin is None or self._is_own(origin, host)):
            return None
        return JSONResponse({"detail": "this was sent by a page of another site"}, 403)

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
        """Whether a page of that origin is one of ours; ports are told apart."""
        try:
            there = urllib.parse.urlsplit(origin)
            # Behind https the proxy may give us another host than the browser's.
            public = self._https and there.hostname in self._names
        except ValueError:
            return False
        return there.netloc.lower() == host.lower() or public


def _is_large(headers: Headers) -> bool:
    given = headers.get("content-length", "0")
    return not given.isdecimal() or int(given[:20]) > _MOST_BYTES


def _bounded(receive: Receive) -> Receive:
    """Fails after `_MOST_BYTES`, whatever the length that the headers name."""
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _MOST_BYTES:
            raise ValueError("the body is too large")  # 400: it cannot be read
        return message

    return receive_bounded


def _tell(error: Exception) -> None:
    where = traceback.extract_tb(error.__traceback__)
    lines = traceback.format_list(where)
    with contextlib.suppress(OSError):
        print(
            f"{''.join(lines)}{type(error).__qualname__}", file=sys.stderr, flush=True
        )
