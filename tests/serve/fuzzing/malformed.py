# SPDX-License-Identifier: Apache-2.0
r"""Sends thousands of malformed requests to the web page's server.

    python -m tests.serve.fuzzing.malformed [--models=DIR] [--positions=TABLE] \
        [--calls=10000] [--seed=0] [--only=body:17]

tests/serve/test_malformed.py makes some hundreds of these calls; this command is for
long runs. It starts `python -m synister_jax.serve` with a worker on this machine, by
default with the demonstration's model (`make demo`), and finishes one job. Schemathesis
makes two fifths of the calls from /openapi.json: some follow the schema, and some do
not. The others come from kinds.py. Almost all calls have a valid token.

These are errors:

- a status of 500 or more, except the 503 of /fetch-neurotransmitter with Retry-After;
- a complete request that gets no answer within 30 s;
- a 2xx for a wrong token, a forged request or a job of another token;
- an error in JSON whose `detail` is missing or has several lines;
- an answer without `nosniff`, or with a traceback, a token, the folder of the service
  or the content of a file of the machine;
- a traceback or a token in the log;
- a table that is accepted, but whose job fails;
- a server or worker that has ended.

The command prints every error with a way to repeat it: a curl command, or an `--only`.

At the end it prints one line of JSON, with the peak memory of the page's process before
and after. Its exit code is 1 if there were errors.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import sys
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import requests
import schemathesis
from absl import flags
from pyarrow import feather

from synister_jax.base import command
from synister_jax.base.errors import UserError
from tests.serve.fuzzing import kinds, malformed_tables, page_server
from tests.serve.fuzzing.attempts import Target, send
from tests.serve.fuzzing.findings import Findings, wrong

# The limits of a token would refuse most calls; other tests check these limits.
LIFTED = ("--most_jobs=100000", "--requests_per_minute=100000000")

_SHARES = {"body": 0.6, "path": 0.2, "head": 0.12, "framing": 0.08}
_SCHEMATHESIS = 0.4
_THREADS = 4
# All addresses of a job: {0} is the job's own address, {1} the key of its view.
_PARTS = (
    *("{0}", "{0}/neurons", "{0}/synapses", "{0}/predictions.csv"),
    *("{0}/predictions.feather", "{0}/report.html", "/view/{1}/annotations/info"),
    *("/view/{1}/annotations/spatial0/0_0_0", "/view/{1}/annotations/by_id/0"),
)
_OVER = ("done", "failed", "cancelled")


def prepare(server: page_server.PageServer, table: pathlib.Path) -> Target:
    """Makes a finished job, a job of another token and a session; returns them all.

    Args:
      table: A table of synapses in the volume, with neuron ids.
    """
    names = ["synapse_id", "neuron_id", "x_nm", "y_nm", "z_nm"]
    columns = feather.read_table(table, names).slice(0, 200).to_pydict()
    positions = list(zip(*columns.values(), strict=True))
    rng = np.random.default_rng(0)
    first, other = list(server.tokens)
    path = f"/api/jobs?model={server.model}&source=none"
    while True:  # until the table has positions, which every model can answer
        body = malformed_tables.table(positions, rng)
        if body.startswith(b"id"):
            break
    other_job = server.get(path, "POST", body, other)["id"]
    job = server.finish(server.get(path, "POST", body)["id"])
    session = requests.post(
        f"{server.url}/api/session", json={"token": server.tokens[first]}, timeout=30
    )
    return Target(
        port=server.port,
        token=server.tokens[first],
        cookie=session.cookies["synister_session"],
        csrf=session.json()["csrf"],
        model=server.model,
        job=job["id"],
        other_job=other_job,
        view_key=_view_key(job),
        positions=positions,
    )


def _view_key(job: dict[str, Any]) -> str:
    link = urllib.parse.unquote(job["links"]["neuroglancer"])
    return re.search(r"/view/([\w-]+)", link)[1]


@dataclasses.dataclass
class Attack:
    """Makes all calls to one server, and keeps what was found."""

    server: page_server.PageServer
    target: Target
    seed: int
    findings: Findings = dataclasses.field(default_factory=Findings)

    def run(self, calls: int, drain_seconds: float) -> Findings:
        """Makes all calls, checks the server afterwards, and returns the findings.

        Args:
          drain_seconds: How long to wait for the jobs that the calls started.
        """
        self._from_schema(round(calls * _SCHEMATHESIS))
        left = calls - self.findings.calls
        numbered = [
            (kind, number)
            for kind, share in _SHARES.items()
            for number in range(math.ceil(share * left))
        ]
        order = np.random.default_rng(self.seed).permutation(len(numbered))
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda place: self.send_one(*numbered[place]), order))
        self._races(max(3, calls // 300))
        self.look(drain_seconds)
        return self.findings

    def send_one(self, kind: str, number: int) -> bytes:
        """Sends the attempt of this kind and number; returns the body of the answer."""
        attempt = kinds.make(self.target, kind, number, self.seed)
        what = f"--only={kind}:{number} --seed={self.seed}  {attempt.pieces[0][:400]!r}"
        what = what.replace(self.target.token, "TOKEN")
        try:
            answer = send(self.target, attempt)
        except OSError as problem:
            name = type(problem).__name__
            self.findings.add(kind, what, name, 0.0, f"not taken: {problem}")
            return b""
        error = None
        if answer.status:
            error = wrong(
                attempt.path,
                answer.status,
                answer.fields,
                answer.body,
                self._secrets(),
                attempt.refused,
            )
        elif attempt.whole or answer.how == "no answer in time":
            error = f"no answer: {answer.how} after {answer.seconds:.1f} s"
        status = str(answer.status or answer.how)
        self.findings.add(kind, what, status, answer.seconds, error)
        return answer.body

    def look(self, drain_seconds: float) -> None:
        """Adds errors of the server, such as failed jobs or a traceback in its log."""
        server, errors = self.server, self.findings.errors
        if not server.alive():
            errors.append(f"the server has ended:\n{server.log()[-3000:]}")
            return
        until = time.monotonic() + drain_seconds
        while True:
            jobs = server.get("/api/jobs")["jobs"]
            if all(job["state"] in _OVER for job in jobs) or time.monotonic() > until:
                break
            time.sleep(1)
        states = collections.Counter(job["state"] for job in jobs)
        print(f"jobs that came of it: {dict(states)}", file=sys.stderr)
        errors += [
            f"job {job['id']} ({job['rows']} rows) failed: {job['message']}"
            for job in jobs
            if job["state"] == "failed"
        ]
        if server.get(f"/api/jobs/{self.target.job}")["state"] != "done":
            errors.append("the finished job is no longer there")
        health = server.get("/health")
        if health != {"status": "ok", "workers": 1}:
            errors.append(f"/health says {health}")
        log = server.log()
        if count := log.count(page_server.FRAME):
            start = log.index(page_server.FRAME)
            errors.append(f"{count} lines of tracebacks: {log[start : start + 3000]}")
        if any(token in log for token in server.tokens.values()):
            errors.append("the log shows a token")

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.target.token}"}

    def _secrets(self) -> tuple[bytes, ...]:
        shown = (str(self.server.state), *self.server.tokens.values())
        return tuple(text.encode() for text in shown)

    def _judge(self, kind: str, what: str, path: str, call: Callable[[], Any]) -> None:
        """Makes one call with a client library, and counts its answer."""
        started = time.perf_counter()
        try:
            answer = call()
        except requests.RequestException as problem:
            status, error = type(problem).__name__, f"no answer: {problem}"
        else:
            status = str(answer.status_code)
            # Schemathesis gives every header field as a list.
            fields = {
                name.lower(): value if isinstance(value, str) else value[0]
                for name, value in answer.headers.items()
            }
            secrets = self._secrets()
            error = wrong(path, answer.status_code, fields, answer.content, secrets)
        self.findings.add(kind, what, status, time.perf_counter() - started, error)

    def _from_schema(self, calls: int) -> None:
        schema = schemathesis.openapi.from_url(f"{self.server.url}/openapi.json")
        real = {"key": self.target.view_key}
        runs = []
        for operation in (found.ok() for found in schema.get_all_operations()):
            for mode in schemathesis.GenerationMode:
                known = [{}]
                if operation.query.get("model") is not None:
                    query = {"model": self.target.model, "source": "none"}
                    known.append({"query": query})
                names = [parameter.name for parameter in operation.path_parameters]
                if names and operation.method.upper() == "GET":
                    given = {
                        name: real.get(name, self.target.job) for name in names[:1]
                    }
                    known.append({"path_parameters": given})
                runs += [
                    operation.as_strategy(generation_mode=mode, **values)
                    for values in known
                ]
        session = requests.Session()

        def ask(case: schemathesis.Case) -> None:
            what = case.as_curl_command(headers=self._headers)
            what = what.replace(self.target.token, "TOKEN")

            def call() -> Any:
                return case.call(
                    base_url=self.server.url,
                    session=session,
                    headers=self._headers,
                    timeout=30,
                    allow_redirects=False,
                )

            self._judge("schemathesis", what, case.operation.path, call)

        for index, strategy in enumerate(runs):
            goal = (calls - self.findings.calls) // (len(runs) - index)
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                # An operation without parameters has no invalid cases.
                _make_cases(strategy, goal, self.seed, ask)

    def _races(self, rounds: int) -> None:
        """Deletes jobs while other threads request all their addresses."""
        path = f"/api/jobs?model={self.target.model}&source=none"
        jobs = []
        for number in range(rounds):
            _, _, x, y, z = self.target.positions[number % len(self.target.positions)]
            body = f"id,x,y,z\n{number + 1_000_000},{x},{y},{z}\n".encode()
            jobs.append(self.server.get(path, "POST", body)["id"])
        with concurrent.futures.ThreadPoolExecutor(2 * len(_PARTS)) as pool:
            for job_id in jobs:
                key = _view_key(self.server.finish(job_id))
                places = [part.format(f"/api/jobs/{job_id}", key) for part in _PARTS]
                over = threading.Event()

                def ask(place: str, over: threading.Event = over) -> None:
                    while not over.is_set():
                        self._ask_in_race("GET", place)

                asking = [pool.submit(ask, place) for place in places]
                time.sleep(0.05)
                self._ask_in_race("DELETE", places[0])
                over.set()
                concurrent.futures.wait(asking)

    def _ask_in_race(self, method: str, place: str) -> None:
        def call() -> requests.Response:
            url = self.server.url + place
            return requests.request(method, url, headers=self._headers, timeout=30)

        self._judge("race", f"{method} {place} while the job is deleted", place, call)


def _make_cases(
    strategy: hypothesis.strategies.SearchStrategy,
    goal: int,
    seed: int,
    ask: Callable[[schemathesis.Case], None],
) -> None:
    """Makes up to `goal` cases; some operations have fewer."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(1, goal),
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def call(case: schemathesis.Case) -> None:
        ask(case)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from hypothesis
        call()


