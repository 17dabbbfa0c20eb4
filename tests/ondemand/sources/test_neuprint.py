# SPDX-License-Identifier: Apache-2.0
"""Tests of the source neuPrint; a local server answers neuprint-python over TLS."""

import json
import pathlib
from collections.abc import Iterator

import pytest

from synister_jax.base.errors import UserError
from synister_jax.ondemand import sources
from synister_jax.ondemand.sources import credentials, http_session, neuprint
from tests.helpers.service_servers import (
    PAGE,
    Answer,
    NeuPrint,
    make_certificate,
    of_json,
)

TOKEN = "neuprint-token"
BODIES = {
    5812983094: [(15300, 25268, 14043), (5447, 21281, 19155)],
    11: [(1, 2, 3)],
    12: [],
    13: [(7, 7, 7), (7, 7, 6), (2097151, 0, 2097151)],
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    try:
        return make_certificate(tmp_path_factory.mktemp("tls"))
    except FileNotFoundError:
        pytest.skip("no openssl here")


@pytest.fixture
def server(
    certificate: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NeuPrint]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    quick = http_session.RETRIES.new(backoff_factor=0.01, backoff_jitter=0.01)
    monkeypatch.setattr(http_session, "RETRIES", quick)
    server = NeuPrint(certificate, dict(BODIES), other_datasets=("manc:v1.2.3",))
    yield server
    server.close()


def settings(
    server: NeuPrint, source: str = "hemibrain", **changed: str
) -> credentials.SourceSettings:
    values = {"NEUPRINT_SERVER": server.url, "NEUPRINT_APPLICATION_CREDENTIALS": TOKEN}
    return sources.settings(source, None, values | changed)


def ask(server: NeuPrint, ids: list[int], **changed: str) -> list[sources.Found]:
    given = settings(server, **changed)
    return list(sources.presynaptic_sites(ids, given))


def test_every_body_in_the_order_asked(server: NeuPrint) -> None:
    three, unknown, empty, large = ask(server, [13, 999, 12, 5812983094])
    # An id is z·2^42 + y·2^21 + x; the first is 26388279066624 + 14680064 + 7.
    assert three.sites.to_pydict() == {
        "synapse_id": [26388293746695, 30786340257799, 9223367638810361855],
        "neuron_id": [13, 13, 13],
        "x": [7.0, 7.0, 2097151.0],
        "y": [7.0, 7.0, 0.0],
        "z": [6.0, 7.0, 2097151.0],
    }
    assert (unknown.known, empty.known) == (False, True)
    assert len(unknown.sites) == len(empty.sites) == 0
    assert large.sites["z"].to_pylist() == [14043.0, 19155.0]
    assert large.sites.schema == sources.SITES


def test_batches(server: NeuPrint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuprint, "_BATCH", 2)
    found = ask(server, [11, 12, 13])
    assert [len(f.sites) for f in found] == [1, 0, 3]
    cyphers = [json.loads(r.body)["cypher"] for r in server.asked if r.body]
    assert len(cyphers) == 4


def test_malevnc_asks_its_own_data_set(server: NeuPrint) -> None:
    [found] = sources.presynaptic_sites([11], settings(server, "malevnc"))
    assert found.known
    assert json.loads(server.asked[-1].body)["dataset"] == "manc:v1.2.3"


@pytest.mark.parametrize("token", ['{"token": "neuprint-token"}', '"neuprint-token"'])
def test_a_token_as_the_web_page_shows_it(server: NeuPrint, token: str) -> None:
    assert ask(server, [11], NEUPRINT_APPLICATION_CREDENTIALS=token)[0].known


def pages(
    server: NeuPrint, after: int | None = None
) -> list[tuple[list[int], int | None]]:
    listed = sources.listing(settings(server), after)
    return [(page["neuron_id"].to_pylist(), last) for page, last in listed]


def test_the_listing_goes_on_behind_any_page(
    server: NeuPrint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuprint, "_PAGE_SITES", 4)
    assert pages(server) == [([11, 13, 13, 13], 13), ([5812983094] * 2, 5812983094)]
    assert pages(server, 13) == pages(server)[1:]
    monkeypatch.setattr(neuprint, "_PAGE_SITES", 1)  # a page keeps a body together
    whole = pages(server)
    assert whole == [([11], 11), ([13] * 3, 13), ([5812983094] * 2, 5812983094)]
    for done, (_, last) in enumerate(whole):
        assert pages(server, last) == whole[done + 1 :]
    monkeypatch.setattr(neuprint, "_PAGE_BODIES", 1)
    assert pages(server) == whole


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"NEUPRINT_APPLICATION_CREDENTIALS": ""},
            "needs a token; set NEUPRINT_APPLIC",
        ),
        (
            {"NEUPRINT_APPLICATION_CREDENTIALS": "wr0ng"},
            r"refuses access \(401: invalid or exp",
        ),
        ({"NEUPRINT_DATASET": "mouse"}, "'mouse' does not exist.*set NEUPRINT_DATASET"),
        ({"NEUPRINT_SERVER": "http://x"}, "must be https"),
    ],
)
def test_settings_that_do_not_fit(
    server: NeuPrint, changed: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ask(server, [11], **changed)
    assert TOKEN not in str(caught.value)
    assert "wr0ng" not in str(caught.value)


@pytest.mark.long
def test_a_certificate_that_nobody_knows(
    server: NeuPrint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with pytest.raises(UserError, match="no certificate that is trusted here"):
        ask(server, [11])


DATASETS = of_json({NeuPrint.DATASET: {}})
KNOWN = of_json({"columns": [], "data": [[11]]})


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([PAGE], "web page"),
        ([Answer(200, b"{")], "no list of data sets"),
        ([of_json([])], "no list of data sets"),
        ([DATASETS, Answer(200, b'{"data": [')], "no table of bodyId"),
        ([DATASETS, of_json({"data": [[1, 2]]})], "no table of bodyId"),
        ([DATASETS, of_json({"data": [["11"]]})], "no table of bodyId"),
        ([DATASETS, of_json({"data": [[1e300]]})], "no table of bodyId"),
        ([DATASETS, of_json({"data": None})], "no table of bodyId"),
        ([DATASETS, of_json({"error": "Timeout"}, 400)], r"\(400: Timeout\)"),
        (
            [DATASETS, KNOWN, of_json({"data": [[11, 1, 2, 3.5]]})],
            "no table of bodyId, x, y, z",
        ),
        (
            [DATASETS, KNOWN, of_json({"data": [[11, 1, 2, None]]})],
            "no table of bodyId, x, y, z",
        ),
        (
            [DATASETS, KNOWN, of_json({"data": [[11, 1, 2, -3]]})],
            "outside of any volume",
        ),
        (
            [DATASETS, KNOWN, of_json({"data": [[12, 1, 2, 3]]})],
            "T-bars of other bodies",
        ),
    ],
)
def test_answers_of_another_shape(
    server: NeuPrint, answers: list[Answer], words: str
) -> None:
    server.faults = list(answers)
    with pytest.raises(UserError, match=words):
        ask(server, [11])


def test_a_listing_that_would_not_end(server: NeuPrint) -> None:
    server.faults = [DATASETS, of_json({"data": [[11, 1], [11, 1]]})]
    with pytest.raises(UserError, match="bodies that are not in order"):
        pages(server)


@pytest.mark.long
def test_it_asks_again(server: NeuPrint) -> None:
    server.faults = [Answer(502), "cut off", "drop", "slow", *[Answer(500)] * 2]
    assert len(ask(server, [13])[0].sites) == 3
