# SPDX-License-Identifier: Apache-2.0
"""Tests of the source CATMAID with a local server (service_servers.Catmaid)."""

import dataclasses
import logging
from collections.abc import Iterator

import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.ondemand import sources
from synister_jax.ondemand.sources import catmaid, credentials, http_session
from tests.helpers.service_servers import PAGE, Answer, Catmaid, Fault, of_json

TOKEN, USER, PASSWORD = "9944b09199c6", "tracer", "pässword"
# (skeleton, connector, x, y, z): skeletons 16 and 27 share connector 901, and skeleton
# 16 has two nodes at connector 902.
LINKS = [
    (27, 901, 438817.0, 164242.0, 217440.0),
    (16, 902, 1.5, 2.5, 3.5),
    (16, 901, 438817.0, 164242.0, 217440.0),
    (16, 902, 1.5, 2.5, 3.5),
    (720575940628857210, 720575940628857211, 4.0, 5.0, 6.0),
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Catmaid]:
    quick = http_session.RETRIES.new(backoff_factor=0.01, backoff_jitter=0.01)
    monkeypatch.setattr(http_session, "RETRIES", quick)
    server = Catmaid(LINKS, empty=[30], token=TOKEN, basic=f"{USER}:{PASSWORD}")
    yield server
    server.close()


def settings(server: Catmaid, **changed: str) -> credentials.SourceSettings:
    values = {"CATMAID_URL": server.url, "CATMAID_TOKEN": TOKEN}
    values |= {"CATMAID_HTTP_USER": USER, "CATMAID_HTTP_PASSWORD": PASSWORD}
    return sources.settings("fafb-catmaid", None, values | changed)


def ask(server: Catmaid, ids: list[int], **changed: str) -> list[sources.Found]:
    given = settings(server, **changed)
    found = list(sources.presynaptic_sites(ids, given))
    return found


def test_every_neuron_in_the_order_asked(server: Catmaid) -> None:
    shared, large, empty, unknown, first = ask(
        server, [27, 720575940628857210, 30, 999, 16]
    )
    assert shared == sources.Found(
        27,
        True,
        pa.table([[901], [27], [438817.0], [164242.0], [217440.0]], sources.SITES),
    )
    assert first.sites["synapse_id"].to_pylist() == [901, 902]
    assert first.sites["x"].to_pylist() == [438817.0, 1.5]
    assert large.sites["synapse_id"].to_pylist() == [720575940628857211]
    assert (empty.known, len(empty.sites)) == (True, 0)
    assert (unknown.known, len(unknown.sites)) == (False, 0)
    assert unknown.sites.schema == sources.SITES


def test_batches_ask_for_each_skeleton_once(
    server: Catmaid, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catmaid, "_BATCH", 2)
    found = ask(server, [16, 27, 30, 31, 999])
    assert [f.neuron_id for f in found] == [16, 27, 30, 31, 999]
    paths = [request.path for request in server.asked]
    links = "/1/connectors/links/"
    # A batch without any known skeleton is not asked for links.
    assert paths.count(links) == 2
    assert paths.count("/1/skeletons/validity") == 3
    assert server.asked[0].form == {
        "skeleton_ids[0]": ["16"],
        "skeleton_ids[1]": ["27"],
    }
    assert server.asked[1].form["with_tags"] == ["false"]


@pytest.mark.long
@pytest.mark.parametrize(
    "faults", [["slow"], [Answer(500)] * 2, ["cut off"], [Answer(429)], ["drop"]]
)
def test_it_asks_again(server: Catmaid, faults: list[Fault]) -> None:
    server.faults = list(faults)
    assert len(ask(server, [16])[0].sites) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"CATMAID_TOKEN": "wr0ng"},
            "reports an error: .*permission: set CATMAID_TOKE",
        ),
        (
            {"CATMAID_HTTP_PASSWORD": "wr0ng"},
            r"refuses access \(401\): set CATMAID_TOKEN",
        ),
        ({"CATMAID_HTTP_USER": ""}, r"refuses access \(401\): set CATMAID_TOKEN"),
        ({"CATMAID_PROJECT": "2"}, r"has nothing at this path \(404\)"),
    ],
)
def test_credentials_that_do_not_fit(
    server: Catmaid,
    changed: dict[str, str],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UserError, match=words) as caught:
        ask(server, [16], **changed)
    said = f"{caught.value} {caplog.text} {settings(server)!r} {settings(server)}"
    for secret in (TOKEN, PASSWORD, "wr0ng"):
        assert secret not in said


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([PAGE], "web page"),
        (
            [of_json({"error": "Unknown relation: \n x", "detail": ""})],
            "Unknown relation",
        ),
        ([of_json({})], "no list of skeleton ids"),
        ([of_json(["16"])], "no list of skeleton ids"),
        ([of_json([16]), of_json([])], "no connector links"),
        ([of_json([16]), of_json({"links": None})], "no connector links"),
        ([of_json([16]), of_json({"links": [[16, 1, 2]]})], "no connector links"),
        (
            [of_json([16]), of_json({"links": [[16, 9.0, 1, 2, 3]]})],
            "no connector links",
        ),
        ([of_json([16]), of_json({"links": [[16, 9, "1", 2, 3]]})], "no connector lin"),
        ([of_json([16]), of_json({"links": [[16, 1 << 63, 1, 2, 3]]})], "no connector"),
    ],
)
def test_answers_of_another_shape(
    server: Catmaid, answers: list[Answer], words: str
) -> None:
    server.faults = list(answers)
    with pytest.raises(UserError, match=words):
        ask(server, [16])


def test_what_was_not_asked_for_is_left_out(server: Catmaid) -> None:
    server.faults = [of_json([16, 5]), of_json({"links": [[5, 6, 1, 2, 3]]})]
    [found] = ask(server, [16])
    assert (found.known, len(found.sites)) == (True, 0)


def test_an_open_server_needs_no_credentials() -> None:
    server = Catmaid(LINKS)
    given = sources.settings("fafb-catmaid", None, {"CATMAID_URL": server.url + "/"})
    [found] = sources.presynaptic_sites([27], given)
    server.close()
    assert len(found.sites) == 1
    assert "X-Authorization" not in server.asked[0].headers
    assert "Authorization" not in server.asked[0].headers


def test_it_lists_no_volume(server: Catmaid) -> None:
    with pytest.raises(UserError, match="cannot list a whole volume"):
        sources.listing(settings(server))


def test_settings_are_not_changed(server: Catmaid) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings(server).source = "none"
