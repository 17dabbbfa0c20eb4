# SPDX-License-Identifier: Apache-2.0
"""Measures how fast the web page reports the state of jobs to many people at once.

    python -m tests.serve.fuzzing.load [--models=DIR] [--positions=TABLE] [--seconds=60]

tests/serve/test_load.py runs a few clients for some seconds; this command is for
measurements. It starts `python -m synister_jax.serve` with one worker on this machine,
by default with the demonstration's model (`make demo`). Then 250 clients on 127.0.0.1,
each with its own connection, share 10 tokens. Of these clients, 50 submit jobs of a few
positions; each submits its next job when its last job is done. The other 200 ask for
the state of the last job of their token, once a second as the page does. After
`--seconds`, no client submits a new job. The command waits for the jobs in progress,
and every answer must have as many rows as its request. At the end, the 200 clients ask
without a pause for `--flat_out_seconds`. Server, worker and clients share the cores of
this machine.

The command prints one line of JSON: requests by kind and status, errors, milliseconds
of the status call, jobs, and the peak memory of the page's process. Its exit code is 1
if any status was not 200 or 201, a connection broke, or a job did not succeed.
"""

import asyncio
import collections
import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
from absl import flags
from pyarrow import feather

from synister_jax.base import command
from synister_jax.base.errors import UserError
from tests.serve.fuzzing import page_server
from tests.serve.fuzzing.page_server import PageServer

# The limits of a token are lifted, as they would slow down the clients.
LIFTED = ("--most_jobs=1000", "--requests_per_minute=100000000")

_TOKENS = 10
_POLL_SECONDS = 1.0
_MOST_SECONDS = 300.0  # the longest wait for a job
_OVER = ("done", "failed", "cancelled")


class _Broken(Exception):
    """The answer has an unexpected status, or the connection broke."""


class _Client:
    """A client with one token, which keeps its connection open."""

    def __init__(self, server: PageServer, token: str) -> None:
        self._port = server.port
        self._head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {token}"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[int, bytes, float]:
        """Sends a request, and returns (status, body, seconds) of the answer."""
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


