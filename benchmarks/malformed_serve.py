# SPDX-License-Identifier: Apache-2.0
"""Thousands of requests that nobody should send, to the web page's server.

    python benchmarks/malformed_serve.py [--models=DIR] [--positions=TABLE] \
        [--calls=10000] [--seed=0] [--only=body:17]

Starts `python -m synister_jax.serve` with a worker on this machine, by default with the
demonstration's model (`make demo`), and one finished job. Two fifths of the calls are
schemathesis's, from /openapi.json: what the schema allows, and what it does not. The
others are those of malformed_requests.py. All but a few carry a right token.

An error is: a status of 500 or more (but the 503 of /fetch-neurotransmitter, with
Retry-After); no answer to a complete request, or not in 30 s; a 2xx for a wrong token,
a forged request or another token's job; an error in JSON without its one line `detail`;
an answer that may be sniffed, or shows a traceback, a token, the service's folder or a
file of the machine; a traceback or a token in the log; a table that was taken and whose
job fails; a server or worker that is gone. Each is printed with how to see it again: a
curl command, or a `--only`.

Prints one line of JSON, with the most memory that the page's process had before and
after. Exit code 1 where there were errors.
"""

import collections
import concurrent.futures
import contextlib
import json
import math
import pathlib
import re
import sys
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable, Mapping

import hypothesis
import malformed_bodies
import malformed_requests
import numpy as np
import page_server
import requests
import schemathesis
from absl import flags
from malformed_attempt import Target, send
from malformed_findings import Findings, wrong
from pyarrow import feather

from synister_jax.base import command
from synister_jax.base.errors import UserError

_SHARES = {"body": 0.6, "path": 0.2, "head": 0.12, "framing": 0.08}
_SCHEMATHESIS = 0.4
_THREADS = 4
# Of a job, by its address and the key of its view.
_PARTS = (
    *("{0}", "{0}/neurons", "{0}/synapses", "{0}/predictions.csv"),
    *("{0}/predictions.feather", "{0}/report.html", "/view/{1}/annotations/info"),
    *("/view/{1}/annotations/spatial0/0_0_0", "/view/{1}/annotations/by_id/0"),
)
_OVER = ("done", "failed", "cancelled")


def prepare(server: page_server.Server, table: pathlib.Path) -> Target:
    """A finished job, one of another token, a session, and rows to make tables of.

    Args:
      table: synapses in the volume, with neurons.
    """
    names = ["synapse_id", "neuron_id", "x_nm", "y_nm", "z_nm"]
    columns = feather.read_table(table, names).slice(0, 200).to_pydict()
    positions = list(zip(*columns.values(), strict=True))
    rng = np.random.default_rng(0)
    first, other = list(server.tokens)
    path = f"/api/jobs?model={server.model}&source=none"
    while True:  # until it is one of positions, which any model answers
        body = malformed_bodies.table(positions, rng)
        if body.startswith(b"id"):
            break
    other_job = server.get(path, "POST", body, other)["id"]
    job = server.finish(server.get(path, "POST", body)["id"])
    link = urllib.parse.unquote(job["links"]["neuroglancer"])
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
        view_key=re.search(r"/view/([\w-]+)", link)[1],
        positions=positions,
    )


