# SPDX-License-Identifier: Apache-2.0
"""Makes malformed header fields, and bytes that are not valid HTTP."""

import base64
from collections.abc import Sequence

import numpy as np

from tests.serve.fuzzing import malformed_tables
from tests.serve.fuzzing.attempts import Attempt, Target, one, request


def head(target: Target, rng: np.random.Generator) -> Attempt:
    """Makes header fields that are wrong about the sender, origin or content."""
    cookie = f"Cookie: synister_session={target.cookie}"
    garbage = _coded(b"\xff:\x00")
    login, no_login = True, False
    # (fields, whether the token is sent, whether a 2xx would be an error)
    cases: tuple[tuple[Sequence[str], bool, bool], ...] = (
        ([f"Host: {one(rng, ('evil.example', '', 'a b', '[::1', 'x:99999', '@'))}"],
         login, False),
        (["X-Forwarded-Host: evil.example"], login, False),
        (["X-Forwarded-Proto: javascript"], login, False),
        (["X-Forwarded-Proto: https, http", "X-Forwarded-For: a, b,,,"], login, False),
        (["X-Forwarded-For: " + "1.1.1.1, " * 5000], login, False),
        (["Forwarded: for=\"[::1]\";proto=https;host=\"a\"b\""], login, False),
        (["X-Original-URL: /api/session", "X-Rewrite-URL: /api/jobs"], login, False),
        (["X-HTTP-Method-Override: DELETE"], login, False),
        (["Authorization: Bearer"], no_login, True),
        (["Authorization: Bearer "], no_login, True),
        (["Authorization: Bearer é\udcff"], no_login, True),
        (["Authorization: Bearer " + "a" * 50_000], no_login, True),
        (["Authorization: Basic !!!"], no_login, True),
        (["Authorization: Basic"], no_login, True),
        ([f"Authorization: Basic {garbage}"], no_login, True),
        ([f"Authorization: Basic {_coded(b'no colon')}"], no_login, True),
        ([f"Authorization: Basic {_coded(b'a:')}"], no_login, True),
        (["Authorization: Basic " + "QUFB" * 10_000], no_login, True),
        (["Authorization: Digest a=b", "Authorization: Bearer x"], no_login, True),
        (["Authorization: Bearer x"], login, False),
        (["Cookie: synister_session=x"], no_login, True),
        (["Cookie: synister_session=x; " + cookie[8:]], no_login, False),
        ([cookie, "Cookie: synister_session=x"], no_login, False),
        (["Cookie: " + "; ".join(f"a{n}=b" for n in range(3000))], no_login, True),
        (['Cookie: synister_session="\\101\\377\\000"'], no_login, True),
        (["Cookie: synister_session=\udcff\udcfe"], no_login, True),
        (["Cookie: ;;;===,,,"], no_login, True),
        (["Range: bytes=0-0"], login, False),
        (["Range: bytes=" + ",".join(f"{n}-{n}" for n in range(4000))], login, False),
        (["Range: bytes=-99999999999999999999"], login, False),
        (["Range: bytes=5-1,a-b", "If-Range: x"], login, False),
        (["If-None-Match: \"x", "If-Modified-Since: never"], login, False),
        (["If-Modified-Since: Thu, 99 Foo 99999 99:99:99 GMT"], login, False),
        (["Accept-Encoding: gzip;q=x, *;q=99", "Accept: \udcff"], login, False),
        (["Expect: 100-continue"], login, False),
        (["Expect: nonsense"], login, False),
        (["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
          "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="], login, False),
        (["Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"], login, False),
        (["Origin: null", "Access-Control-Request-Method: DELETE"], login, False),
        (["X-CSRF-Token: é\udcff"], login, False),
        ([f"X-{n}: {n}" for n in range(1000)], login, False),
        (["X-Long: " + "a" * 60_000], login, False),
        (["X-Longer: " + "a" * 300_000], login, False),
    )  # fmt: skip
    forged = (
        [cookie],
        [cookie, "X-CSRF-Token: "],
        [cookie, "X-CSRF-Token: é\udcff"],
        [cookie, "X-CSRF-Token: " + target.csrf[:-1]],
        [cookie, "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"],
    )
    if rng.random() < 0.2:
        fields = one(rng, forged)
        path = f"/api/checks?model={target.model}&source=none"
        sent = request(target, "POST", path, fields, b"1\n", login=False)
        return Attempt(path, (sent,), refused=True)
    fields, with_token, refused = one(rng, cases)
    files = ("predictions.csv", "predictions.feather", "report.html", "neurons", "")
    places = [
        *("/api/session", "/api/models", "/api/jobs"),
        *(f"/api/jobs/{target.job}/{name}".rstrip("/") for name in files),
        "/fetch-neurotransmitter?x=1&y=2&z=3",
    ]
    public = ["/", "/static/page.css", "/health", "/openapi.json"]
    public += [f"/view/{target.view_key}/annotations/info"]
    path = one(rng, places if refused else places + public)
    host = not fields[0].startswith("Host")
    sent = request(target, "GET", path, fields, login=with_token, host=host)
    # A server may close the connection when the head is longer than 64 KiB.
    whole = host and len(sent) < 60_000 and "Upgrade" not in str(fields)
    return Attempt(path, (sent,), whole=whole, refused=refused)