class Load:
    """What all clients share: the last job of every token, and the counts.

    Attributes:
      requests: Number of requests by kind and status.
      errors: One line for each thing that went wrong.
      submitted: Ids of the submitted jobs.
      finished: Number of jobs that succeeded.
    """

    def __init__(self, server: PageServer, table: pathlib.Path, rows: int) -> None:
        columns = feather.read_table(table, ["synapse_id", "x_nm", "y_nm", "z_nm"])
        self._positions = list(zip(*columns.to_pydict().values(), strict=True))
        self._server, self._rows = server, rows
        self._milliseconds: list[float] = []
        self._last: dict[str, str] = {}  # token to job id
        self.requests: dict[str, collections.Counter[str]] = {}
        self.errors: list[str] = []
        self.submitted: set[str] = set()
        self.finished = 0

    async def run(
        self, pollers: int, submitters: int, seconds: float, flat_out: float
    ) -> dict[str, Any]:
        """Runs all clients, and returns the times of the status calls."""
        # Every token gets a first job, so that the pollers have a job to ask for.
        soon = time.monotonic() + 0.01
        count = len(self._server.tokens)
        await self._all(count, lambda token, n: self._work(token, 1_000_000 + n, soon))
        self._milliseconds.clear()
        started = time.monotonic()
        until = started + seconds
        await asyncio.gather(
            self._all(submitters, lambda token, n: self._work(token, n, until)),
            self._all(pollers, lambda token, n: self._watch(token, until, 1.0)),
        )
        report = {"status_call": _summary(self._milliseconds, seconds)}
        report["seconds_until_the_last_job"] = round(time.monotonic() - started, 1)
        self._milliseconds.clear()
        until = time.monotonic() + flat_out
        await self._all(pollers, lambda token, n: self._watch(token, until, 0.0))
        report["status_call_flat_out"] = _summary(self._milliseconds, flat_out)
        return report

    async def _all(
        self, count: int, start: Callable[[str, int], Coroutine[Any, Any, None]]
    ) -> None:
        tokens = list(self._server.tokens.values())
        await asyncio.gather(*(start(tokens[n % len(tokens)], n) for n in range(count)))

    async def _watch(self, token: str, until: float, pause: float) -> None:
        """Asks for the state of the token's last job repeatedly until `until`."""
        client = _Client(self._server, token)
        await asyncio.sleep(pause * np.random.default_rng().random())
        while time.monotonic() < until:
            started = time.monotonic()
            with contextlib.suppress(_Broken):
                path = f"/api/jobs/{self._last[token]}"
                await self._ask(client, "status", "GET", path)
            await asyncio.sleep(max(0.0, started + pause - time.monotonic()))
        client.close()

    async def _work(self, token: str, number: int, until: float) -> None:
        """Submits one job after another, and waits for each of them."""
        client = _Client(self._server, token)
        rng = np.random.default_rng(number)
        while time.monotonic() < until:
            with contextlib.suppress(_Broken):
                await self._one_job(client, token, rng)
        client.close()

    async def _one_job(
        self, client: _Client, token: str, rng: np.random.Generator
    ) -> None:
        chosen = rng.choice(len(self._positions), self._rows, replace=False)
        lines = [",".join(map(str, self._positions[place])) for place in chosen]
        body = "\n".join(["position_id,x,y,z", *lines]).encode()
        path = f"/api/jobs?model={self._server.model}&source=none&kind=positions"
        job = json.loads(await self._ask(client, "submit", "POST", path, body))
        if job["id"] in self.submitted:
            self.errors.append(f"job {job['id']} was given twice")
        self.submitted.add(job["id"])
        self._last[token] = job["id"]
        path = f"/api/jobs/{job['id']}"
        latest = time.monotonic() + _MOST_SECONDS
        while job["state"] not in _OVER and time.monotonic() < latest:
            await asyncio.sleep(_POLL_SECONDS)
            job = json.loads(await self._ask(client, "status", "GET", path))
        if job["state"] != "done":
            self.errors.append(f"job {job['id']}: {job['state']}, {job['message']}")
            raise _Broken
        path += "/predictions.csv"
        table = await self._ask(client, "predictions.csv", "GET", path)
        if len(table.splitlines()) != self._rows + 1:
            self.errors.append(f"job {job['id']}: {len(table.splitlines())} lines")
        self.finished += 1

    async def _ask(
        self, client: _Client, kind: str, method: str, path: str, body: bytes = b""
    ) -> bytes:
        """Sends a request, counts the answer, and returns the body of a 200 or 201.

        Raises:
          _Broken: the status is neither 200 nor 201, or the connection broke.
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
            self._milliseconds.append(1000 * seconds)
        if status not in (200, 201):
            self.errors.append(f"{method} {path}: {status} {content[:300]!r}")
            raise _Broken
        return content


def _summary(milliseconds: Sequence[float], seconds: float) -> dict[str, float]:
    p50, p95, p99 = np.percentile(milliseconds or [np.nan], [50, 95, 99]).round(2)
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "max_ms": round(max(milliseconds, default=np.nan), 2),
        "per_second": round(len(milliseconds) / seconds, 1),
    }


def main() -> None:
    models = flags.DEFINE_string(
        "models", None, "Folder with models.toml; without it, the demonstration."
    )
    table = flags.DEFINE_string(
        "positions", page_server.DEMO_SYNAPSES, "Table of synapses in the volume."
    )
    seconds = flags.DEFINE_float(
        "seconds", 60, "Seconds in which jobs are handed in and asked for.", 1, 3600
    )
    flat_out = flags.DEFINE_float(
        "flat_out_seconds", 10, "Seconds of asking without a pause.", 1, 600
    )
    pollers = flags.DEFINE_integer("pollers", 200, "Clients that ask.", 1, 1000)
    submitters = flags.DEFINE_integer(
        "submitters", 50, "Clients that hand jobs in.", 1, 1000
    )
    rows = flags.DEFINE_integer("rows", 20, "Positions of a job.", 1, 1000)

    def measure() -> None:
        names = [f"load{n}" for n in range(_TOKENS)]
        with page_server.running(models.value, names, *LIFTED) as server:
            load = Load(server, pathlib.Path(table.value), rows.value)
            clients = {"pollers": pollers.value, "submitters": submitters.value}
            report = asyncio.run(
                load.run(**clients, seconds=seconds.value, flat_out=flat_out.value)
            )
            peak = server.peak_rss_bytes()
            if page_server.FRAME in server.log():
                load.errors.append("the server's log has a traceback")
                print(server.log()[-5000:], file=sys.stderr)
        for error in load.errors[:20]:
            print(error, file=sys.stderr)
        report |= clients | {
            "seconds": seconds.value,
            "rows_a_job": rows.value,
            "requests": {kind: dict(counts) for kind, counts in load.requests.items()},
            "errors": len(load.errors),
            "jobs_submitted": len(load.submitted),
            "jobs_finished": load.finished,
            "server_peak_rss_mb": round(peak / 1e6, 1),
            "cpus": len(os.sched_getaffinity(0)),
        }
        print(json.dumps(report))
        if load.errors or load.finished != len(load.submitted):
            raise UserError(f"{len(load.errors)} errors; see above")

    command.run(measure)


if __name__ == "__main__":
    main()