def attack(
    server: page_server.Server,
    target: Target,
    calls: int,
    seed: int,
    drain_seconds: float,
) -> Findings:
    """All calls, and a look at the server afterwards.

    Args:
      drain_seconds: how long the jobs that came of it may take.
    """
    findings = Findings()
    from_schema = round(calls * _SCHEMATHESIS)
    _schemathesis(server, target, from_schema, seed, findings)
    left = calls - findings.calls
    numbered = [
        (kind, number)
        for kind, share in _SHARES.items()
        for number in range(math.ceil(share * left))
    ]
    order = np.random.default_rng(seed).permutation(len(numbered))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(
            pool.map(
                lambda n: _send_one(server, target, *numbered[n], seed, findings), order
            )
        )
    _races(server, target, max(3, calls // 300), findings)
    findings.errors += _afterwards(server, target, drain_seconds)
    return findings


def _secrets(server: page_server.Server) -> tuple[bytes, ...]:
    return (str(server.state).encode(), *(t.encode() for t in server.tokens.values()))


def _send_one(
    server: page_server.Server,
    target: Target,
    kind: str,
    number: int,
    seed: int,
    findings: Findings,
) -> bytes:
    """The answer's body."""
    attempt = malformed_requests.make(target, kind, number, seed)
    what = f"--only={kind}:{number} --seed={seed}  {attempt.pieces[0][:400]!r}"
    what = what.replace(target.token, "TOKEN")
    try:
        answer = send(target, attempt)
    except OSError as error:
        findings.add(kind, what, type(error).__name__, 0.0, f"not taken: {error}")
        return b""
    error = None
    if answer.status:
        error = wrong(
            attempt.path,
            answer.status,
            answer.fields,
            answer.body,
            _secrets(server),
            attempt.refused,
        )
    elif attempt.whole or answer.how == "no answer in time":
        error = f"no answer: {answer.how} after {answer.seconds:.1f} s"
    status = str(answer.status or answer.how)
    findings.add(kind, what, status, answer.seconds, error)
    return answer.body


def _schemathesis(
    server: page_server.Server,
    target: Target,
    calls: int,
    seed: int,
    findings: Findings,
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    real = {"key": target.view_key}
    runs = []
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            known = [{}]
            if operation.query.get("model") is not None:
                known.append({"query": {"model": target.model, "source": "none"}})
            names = [parameter.name for parameter in operation.path_parameters]
            if names and operation.method.upper() == "GET":
                given = {name: real.get(name, target.job) for name in names[:1]}
                known.append({"path_parameters": given})
            runs += [operation.as_strategy(generation_mode=mode, **k) for k in known]
    session = requests.Session()
    headers = {"Authorization": f"Bearer {target.token}"}
    secrets = _secrets(server)

    def ask(case: schemathesis.Case) -> None:
        started = time.perf_counter()
        try:
            answer = case.call(
                base_url=server.url,
                session=session,
                headers=headers,
                timeout=30,
                allow_redirects=False,
            )
        except requests.RequestException as problem:
            status, error = type(problem).__name__, f"no answer: {problem}"
        else:
            status = str(answer.status_code)
            fields = {name.lower(): each[0] for name, each in answer.headers.items()}
            path = case.operation.path
            error = wrong(path, answer.status_code, fields, answer.content, secrets)
        seconds = time.perf_counter() - started
        what = case.as_curl_command(headers=headers)
        what = what.replace(target.token, "TOKEN")
        findings.add("schemathesis", what, status, seconds, error)

    for index, strategy in enumerate(runs):
        goal = (calls - findings.calls) // (len(runs) - index)
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):
            # What takes nothing cannot be asked for wrongly.
            _make_cases(strategy, goal, seed, ask)


def _make_cases(
    strategy: hypothesis.strategies.SearchStrategy,
    goal: int,
    seed: int,
    ask: Callable[[schemathesis.Case], None],
) -> None:
    """Up to `goal` of them, for there may be fewer."""

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
        warnings.simplefilter("ignore")  # of hypothesis, about strategies
        call()


def _races(
    server: page_server.Server, target: Target, rounds: int, findings: Findings
) -> None:
    """Jobs are deleted while all that there is of them is asked for."""
    path = f"/api/jobs?model={target.model}&source=none"
    jobs = []
    for number in range(rounds):
        _, _, x, y, z = target.positions[number % len(target.positions)]
        body = f"id,x,y,z\n{number + 1_000_000},{x},{y},{z}\n".encode()
        jobs.append(server.get(path, "POST", body)["id"])
    headers = {"Authorization": f"Bearer {target.token}"}
    with concurrent.futures.ThreadPoolExecutor(2 * len(_PARTS)) as pool:
        for job_id in jobs:
            link = server.finish(job_id)["links"]["neuroglancer"]
            key = re.search(r"/view/([\w-]+)", urllib.parse.unquote(link))[1]
            places = [part.format(f"/api/jobs/{job_id}", key) for part in _PARTS]
            over = threading.Event()

            def ask(place: str, over: threading.Event = over) -> None:
                while not over.is_set():
                    _ask_in_race("GET", server, place, headers, findings)

            asking = [pool.submit(ask, place) for place in places]
            time.sleep(0.05)
            _ask_in_race("DELETE", server, places[0], headers, findings)
            over.set()
            concurrent.futures.wait(asking)


def _ask_in_race(
    method: str,
    server: page_server.Server,
    place: str,
    headers: Mapping[str, str],
    findings: Findings,
) -> None:
    started = time.perf_counter()
    try:
        answer = requests.request(
            method, server.url + place, headers=headers, timeout=30
        )
    except requests.RequestException as problem:
        status, error = type(problem).__name__, f"no answer: {problem}"
    else:
        status = str(answer.status_code)
        fields = {name.lower(): value for name, value in answer.headers.items()}
        error = wrong(place, answer.status_code, fields, answer.content)
    seconds = time.perf_counter() - started
    what = f"{method} {place} while the job is deleted"
    findings.add("race", what, status, seconds, error)


def _afterwards(
    server: page_server.Server, target: Target, drain_seconds: float
) -> list[str]:
    """What is wrong with the server after all that."""
    if not server.alive():
        return [f"the server has ended:\n{server.log()[-3000:]}"]
    errors = []
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
    if server.get(f"/api/jobs/{target.job}")["state"] != "done":
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
    return errors


def main() -> None:
    models = flags.DEFINE_string("models", None, "Folder; default the demonstration.")
    default = str(page_server.ROOT / "demo" / "synapses.feather")
    table = flags.DEFINE_string("positions", default, "Synapses in the volume.")
    calls = flags.DEFINE_integer("calls", 10_000, "Requests.", lower_bound=100)
    seed = flags.DEFINE_integer("seed", 0, "Of all that is made up.", lower_bound=0)
    only = flags.DEFINE_string("only", None, "One call, KIND:NUMBER.")
    command.run(
        lambda: _run(
            models.value, pathlib.Path(table.value), calls.value, seed.value, only.value
        )
    )


# Limits of a token are the subject of other tests; here they would hide what is behind.
LIFTED = ("--most_jobs=100000", "--requests_per_minute=100000000")


def _run(
    models: str | None, table: pathlib.Path, calls: int, seed: int, only: str | None
) -> None:
    with page_server.running(models, ["first", "other"], *LIFTED) as server:
        target = prepare(server, table)
        before = server.peak_rss_bytes()
        started = time.monotonic()
        if only is None:
            findings = attack(server, target, calls, seed, drain_seconds=300)
        else:
            kind, _, number = only.partition(":")
            findings = Findings()
            body = _send_one(server, target, kind, int(number), seed, findings)
            print(body[:2000], file=sys.stderr)
            findings.errors += _afterwards(server, target, 0)
        seconds = time.monotonic() - started
        peak = server.peak_rss_bytes() if server.alive() else 0
    for error, count in collections.Counter(findings.errors).most_common(40):
        print(f"{count} × {error}", file=sys.stderr)
    report = {
        "benchmark": "malformed_serve",
        "calls": findings.calls,
        "statuses": {kind: dict(found) for kind, found in findings.statuses.items()},
        "errors": len(findings.errors),
        "slowest_seconds": findings.slowest,
        "seconds": round(seconds),
        "seed": seed,
        "server_peak_rss_mb": [round(before / 1e6, 1), round(peak / 1e6, 1)],
        "schemathesis": schemathesis.__version__,
    }
    print(json.dumps(report))
    if findings.errors:
        raise UserError(f"{len(findings.errors)} errors; see above")


if __name__ == "__main__":
    main()
