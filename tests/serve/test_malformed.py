# SPDX-License-Identifier: Apache-2.0
"""Sends some hundreds of malformed requests, which are the same in every run."""

import json
import pathlib

import pyarrow as pa
import pytest

from tests.serve.fuzzing import attempts, findings, kinds, malformed, page_server

CALLS = 300
NO_SNIFFING = {"content-type": "application/json", "x-content-type-options": "nosniff"}


@pytest.mark.slow
def test_nothing_that_is_sent_is_a_mistake_of_ours(
    tmp_path: pathlib.Path,
    short_run: pathlib.Path,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> None:
    table = page_server.write_models(tmp_path, short_run, volume_path, synapse_table)
    names = ["first", "other"]
    with page_server.running(str(tmp_path), names, *malformed.LIFTED) as server:
        attack = malformed.Attack(server, malformed.prepare(server, table), seed=1)
        before = server.peak_rss_bytes()
        found = attack.run(CALLS, drain_seconds=10)
        grown = server.peak_rss_bytes() - before
    assert found.errors == []
    assert found.calls >= 0.95 * CALLS
    # Many calls are valid enough to be answered.
    assert found.statuses["schemathesis"]["200"] > 10
    assert found.statuses["body"]["200"] > 10
    assert grown < 300e6


@pytest.mark.parametrize(
    ("status", "fields", "body", "refused", "why"),
    [
        (500, NO_SNIFFING, b'{"detail": "x"}', False, "500"),
        (503, NO_SNIFFING, b'{"detail": "x"}', False, "503"),
        (200, NO_SNIFFING, b"{}", True, "not refused"),
        (200, NO_SNIFFING, b"root:x:0:0", False, "shows"),
        (404, NO_SNIFFING, b'{"detail": [1]}', False, "not one line"),
        (422, NO_SNIFFING, b"{}", False, "no detail"),
        (200, {"content-type": "text/html"}, b"", False, "X-Content-Type"),
    ],
)
def test_a_mistake_is_seen(
    status: int, fields: dict[str, str], body: bytes, refused: bool, why: str
) -> None:
    assert why in findings.wrong("/x", status, fields, body, refused=refused)


def test_what_is_right_is_no_mistake() -> None:
    detail = json.dumps({"detail": "there is none"}).encode()
    assert findings.wrong("/x", 404, NO_SNIFFING, detail, refused=True) is None
    late = NO_SNIFFING | {"retry-after": "5"}
    path = "/fetch-neurotransmitter?x=1"
    assert findings.wrong(path, 503, late, detail) is None
    assert findings.wrong("/x", 400, {}, b"Invalid HTTP request") is None


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_an_attempt_can_be_made_again(kind: str) -> None:
    target = attempts.Target(
        **dict.fromkeys(("token", "cookie", "csrf", "model"), "a"),
        **dict.fromkeys(("job", "other_job", "view_key"), "b"),
        port=1,
        positions=[(7, 8, 1.0, 2.0, 3.0)],
    )
    made = [kinds.make(target, kind, n, seed=0) for n in (0, 0, 1, 2, 3)]
    assert made[0] == made[1]
    assert len({attempt.pieces for attempt in made}) > 1
