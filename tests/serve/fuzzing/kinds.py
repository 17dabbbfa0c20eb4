# SPDX-License-Identifier: Apache-2.0
"""The kinds of malformed requests.

The kinds are `body` (tables, from malformed_tables.py), `path` (wrong ids and keys),
`head` (header fields) and `framing` (HTTP itself; both are in malformed_http.py). An
attempt depends only on its kind, its number and the seed, so it can be made again.
"""

from collections.abc import Sequence

import numpy as np

from tests.serve.fuzzing import malformed_http, malformed_tables
from tests.serve.fuzzing.attempts import MOST_BYTES, Attempt, Target, one, request


def make(target: Target, kind: str, number: int, seed: int) -> Attempt:
    """Returns the attempt of this kind and number."""
    rng = np.random.default_rng((seed, list(_KINDS).index(kind), number))
    return _KINDS[kind](target, rng)


_WORDS = (
    *"""
    none demo neurons positions hemibrain true 0 -1 nan inf 1e999 %00 %ff%fe + * [] {}
    %ed%a0%80 ..%2f..%2f null %F0%9F%92%A5 '%20OR%201=1-- %25 % %zz 1.5 =1+1 1_0 gaba
    9223372036854775807 9223372036854775808 -9223372036854775809 %3Cscript%3E
    %D9%A1 ok %0d%0aX:%201
    """.split(),
    *("", "a" * 3000, "9" * 400, "9" * 5000),
)
_QUERIES = {
    "/api/checks": ("model", "source", "kind", "x"),
    "/api/jobs": ("model", "source", "kind", "name", "fresh"),
    "/api/jobs/JOB/neurons": ("search", "offset", "limit", "x"),
    "/api/jobs/JOB/synapses": (
        *("search", "status", "called", "neuron", "offset", "limit"),
    ),
    "/fetch-neurotransmitter": ("x", "y", "z", "connector_id", "model", "source"),
}


def _query(rng: np.random.Generator, names: Sequence[str]) -> str:
    """Returns a query of some parameters (some of them twice) with odd values."""
    chosen = rng.choice(names, rng.integers(len(names) + 2))
    return "&".join(f"{name}={one(rng, _WORDS)}" for name in chosen)


_TYPES = (
    *("text/csv", "text/plain", "application/json", "multipart/form-data", "", "*/*"),
    *("text/csv; charset=utf-16", "text/csv; charset=nonsense", "application/xml"),
    *("multipart/form-data; boundary=", "text/csv;;;=", "x" * 2000, "é"),
)


def _body(target: Target, rng: np.random.Generator) -> Attempt:
    if rng.random() < 0.01:
        body = malformed_tables.large(rng)
    else:
        body = malformed_tables.mutated(target.positions, rng)
    kind = "text/csv" if rng.random() < 0.9 else one(rng, _TYPES)
    fields = [f"Content-Type: {kind}"]
    if rng.random() < 0.05:
        encoding, body = malformed_tables.compressed(body, rng)
        fields.append(f"Content-Encoding: {encoding}")
    path = "/api/jobs" if rng.random() < 0.4 else "/api/checks"
    if rng.random() < 0.85:
        query = f"model={target.model}&source=none"
        query += one(rng, ("", "&kind=neurons", "&kind=positions"))
    else:
        query = _query(rng, _QUERIES[path])
    path = f"{path}?{query}"
    if rng.random() < 0.05:  # in chunks, and sometimes too large
        if rng.random() < 0.1:
            body *= 2 + MOST_BYTES // max(1, len(body))
        fields.append("Transfer-Encoding: chunked")
        chunks = [body[at : at + 65536] for at in range(0, len(body), 65536)]
        coded = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks if c)
        pieces = (request(target, "POST", path, fields) + coded + b"0\r\n\r\n",)
        return Attempt(path, pieces)
    return Attempt(path, (request(target, "POST", path, fields, body),))


