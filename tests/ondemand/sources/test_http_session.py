# SPDX-License-Identifier: Apache-2.0
"""Retries, time-outs, limits and messages of `http_session`, with a local server."""

import logging
import time
import traceback
from collections.abc import Iterator

import pytest

from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import http_session
from tests.helpers.service_servers import PAGE, Answer, Fault, Request, Server, of_json

SECRET = "s3cr3t-t0k3n"


class Number(Server):
    def answer(self, request: Request) -> Answer:
        return of_json({"number": 720575940628857210})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Number]:
    quick = http_session.RETRIES.new(backoff_factor=0.01, backoff_jitter=0.01)
    monkeypatch.setattr(http_session, "RETRIES", quick)
    server = Number()
    yield server
    server.close()


def ask(server: Server) -> object:
    with http_session.Session("Service", "SERVICE_TOKEN", [SECRET, ""]) as session:
        session.headers["Authorization"] = f"Bearer {SECRET}"
        return session.json("POST", f"{server.url}/path", json=[1])


@pytest.mark.long
@pytest.mark.parametrize(
    "faults",
    [
        [],
        [of_json({"message": "busy"}, 500)] * 2,
        [Answer(502), Answer(503), Answer(504)],
        ["drop"],
        ["cut off", "cut off"],
        ["slow"],
    ],
)
def test_an_answer_comes_all_the_same(server: Number, faults: list[Fault]) -> None:
    server.faults = list(faults)
    assert ask(server) == {"number": 720575940628857210}  # an id keeps its digits
    repeated = len([f for f in faults if f != "slow"])
    assert len(server.asked) == 1 + repeated
    assert {request.body for request in server.asked} == {b"[1]"}


@pytest.mark.long
def test_it_waits_as_long_as_the_service_says(server: Number) -> None:
    server.faults = [Answer(429, headers={"Retry-After": "1"})]
    start = time.monotonic()
    ask(server)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            of_json({"message": "who?"}, 401),
            r"refuses access \(401: who\?\): set SERVICE_TO",
        ),
        (
            Answer(403, b"<html>", "text/html"),
            r"refuses access \(403\): set SERVICE_TOKEN",
        ),
        (of_json({"error": "a\n b"}, 400), r"not accept the request \(400: a b\)"),
        (of_json({"detail": [1]}, 404), r"nothing at this path \(404\)"),
        (
            Answer(302, headers={"Location": "/login"}),
            "redirects the request.*SERVICE_TOKEN",
        ),
        (PAGE, "a web page, not with data.*SERVICE_TOKEN"),
        (Answer(200, b" <html>login", "application/json"), "a web page"),
        (Answer(200, b'{"a": ', "application/json"), "text that is not JSON"),
        (Answer(200, b"[" * 100_000), "text that is not JSON"),
        (Answer(200, b"\xff\xfe"), "text that is not JSON"),
        (Answer(500, b"null"), r"fails \(500\): try again later"),
        (Answer(429, b"[]"), "too many requests"),
        (of_json({"message": f"bad {SECRET}"}, 400), "bad …"),
    ],
)
def test_what_is_wrong_is_told_without_secrets(
    server: Number, fault: Answer, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    server.faults = [fault] * 9
    with pytest.raises(UserError, match=words) as caught:
        ask(server)
    assert str(caught.value).startswith(f"Service at {server.url[7:]} ")
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text


def test_it_does_not_wait_for_ever(
    server: Number, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_session, "READ_SECONDS", 0.2)
    server.faults = ["slow"] * 9
    with pytest.raises(UserError, match="does not answer within 0 s"):
        ask(server)
    assert len(server.asked) == 3


def test_an_answer_that_drips_ends(
    server: Number, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_session, "WHOLE_SECONDS", 0.3)
    server.faults = ["drip"]
    start = time.monotonic()
    with pytest.raises(UserError, match="more than 0 s for an answer"):
        ask(server)
    assert time.monotonic() - start < 1


def test_an_answer_that_breaks_off_each_time(server: Number) -> None:
    server.faults = ["cut off"] * 9
    with pytest.raises(UserError, match="breaks off its answer again and again"):
        ask(server)
    assert len(server.asked) == 3


def test_an_answer_is_bounded(server: Number, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_session, "MOST_BYTES", 1 << 20)
    server.faults = [Answer(200, b" " * (2 << 20))]
    with pytest.raises(UserError, match="more than 1 MiB"):
        ask(server)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/x", "127.0.0.1:1 cannot be reached"),
        (f"http://me:{SECRET}@127.0.0.1:1/x", "Service at 127.0.0.1:1 cannot be rea"),
        ("no.address", r"no.address cannot be asked \(MissingSchema\)"),
        ("ftp://host/x", r"host cannot be asked \(InvalidSchema\)"),
    ],
)
def test_an_address_that_nobody_answers_at(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_session, "RETRIES", http_session.RETRIES.new(connect=0))
    with http_session.Session("Service", "TOKEN", [SECRET]) as session:
        with pytest.raises(UserError, match=words):
            session.json("GET", url)