def framing(target: Target, rng: np.random.Generator) -> Attempt:
    """Makes bytes that are no request, or a request that states a wrong length."""
    path = f"{one(rng, ('/api/checks', '/api/jobs'))}?model={target.model}&source=none"
    body = malformed_tables.table(target.positions, rng)
    start = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode()
    start += f"Authorization: Bearer {target.token}\r\n".encode()
    long = b"Content-Length: %d\r\n\r\n" % (len(body) + int(rng.integers(1, 10_000)))
    chunked = b"Transfer-Encoding: chunked\r\n"
    right = b"Content-Length: %d\r\n\r\n" % len(body)
    cases: tuple[tuple[bytes, ...], ...] = (
        (start + long + body,),
        (start + b"Content-Length: %d\r\n\r\n" % (len(body) // 2) + body,),
        (start + b"Content-Length: -1\r\n\r\n" + body,),
        (start + b"Content-Length: 9999999999999999999999\r\n\r\n" + body,),
        (start + b"Content-Length: %d\r\n\r\n" % (1 << 40) + body,),
        (start + b"Content-Length: +5\r\n\r\n" + body,),
        (start + b"Content-Length: 1e3\r\n\r\n" + body,),
        (start + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + body,),
        (start + b"Content-Length: 5\r\n" + chunked + b"\r\n0\r\n\r\n" + body,),
        (start + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",),
        (start + b"Transfer-Encoding: nonsense\r\n\r\n" + body,),
        (start + chunked + b"\r\nzz\r\n" + body,),
        (start + chunked + b"\r\n-5\r\n" + body,),
        (start + chunked + b"\r\nffffffffffffffffff\r\n" + body,),
        (start + chunked + b"\r\n5;" + b"x" * 100_000 + b"\r\n12345\r\n0\r\n\r\n",),
        (start + chunked + b"\r\n5\r\n1234567890\r\n0\r\n\r\n",),
        (start + chunked + b"\r\n2\r\n1\n\r\n0\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",),
        (start + chunked + b"\r\n5\r\n12",),
        (start + chunked + b"\r\n" + b"1\r\n1\r\n" * 3000 + b"0\r\n\r\n",),
        (start, right, body[: len(body) // 2]),
        (start[:20],),
        (start[: int(rng.integers(1, len(start)))],),
        (start + b" folded: line\r\n" + right + body,),
        (start + b"No colon\r\n" + right + body,),
        (start + b"Nul: a\x00b\r\n" + right + body,),
        (start + b"Bad name : x\r\n" + right + body,),
        (start.replace(b"\r\n", b"\n") + right.replace(b"\r\n", b"\n") + body,),
        (start.replace(b"HTTP/1.1", b"HTTP/9.9") + right + body,),
        (start.replace(b"HTTP/1.1", b"HTTP/1.0") + right + body,),
        (b"GET /\r\n",),
        (b"GET / HTTP/1.1\r\n\r\n",),
        (b"GET http://evil.example/api/jobs HTTP/1.1\r\nHost: evil.example\r\n\r\n",),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", b""),
        (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",),
        (b"X" * 5000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n",),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.bytes(500),),
        (rng.bytes(int(rng.integers(1, 3000))),),
        (b"\r\n" * 2000,),
        (b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 50,),
        (start + right, *(bytes([byte]) for byte in body[:20])),
    )  # fmt: skip
    pieces = one(rng, cases)
    pause = 0.02 if len(pieces) > 1 else 0.0
    return Attempt(path, pieces, pause, whole=False, leave=bool(rng.random() < 0.4))


def _coded(text: bytes) -> str:
    return base64.b64encode(text).decode()
