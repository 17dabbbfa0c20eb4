# SPDX-License-Identifier: Apache-2.0
"""Tests of FlyWire with local servers: CAVE's answers, and positions in FAFB."""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.ondemand import sources
from synister_jax.ondemand.sources import credentials, flywire, http_session
from tests.helpers.service_servers import PAGE, Answer, Cave, Transform, of_json

TOKEN = "cave-token"
ROOT, OTHER, LONELY = 720575940628857210, 720575940628857211, 720575940600000001
ROWS = [
    (30, ROOT, 400.0, 800.0, 4000.0),
    (10, OTHER, 4.0, 8.0, 40.0),
    (20, ROOT, 404.0, 800.0, 4000.0),
    *((100 + i, OTHER, float(i), 0.0, 0.0) for i in range(7)),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = http_session.RETRIES.new(backoff_factor=0.01, backoff_jitter=0.01)
    monkeypatch.setattr(http_session, "RETRIES", quick)


@pytest.fixture
def server() -> Iterator[Cave]:
    server = Cave(ROWS, roots=[LONELY])
    yield server
    server.close()


def settings(url: str, **changed: str) -> credentials.SourceSettings:
    values = {"CAVE_SERVER": url, "CAVE_TOKEN": TOKEN}
    return sources.settings("fafb-flywire", None, values | changed)


def ask(server: Cave, ids: list[int], **changed: str) -> list[sources.Found]:
    given = settings(server.url, **changed)
    return list(sources.presynaptic_sites(ids, given))


def test_every_root_in_the_order_asked(server: Cave) -> None:
    unknown, lonely, root, other = ask(server, [5, LONELY, ROOT, OTHER])
    assert root.sites.to_pydict() == {
        "synapse_id": [20, 30],
        "neuron_id": [ROOT, ROOT],
        "x": [404.0, 400.0],
        "y": [800.0, 800.0],
        "z": [4000.0, 4000.0],
    }
    assert root.sites.schema == sources.SITES
    assert other.sites["synapse_id"].to_pylist() == [10, *range(100, 107)]
    assert (lonely.known, len(lonely.sites)) == (True, 0)
    assert (unknown.known, len(unknown.sites)) == (False, 0)
    asked = json.loads(server.asked[-1].body)
    assert asked == {"node_ids": [5, LONELY]}


def test_batches(server: Cave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flywire, "_BATCH", 1)
    assert [len(f.sites) for f in ask(server, [OTHER, 5, ROOT])] == [8, 0, 2]


@pytest.mark.parametrize("server_rows", [100, 3])
def test_an_answer_that_was_cut_is_asked_for_in_parts(
    monkeypatch: pytest.MonkeyPatch, server_rows: int
) -> None:
    """The answer is cut by the limit of the client, or by the limit of the server."""
    monkeypatch.setattr(flywire, "_MOST_ROWS", 4)
    server = Cave(ROWS, most_rows=server_rows)
    found = ask(server, [ROOT, OTHER])
    server.close()
    assert found[1].sites["synapse_id"].to_pylist() == [10, *range(100, 107)]
    assert found[0].sites["synapse_id"].to_pylist() == [20, 30]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"CAVE_TOKEN": "wr0ng"},
            "redirects the request, perhaps to a login: .*CAVE_TOKEN",
        ),
        ({"CAVE_TABLE": "nothing"}, r"has nothing at this path \(404: no /materialize"),
        (
            {"CAVE_MATERIALIZATION": "new"},
            "'new' is not the number.*CAVE_MATERIALIZATION",
        ),
        ({"CAVE_DATASTACK": "mouse"}, r"nothing at this path \(404"),
    ],
)
def test_settings_that_do_not_fit(
    server: Cave, changed: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ask(server, [ROOT], **changed)
    assert "wr0ng" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_token_that_caveclient_saved(
    server: Cave, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="set CAVE_TOKEN .*, or save it as caveclient"):
        ask(server, [ROOT], CAVE_TOKEN="")
    saved = tmp_path / ".cloudvolume" / "secrets" / "cave-secret.json"
    saved.parent.mkdir(parents=True)
    saved.write_text(json.dumps({"token": TOKEN}))
    assert ask(server, [ROOT], CAVE_TOKEN="")[0].known
    saved.write_text(f"{{{TOKEN}")
    with pytest.raises(UserError, match="own file of tokens is broken") as caught:
        ask(server, [ROOT], CAVE_TOKEN="")
    assert TOKEN not in str(caught.value)


def test_no_browser_opens_where_terms_are_to_be_accepted(
    server: Cave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a safeguard, caveclient opens a browser on the machine that runs it."""
    monkeypatch.setenv("BROWSER", "false")
    data = {"tos_form_url": "http://127.0.0.1:1/tos"}
    terms = {"error": "missing_tos", "message": "accept the terms", "data": data}
    server.faults = [of_json("4.5.0"), of_json(terms, 403)]
    with pytest.raises(UserError, match=r"refuses access \(403: accept the terms\)"):
        ask(server, [ROOT])


STACK = {"aligned_volume": {"name": "a", "id": 1}, "segmentation_source": "x/t"}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([PAGE], "web page"),
        ([of_json("4.5.0"), Answer(200, b"{")], "data that caveclient cannot use"),
        ([of_json("4.5.0"), of_json({})], "data that caveclient cannot use"),
        ([of_json("new")], "data that caveclient cannot use"),
    ],
)
def test_answers_of_another_shape(
    server: Cave, answers: list[Answer], words: str
) -> None:
    server.faults = list(answers)
    with pytest.raises(UserError, match=words):
        ask(server, [ROOT])


@pytest.mark.parametrize(
    ("version", "answer", "words"),
    [
        ("5.15.0", of_json({}), "data that caveclient cannot use"),
        (
            "5.15.0",
            Answer(200, b"\xff\xff", "data.arrow"),
            "data that caveclient cannot use",
        ),
        (
            "5.15.0",
            of_json({"message": "out of memory"}, 500),
            r"\(500: out of memory\)",
        ),
        ("4.0.0", Answer(500), "is too old for caveclient"),
    ],
)
def test_queries_answered_wrongly(
    server: Cave, version: str, answer: Answer, words: str
) -> None:
    stack = of_json(STACK | {"local_server": server.url})
    server.faults = [of_json("4.5.0"), stack, of_json(version), *[answer] * 9]
    with pytest.raises(UserError, match=words):
        ask(server, [ROOT])


@pytest.mark.long
def test_it_asks_again(server: Cave) -> None:
    server.faults = [Answer(500), Answer(503), "cut off", "drop", "slow"]
    assert len(ask(server, [ROOT])[0].sites) == 2


def test_it_lists_no_volume() -> None:
    with pytest.raises(UserError, match="zenodo.10676866"):
        sources.listing(settings("http://127.0.0.1:1"))


@pytest.fixture
def moved() -> Iterator[Transform]:
    """A server that moves x by 2.6 and y by -0.5 voxels; positions at x = 0 fail."""
    server = Transform(lambda x, y, z: (2.6, -0.5) if x else None)
    yield server
    server.close()


def place(
    server: Transform, xyz: list[tuple[float, float, float]]
) -> list[list[float]]:
    url = server.url + Transform.PATH
    given = settings("http://127.0.0.1:1", FLYWIRE_TRANSFORM_URL=url)
    columns = dict(zip("xyz", np.array(xyz, np.float64).reshape(-1, 3).T, strict=True))
    positions = sources.to_volume_nm_zyx(columns, None, given)
    return positions.tolist()


def test_flywire_positions_by_hand(moved: Transform) -> None:
    """The position agrees with one computed by hand.

    x: 400 nm is voxel 100; 100 + 2.6 = 102.6 is rounded to 103, which is 412 nm.
    y: 804 nm is voxel 201; 201 - 0.5 = 200.5 is rounded to even, 200, which is 800 nm.
    z: 4,000 nm is section 100, which is one less in CATMAID, 99, at 3,960 nm.
    """
    assert place(moved, [(400.0, 804.0, 4000.0)]) == [[3960.0, 800.0, 412.0]]
    asked = json.loads(moved.asked[0].body)
    assert asked == {"locations": [[100.0, 201.0, 100.0]]}


def test_positions_without_a_place_are_nan(moved: Transform) -> None:
    nan = float("nan")
    given = [(nan, 1.0, 1.0), (0.0, 4.0, 40.0), (4.0, 4.0, 60.0), (4.0, nan, 1.0)]
    placed = np.array(place(moved, given))
    assert np.isnan(placed).all(axis=1).tolist() == [True, True, False, True]
    assert placed[2].tolist() == [40.0, 0.0, 16.0]  # section 1.5 rounds to 2
    assert place(moved, []) == []
    assert place(moved, given[:1])[0] != place(moved, given[:1])[0]  # no request
    assert len(moved.asked) == 1


def test_a_thousand_places_a_request(moved: Transform) -> None:
    given = [(4.0 * i, 40.0, 40.0) for i in range(1, 2_102)]
    placed = place(moved, given)
    assert [len(json.loads(r.body)["locations"]) for r in moved.asked] == [
        1000,
        1000,
        101,
    ]
    assert [p[2] for p in placed] == [4.0 * (i + 3) for i in range(1, 2_102)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (of_json([]), "no point for each"),
        (of_json({"x": [1], "y": [1], "z": [1]}), "no point for each"),
        (of_json([{"x": 1, "y": 2}]), "no point for each"),
        (of_json([{"x": "a", "y": 2, "z": 3}]), "no point for each"),
        (of_json([{"x": 1, "y": 2, "z": 3}] * 2), "no point for each"),
        (
            of_json({"detail": "Not Found"}, 404),
            r"nothing at this path \(404: Not Found\)",
        ),
        (PAGE, "web page.*FLYWIRE_TRANSFORM_URL"),
    ],
)
def test_transforms_of_another_shape(
    moved: Transform, answer: Answer, words: str
) -> None:
    moved.faults = [answer]
    with pytest.raises(UserError, match=words):
        place(moved, [(4.0, 4.0, 40.0)])
