# SPDX-License-Identifier: Apache-2.0
"""Malformed requests, given as bytes, and the function that sends them."""

import contextlib
import dataclasses
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_BYTES = 16 << 20  # the service refuses a larger table
_WAIT_SECONDS = 30.0
_CUT_SECONDS = 10.0  # for a request that stays incomplete


@dataclasses.dataclass(frozen=True)
class Target:
    """The credentials that a request needs, and the ids of what exists on the server.

    Attributes:
      job: Id of a finished job of the token. `other_job` belongs to another token.
      cookie: Cookie of a session of the token. `csrf` is the secret of the session.
      positions: Rows of id, neuron, x, y, z.
    """

    port: int
    token: str
    cookie: str
    csrf: str
    model: str
    job: str
    other_job: str
    view_key: str
    positions: Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The bytes to send, and what is known about the answer beforehand.

    Attributes:
      whole: Whether the bytes are a complete HTTP/1.1 request, which must be answered.
      leave: Whether the client disconnects without reading the answer.
      refused: Whether a 2xx answer would be an error of the server.
    """

    path: str
    pieces: tuple[bytes, ...]
    pause: float = 0.0
    whole: bool = True
    leave: bool = False
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer. If none came, `status` is 0 and `how` says what happened."""

    status: int
    how: str
    fields: dict[str, str]
    body: bytes
    seconds: float


def one(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """Returns one of the choices, without a conversion to NumPy."""
    return choices[rng.integers(len(choices))]


def request(
    target: Target,
    method: str,
    path: str,
    fields: Sequence[str] = (),
    body: bytes | None = None,
    login: bool = True,
    host: bool = True,
) -> bytes:
    """Returns a valid HTTP/1.1 request, to which the arguments add malformed parts.

    Args:
      fields: More lines of the head. Bytes that are not UTF-8 are surrogate escapes.
      login: Whether the request has the token.
      host: Whether the request has the field Host.
    """
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"Host: 127.0.0.1:{target.port}"] * host
    lines += [f"Authorization: Bearer {target.token}"] * login
    lines += ["Connection: close", *fields]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")
    return head + (body or b"")


def send(target: Target, attempt: Attempt) -> Answer:
    """Sends an attempt over a new connection, and returns the answer."""
    started = time.perf_counter()
    received = b""
    how = "closed"
    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as link:
        link.settimeout(_WAIT_SECONDS if attempt.whole else _CUT_SECONDS)
        try:
            for piece in attempt.pieces:
                _push(link, piece)
                time.sleep(attempt.pause)
            if attempt.leave:
                return Answer(0, "left", {}, b"", time.perf_counter() - started)
            if not attempt.whole:
                with contextlib.suppress(OSError):  # the server has already closed
                    link.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            how = "reset while sending"
        try:
            while more := link.recv(1 << 20):
                received += more
        except TimeoutError:
            how = "no answer in time"
        except ConnectionResetError:
            how = "reset" if how == "closed" else how
    return _parsed(received, how, time.perf_counter() - started)


def _push(link: socket.socket, piece: bytes) -> None:
    """Sends a piece, but stops as soon as an answer arrives, as curl does."""
    view = memoryview(piece)
    while view:
        readable, writable, _ = select.select([link], [link], [], _WAIT_SECONDS)
        if readable or not writable:
            return
        view = view[link.send(view[: 1 << 16]) :]


def _parsed(received: bytes, how: str, seconds: float) -> Answer:
    while received.startswith(b"HTTP/1.1 100"):
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    split = (line.partition(":") for line in lines)
    fields = {name.lower(): value.strip() for name, _, value in split}
    # If the bytes are several requests, only the first answer is kept.
    with contextlib.suppress(KeyError, ValueError):
        body = body[: int(fields["content-length"])]
    status = 0
    with contextlib.suppress(IndexError, ValueError):
        status = int(status_line.split(" ")[1])
    return Answer(status, how, fields, body, seconds)