_ROUTES = (
    *(("GET", "/api/jobs/{}"), ("POST", "/api/jobs/{}/cancel"), ("GET", "/{}")),
    *(("DELETE", "/api/jobs/{}"), ("GET", "/api/jobs/{}/neurons")),
    *(("GET", "/api/jobs/{}/synapses"), ("GET", "/api/jobs/{}/predictions.csv")),
    *(("GET", "/api/jobs/{}/predictions.feather"), ("GET", "/api/jobs/{}/report.html")),
    *(("GET", "/api/jobs/JOB/{}"), ("GET", "/static/{}"), ("GET", "/view/{}")),
    *(("GET", "/view/{}/annotations/info"), ("GET", "/view/{}/volume/info")),
    *(("GET", "/view/KEY/{}"), ("GET", "/view/KEY/annotations/{}")),
    *(("GET", "/view/KEY/annotations/by_id/{}"), ("GET", "/view/KEY/volume/{}")),
    *(("GET", "/view/KEY/annotations/spatial0/{}"), ("GET", "/view/KEY/volume/s0/{}")),
    *(("GET", "/view/KEY/annotations/neuron/{}"), ("GET", "/view/KEY/{}/info")),
)
_TRICKS = (
    *"""
    ../../../../etc/passwd ..%2f..%2f..%2f..%2fetc%2fpasswd ....//....//x . .. ...
    %2e%2e%2fservice.sqlite %2e%2e/%2e%2e/service.sqlite ..%5c..%5cx ..;/x ~ ~root
    %252e%252e%252fservice.sqlite %c0%ae%c0%ae%c0%af ..%00/ %00 %ff%fe JOB%00 KEY KEY%00
    JOB%00.csv JOB/ JOB%20 JOB%0a JOB%0d%0aX:%201 JOB/.. JOB. JOB%2f..%2fOTHER JOB#x
    JOB/../OTHER OTHER OTHER%00 OTHER/ %20JOB JOB?x=%00 JOB;x %ed%a0%80 %E2%98%83 ☃
    %EF%BC%91 ١٢٣ % %2 %zz 0000000000000000 ffffffffffffffff -1 18446744073709551615
    18446744073709551616 0x10 NaN 1e5 1.5 '%20OR%201=1-- * [ {} con null aux %2f %3f %23
    file:///etc/passwd //etc/passwd /etc/passwd info 0_0_0 0 1 models.toml page.css/..
    page.css%00 0-64_0-64_0-16 0-64_0-64_0-64 -64-0_0-64_0-16 0-0_0-0_0-0 0-64_0-64
    0-4294967296_0-4294967296_0-4294967296 0-9999999999999999999999_0-64_0-16
    00-64_0-64_0-16 0-64_0-64_0-16.gz 64-0_0-64_0-16 0-64_0-64_0-16_0-1
    9999999999-9999999999_0-64_0-16 ٠-64_0-64_0-16
    """.split(),
    *("", "a" * 10_000, "a" * 60_000, "%61" * 9000, "9" * 5000, "\udcff\udcfe"),
)


def _path(target: Target, rng: np.random.Generator) -> Attempt:
    if rng.random() < 0.3:  # the query is odd, not the path
        path, names = list(_QUERIES.items())[rng.integers(2, len(_QUERIES))]
        method, path, trick = "GET", f"{path}?{_query(rng, names)}", ""
        if path.startswith("/fetch") and rng.random() < 0.5:
            path = f"/fetch-neurotransmitter?x=1&y=2&z=3&{path.partition('?')[2]}"
    else:
        method, route = one(rng, _ROUTES)
        trick = one(rng, _TRICKS)
        if rng.random() < 0.15:
            method = one(rng, ("GET", "HEAD", "POST", "PUT", "OPTIONS", "TRACE"))
        path = route.format(trick)
    # The finished job must not be deleted, as later attempts need it.
    deletes = method == "DELETE" and "JOB" in path
    method = "GET" if deletes else method
    for word, real in (("JOB", target.job), ("KEY", target.view_key)):
        path = path.replace(word, real)
    path = path.replace("OTHER", target.other_job)
    target_ok = path.isascii() and "#" not in path and len(path) < 60_000
    refused = trick.startswith("OTHER") and "/api/jobs/" in path and method != "OPTIONS"
    body = b"" if method == "POST" else None
    sent = request(target, method, path, body=body)
    return Attempt(path, (sent,), whole=target_ok, refused=refused)


_KINDS = {
    "body": _body,
    "path": _path,
    "head": malformed_http.head,
    "framing": malformed_http.framing,
}
KINDS = tuple(_KINDS)