def main() -> None:
    models = flags.DEFINE_string(
        "models", None, "Folder with models.toml; without it, the demonstration."
    )
    table = flags.DEFINE_string(
        "positions", page_server.DEMO_SYNAPSES, "Table of synapses in the volume."
    )
    calls = flags.DEFINE_integer("calls", 10_000, "Number of requests.", 100)
    seed = flags.DEFINE_integer("seed", 0, "Seed of all that is made up.", 0)
    only = flags.DEFINE_string("only", None, "Make this one call, KIND:NUMBER.")
    command.run(
        lambda: _run(
            models.value, pathlib.Path(table.value), calls.value, seed.value, only.value
        )
    )


def _run(
    models: str | None, table: pathlib.Path, calls: int, seed: int, only: str | None
) -> None:
    with page_server.running(models, ["first", "other"], *LIFTED) as server:
        attack = Attack(server, prepare(server, table), seed)
        before = server.peak_rss_bytes()
        started = time.monotonic()
        if only is None:
            attack.run(calls, drain_seconds=300)
        else:
            kind, _, number = only.partition(":")
            print(attack.send_one(kind, int(number))[:2000], file=sys.stderr)
            attack.look(0)
        seconds = time.monotonic() - started
        peak = server.peak_rss_bytes() if server.alive() else 0
    found = attack.findings
    for error, count in collections.Counter(found.errors).most_common(40):
        print(f"{count} × {error}", file=sys.stderr)
    report = {
        "calls": found.calls,
        "statuses": {kind: dict(counts) for kind, counts in found.statuses.items()},
        "errors": len(found.errors),
        "slowest_seconds": found.slowest,
        "seconds": round(seconds),
        "seed": seed,
        "server_peak_rss_mb": [round(before / 1e6, 1), round(peak / 1e6, 1)],
        "schemathesis": schemathesis.__version__,
    }
    print(json.dumps(report))
    if found.errors:
        raise UserError(f"{len(found.errors)} errors; see above")


if __name__ == "__main__":
    main()
