# SPDX-License-Identifier: Apache-2.0
"""Tests of what all sources share, of their coordinates, and of the source `none`."""

import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.em import spaces
from synister_jax.ondemand import sources
from tests.helpers import service_servers


def test_every_source_has_a_space_and_a_module() -> None:
    assert list(sources.SOURCES) == [
        "fafb-catmaid",
        "fafb-flywire",
        "hemibrain",
        "malevnc",
        "none",
    ]
    for name, source in sources.SOURCES.items():
        assert source.name == name
        assert source.space in spaces.SPACES
        sources._module(name)
    with pytest.raises(UserError, match="no source 'banc'; give one of fafb-catmaid"):
        sources.settings("banc")


def test_clients_are_imported_only_when_a_service_is_asked() -> None:
    program = """
import sys
import synister_jax.ondemand.sources as sources
sources.settings("hemibrain")
print([m for m in ("requests", "neuprint", "caveclient", "pandas") if m in sys.modules])
sys.modules["neuprint"] = sys.modules["requests"] = None
for source in "hemibrain", "fafb-catmaid":
    try:
        next(sources.presynaptic_sites([1], sources.settings(source)))
    except Exception as error:
        print(type(error).__name__, error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    none, *errors = run.stdout.splitlines()
    assert none == "[]"
    for error, source in zip(errors, ("hemibrain", "fafb-catmaid"), strict=True):
        assert error.startswith(f"UserError source {source}: the package ")
        assert error.endswith("pip install 'synister_jax[sources]'")


# (source, x y z of the source, z y x in nm in the volume). For hemibrain, synistereq
# gives the voxel (34427 - x - 1, z, y), and a voxel has 8 nm.
BY_HAND = [
    ("fafb-catmaid", (438817, 164242, 217440), (217400, 164242, 438817)),
    ("fafb-catmaid", (0.5, -1, 0), (-40, -1, 0.5)),
    ("hemibrain", (15300, 25268, 14043), (153008, 112344, 202144)),
    ("hemibrain", (34426, 0, 1), (0, 8, 0)),
    ("hemibrain", (0, 1, 0), (275408, 0, 8)),
    ("malevnc", (23217, 35252, 67070), (536560, 282016, 185736)),
    ("none", (1.5, 2.5, 3.5), (3.5, 2.5, 1.5)),
]


@pytest.mark.parametrize(("source", "xyz", "zyx"), BY_HAND)
def test_positions_by_hand(
    source: str, xyz: tuple[float, ...], zyx: tuple[float, ...]
) -> None:
    given = {a: np.array([v, np.nan]) for a, v in zip("xyz", xyz, strict=True)}
    placed = sources.to_volume_nm_zyx(
        given, (34427, 39743, 41407), sources.settings(source)
    )
    assert placed.dtype == np.float64
    assert placed[0].tolist() == list(zyx)
    assert np.isnan(placed[1]).all()


def test_a_flip_needs_the_volume() -> None:
    given = dict.fromkeys("xyz", np.zeros(1))
    with pytest.raises(UserError, match="--volume"):
        sources.to_volume_nm_zyx(given, None, sources.settings("hemibrain"))


@pytest.fixture
def table(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "synapses.feather"
    columns = {
        "synapse_id": [4, 2, 720575940628857211, 1, 9],
        "z_nm": [40.0, 80.0, 120.0, 160.0, 0.0],
        "y_nm": [4.0, 8.0, None, 16.0, 0.0],
        "x_nm": [1.0, 2.0, 3.0, 4.0, 0.0],
        "neuron_id": [7, 8, 720575940628857210, 7, None],
    }
    feather.write_feather(pa.table(columns), str(path))
    return path


def test_neurons_of_a_table(table: pathlib.Path) -> None:
    settings = sources.settings("none", synapses=table)
    asked = [720575940628857210, 5, 7]
    found = list(sources.presynaptic_sites(asked, settings))
    assert [(f.neuron_id, f.known) for f in found] == [
        (720575940628857210, True),
        (5, False),
        (7, True),
    ]
    assert all(f.sites.schema == sources.SITES for f in found)
    assert found[0].sites["synapse_id"].to_pylist() == [720575940628857211]
    assert np.isnan(found[0].sites["y"].to_numpy()).all()
    assert found[2].sites.to_pydict() == {
        "synapse_id": [4, 1],
        "neuron_id": [7, 7],
        "x": [1.0, 4.0],
        "y": [4.0, 16.0],
        "z": [40.0, 160.0],
    }


def test_a_table_that_names_no_neuron_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "nobody.csv"
    path.write_text("synapse_id,z_nm,y_nm,x_nm\n1,2,3,4\n")
    settings = sources.settings("none", synapses=path)
    with pytest.raises(UserError, match="names no neuron"):
        next(sources.presynaptic_sites([1], settings))


def test_background_is_no_neuron_and_not_asked_for() -> None:
    server = service_servers.Catmaid([(16, 1, 2.0, 3.0, 4.0)])
    settings = sources.settings("fafb-catmaid", environment={"CATMAID_URL": server.url})
    try:
        found = list(sources.presynaptic_sites([0, 16], settings))
    finally:
        server.close()
    assert [(f.neuron_id, f.known, len(f.sites)) for f in found] == [
        (0, False, 0),
        (16, True, 1),
    ]
    asked = [ids for r in server.asked for k, ids in r.form.items() if "skel" in k]
    assert asked and ["0"] not in asked


def test_public_hemibrain_is_not_the_export() -> None:
    settings = sources.settings("hemibrain", environment={})
    xyz = {name: np.array([100.0]) for name in "xyz"}
    with pytest.raises(UserError, match="--source=none"):
        sources.to_volume_nm_zyx(xyz, (41407, 39743, 34431), settings)


def test_what_is_shown_holds_no_secret_and_tells_tables_apart(
    tmp_path: pathlib.Path,
) -> None:
    environment = {"CATMAID_TOKEN": "geheim", "CATMAID_URL": "https://u:pw@host/x"}
    shown = sources.settings("fafb-catmaid", environment=environment).shown()
    assert shown["project"] == "1"
    assert not any(s in str(shown) for s in ("geheim", "pw"))
    path = tmp_path / "t.csv"
    path.write_text("a")
    first = sources.settings("none", synapses=path).shown()
    path.write_text("ab")
    assert sources.settings("none", synapses=path).shown() != first


def test_a_table_is_needed_for_neurons_and_is_no_service(table: pathlib.Path) -> None:
    with pytest.raises(UserError, match="give --synapses=TABLE"):
        next(sources.presynaptic_sites([1], sources.settings("none")))
    with pytest.raises(UserError, match="a listing already"):
        sources.listing(sources.settings("none", synapses=table))


def test_settings_come_from_the_environment_then_the_ini(
    tmp_path: pathlib.Path,
) -> None:
    ini = tmp_path / "credentials.ini"
    ini.write_text(
        "[hemibrain]\ndataset = hemibrain:v1.0\n"
        "[Credentials]\nserver = np.example\ndataset = manc\ntoken = ab%(c\nuser = x\n"
    )
    given = sources.settings("hemibrain", ini, {"NEUPRINT_SERVER": " other.example "})
    assert given.values == {
        "server": "other.example",
        "dataset": "hemibrain:v1.0",
        "token": "ab%(c",
    }
    assert sources.settings("malevnc", ini, {})["dataset"] == "manc"
    assert sources.settings("hemibrain", None, {})["dataset"] == "hemibrain:v1.2.1"
    assert given.shown() == {"server": "other.example", "dataset": "hemibrain:v1.0"}


def test_the_originals_files_are_read(tmp_path: pathlib.Path) -> None:
    ini = tmp_path / "catmaid_credentials.ini"
    ini.write_text("[Credentials]\nuser=None\npassword=None\ntoken=9944b\n")
    given = sources.settings("fafb-catmaid", ini, {})
    assert (given["user"], given["password"], given["token"]) == ("", "", "9944b")


SECRET = "h1dd3n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"token = {SECRET}\n", r"is not an ini file; write \[hemibrain\]"),
        (f"[hemibrain]\n{SECRET}\n", "is not an ini file"),
        (f"[hemibrain]\ntoken={SECRET}\ntoken={SECRET}\n", "is not an ini file"),
        ("[hemibrain]\nurl=x\n", "has no setting 'url'; it has server, dataset, token"),
        (f"[hemibrain]\ntoken={SECRET} x\n", "blanks or unusual.*NEUPRINT_APPLICATION"),
        (f"[hemibrain]\ntoken=ä{SECRET}\n", "blanks or unusual"),
        (f'[hemibrain]\ntoken={{"token": ["{SECRET}"]}}\n', "blanks or unusual"),
        (f'[hemibrain]\ntoken={{"tok": "{SECRET}"}}\n', "blanks or unusual"),
    ],
)
def test_an_ini_that_is_wrong(tmp_path: pathlib.Path, text: str, words: str) -> None:
    ini = tmp_path / "credentials.ini"
    ini.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        sources.settings("hemibrain", ini, {})
    assert SECRET not in str(caught.value)
    ini.write_bytes(b"[hemibrain]\ntoken=\xff\n")
    with pytest.raises(UserError, match="is not an ini file"):
        sources.settings("hemibrain", ini, {})
    with pytest.raises(UserError, match="cannot read .*absent"):
        sources.settings("hemibrain", tmp_path / "absent", {})


def test_no_text_of_settings_has_a_secret() -> None:
    values = {"CATMAID_TOKEN": SECRET, "CATMAID_HTTP_PASSWORD": SECRET}
    values |= {"CATMAID_HTTP_USER": SECRET, "CATMAID_URL": f"http://me:{SECRET}@host/"}
    given = sources.settings("fafb-catmaid", None, values)
    assert SECRET not in f"{given!r} {given} {given.shown()} {given.where('token')}"
