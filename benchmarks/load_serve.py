# SPDX-License-Identifier: Apache-2.0
"""Many people at the web page at once: how fast it says how far their jobs are.

    python benchmarks/load_serve.py [--models=DIR] [--positions=TABLE] [--seconds=60]

Starts `python -m synister_jax.serve` with one worker on this machine, by default with
the demonstration's model (`make demo`). Then 250 clients on 127.0.0.1, each with a
connection of its own, share 10 tokens: 50 hand in jobs of a few positions, each its
next one when the last is done, and 200 ask how far the last job of their token is,
once a second as the page does. After `--seconds` nobody hands in any more; the jobs
that are under way are waited for, and each answer has as many rows as were asked.
At last the 200 ask without a pause, for `--flat_out_seconds`. Server, worker and
clients share this machine's cores.

Prints one line of JSON: requests by kind and status, errors, milliseconds of the status
call, jobs, and the most memory that the page's process had. Exit code 1 where any
answer was none of 200 and 201, a connection broke, or a job did not end well.
"""

import asyncio
import collections
import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import page_server
import side_by_side
from absl import flags
from pyarrow import feather

from synister_jax.base import command
from synister_jax.base.errors import UserError

_TOKENS = 10
_POLL_SECONDS = 1.0
_MOST_SECONDS = 300.0  # to wait for the last jobs
_OVER = ("done", "failed", "cancelled")


class _Broken(Exception):
    """The answer is not what it should be."""


class _Client:
    """One connection that is kept, with one token."""

    def __init__(self, server: page_server.Server, token: str) -> None:
        self._port = server.port
        self._head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {token}"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[int, bytes, float]:
        """(status, body, seconds)."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        started = time.perf_counter()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}\r\n"
        if method == "POST":
            head += f"Content-Type: text/csv\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = answer.split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines if line)
        if "content-length" in fields:
            content = await reader.readexactly(int(fields["content-length"]))
        else:
            content = await _chunks(reader)
        seconds = time.perf_counter() - started
        if fields.get("connection") == "close":
            self.close()
        return int(status_line.split()[1]), content, seconds

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    content = b""
    while size := int(await reader.readline(), 16):
        content += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return content


class _Load:
    """What all clients share: the server's last jobs, and what was counted."""

    def __init__(
        self, server: page_server.Server, positions: np.ndarray, rows: int
    ) -> None:
        self.server, self._positions, self._rows = server, positions, rows
        self.requests: dict[str, collections.Counter[str]] = {}
        self.errors: list[str] = []
        self.milliseconds: list[float] = []
        self.last: dict[str, str] = {}
        self.submitted: set[str] = set()
        self.finished = 0

    async def ask(
        self, client: _Client, kind: str, method: str, path: str, body: bytes = b""
    ) -> bytes:
        """The body of an answer 200 or 201; everything is counted.

        Raises:
          _Broken: another status, or the connection broke.
        """
        counts = self.requests.setdefault(kind, collections.Counter())
        try:
            status, content, seconds = await client.ask(method, path, body)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            client.close()
            counts[type(error).__name__] += 1
            self.errors.append(f"{method} {path}: {type(error).__name__}: {error}")
            raise _Broken from None
        counts[str(status)] += 1
        if kind == "status":
            self.milliseconds.append(1000 * seconds)
        if status not in (200, 201):
            self.errors.append(f"{method} {path}: {status} {content[:300]!r}")
            raise _Broken
        return content

    async def watch(self, token: str, until: float, pause: float) -> None:
        """Asks for the state of the token's last job again and again."""
        client = _Client(self.server, token)
        await asyncio.sleep(pause * np.random.default_rng().random())
        while time.monotonic() < until:
            started = time.monotonic()
            with contextlib.suppress(_Broken):
                await self.ask(client, "status", "GET", f"/api/jobs/{self.last[token]}")
            await asyncio.sleep(max(0.0, started + pause - time.monotonic()))
        client.close()

    async def work(self, token: str, number: int, until: float) -> None:
        """Hands in one job after the other, and waits for each."""
        client = _Client(self.server, token)
        rng = np.random.default_rng(number)
        while time.monotonic() < until:
            with contextlib.suppress(_Broken):
                await self._one_job(client, token, rng)
        client.close()

    async def _one_job(
        self, client: _Client, token: str, rng: np.random.Generator
    ) -> None:
        chosen = rng.choice(len(self._positions), self._rows, replace=False)
        lines = [",".join(map(str, row)) for row in self._positions[chosen].tolist()]
        body = "\n".join(["position_id,x,y,z", *lines]).encode()
        path = f"/api/jobs?model={self.server.model}&source=none&kind=positions"
        job = json.loads(await self.ask(client, "submit", "POST", path, body))
        if job["id"] in self.submitted:
            self.errors.append(f"job {job['id']} was given twice")
        self.submitted.add(job["id"])
        self.last[token] = job["id"]
        latest = time.monotonic() + _MOST_SECONDS
        while job["state"] not in _OVER and time.monotonic() < latest:
            await asyncio.sleep(_POLL_SECONDS)
            path = f"/api/jobs/{job['id']}"
            job = json.loads(await self.ask(client, "status", "GET", path))
        if job["state"] != "done":
            self.errors.append(f"job {job['id']}: {job['state']}, {job['message']}")
            raise _Broken
        path = f"/api/jobs/{job['id']}/predictions.csv"
        table = await self.ask(client, "predictions.csv", "GET", path)
        if len(table.splitlines()) != self._rows + 1:
            self.errors.append(f"job {job['id']}: {len(table.splitlines())} lines")
        self.finished += 1


def _summary(milliseconds: Sequence[float], seconds: float) -> dict[str, float]:
    p50, p95, p99 = np.percentile(milliseconds or [np.nan], [50, 95, 99]).round(2)
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "max_ms": round(max(milliseconds, default=np.nan), 2),
        "per_second": round(len(milliseconds) / seconds, 1),
    }


async def _run(
    load: _Load, pollers: int, submitters: int, seconds: float, flat_out: float
) -> dict[str, Any]:
    tokens = list(load.server.tokens.values())

    async def all_of(
        count: int, start: Callable[[str, int], Coroutine[Any, Any, None]]
    ) -> None:
        await asyncio.gather(*(start(tokens[n % len(tokens)], n) for n in range(count)))

    # A token's watchers need a job to watch.
    now = time.monotonic()
    await all_of(_TOKENS, lambda token, n: load.work(token, 1_000_000 + n, now + 0.01))
    load.milliseconds.clear()
    started = time.monotonic()
    until = started + seconds
    await asyncio.gather(
        all_of(submitters, lambda token, n: load.work(token, n, until)),
        all_of(pollers, lambda token, n: load.watch(token, until, _POLL_SECONDS)),
    )
    report = {"status_call": _summary(load.milliseconds, seconds)}
    report["seconds_until_the_last_job"] = round(time.monotonic() - started, 1)
    load.milliseconds.clear()
    until = time.monotonic() + flat_out
    await all_of(pollers, lambda token, n: load.watch(token, until, 0.0))
    report["status_call_flat_out"] = _summary(load.milliseconds, flat_out)
    return report


def main() -> None:
    models = flags.DEFINE_string("models", None, "Folder; default the demonstration.")
    default = str(page_server.ROOT / "demo" / "synapses.feather")
    table = flags.DEFINE_string("positions", default, "Synapses in the volume.")
    seconds = flags.DEFINE_float("seconds", 60, "Of handing in and asking.", 1, 3600)
    flat_out = flags.DEFINE_float("flat_out_seconds", 10, "Without pauses.", 1, 600)
    pollers = flags.DEFINE_integer("pollers", 200, "Clients that ask.", 1, 1000)
    submitters = flags.DEFINE_integer("submitters", 50, "That hand in.", 1, 1000)
    rows = flags.DEFINE_integer("rows", 20, "Positions a job.", 1, 1000)
    command.run(
        lambda: _measure(
            models.value,
            pathlib.Path(table.value),
            rows.value,
            (pollers.value, submitters.value),
            (seconds.value, flat_out.value),
        )
    )


def _measure(
    models: str | None,
    table: pathlib.Path,
    rows: int,
    clients: tuple[int, int],
    seconds: tuple[float, float],
) -> None:
    columns = feather.read_table(table, ["synapse_id", "x_nm", "y_nm", "z_nm"])
    ids, *xyz = (column.to_numpy() for column in columns)
    positions = np.array(list(zip(ids, *xyz, strict=True)), dtype=object)
    names = [f"load{n}" for n in range(_TOKENS)]
    # The limits of a token are not what is measured here.
    lifted = ("--most_jobs=1000", "--requests_per_minute=100000000")
    with page_server.running(models, names, *lifted) as server:
        load = _Load(server, positions, rows)
        report = asyncio.run(_run(load, *clients, *seconds))
        peak = server.peak_rss_bytes()
        if page_server.FRAME in server.log():
            load.errors.append("the server's log has a traceback")
            print(server.log()[-5000:], file=sys.stderr)
    for error in load.errors[:20]:
        print(error, file=sys.stderr)
    report |= {
        "benchmark": "load_serve",
        "pollers": clients[0],
        "submitters": clients[1],
        "seconds": seconds[0],
        "rows_a_job": rows,
        "requests": {kind: dict(counts) for kind, counts in load.requests.items()},
        "errors": len(load.errors),
        "jobs_submitted": len(load.submitted),
        "jobs_finished": load.finished,
        "server_peak_rss_mb": round(peak / 1e6, 1),
    }
    print(json.dumps(report | side_by_side.about("synister_jax", "uvicorn", "fastapi")))
    if load.errors or load.finished != len(load.submitted):
        raise UserError(f"{len(load.errors)} errors; see above")


if __name__ == "__main__":
    main()
