# SPDX-License-Identifier: Apache-2.0
"""Tests of the annotations, with a decoder written only from the specification."""

import json
import math
import pathlib
import struct
import urllib.parse
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import files
from synister_jax.pages import neurons_table
from synister_jax.serve import annotations
from synister_jax.tables import synapses
from tests.helpers.prediction_tables import NEURON, table_of

CLASSES = ("gaba", "acetylcholine", "dopamine")
NAN = math.nan
# Row 2 has no position, row 3 no prediction and row 4 no neuron. Rows 0 and 1 have the
# same synapse id.
PROBABILITIES = [
    *([0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [NAN] * 3, [NAN] * 3, [0.25, 0.5, 0.25]),
]
COLUMNS: dict[str, Any] = {
    "synapse_id": [2**62 + 1, 2**62 + 1, 5, 6, 7],
    "neuron_id": [NEURON, NEURON + 1, NEURON, NEURON, None],
    "x_nm": [438_817.0, 438_817.0, NAN, 1_000.5, 2_000.0],
    "y_nm": [164_242.0, 164_242.0, NAN, 2_000.25, 3_000.0],
    "z_nm": [217_440.0, 217_440.0, NAN, -40.0, 4_000.0],
}
VIEW = "http://127.0.0.1:8000/view/key"


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return _write(tmp_path, table_of(PROBABILITIES, COLUMNS))


def _write(
    folder: pathlib.Path, table: pa.Table, offset_nm_zyx: tuple[float, ...] = (0, 0, 0)
) -> pathlib.Path:
    path = folder / "predictions.feather"
    files.write_feather(path, table)
    geometry = {"voxel_size_nm_zyx": [40.0, 4.0, 4.0], "offset_nm_zyx": offset_nm_zyx}
    files.write_json(folder / "predictions.json", geometry)
    return path


class _Reader:
    """A reader of points, from src/datasource/precomputed/annotations.md."""

    _CODES = {"float32": "f", "uint32": "I", "uint16": "H", "uint8": "B"}

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        by_size = [
            [
                p
                for p in info["properties"]
                if struct.calcsize(self._CODES[p["type"]]) == n
            ]
            for n in (4, 2, 1)
        ]
        self.properties = sum(by_size, [])

    def one(self, data: bytes, at: int = 0) -> tuple[dict[str, Any], int]:
        rank = len(self.info["dimensions"])
        found: dict[str, Any] = {"point": struct.unpack_from(f"<{rank}f", data, at)}
        at += 4 * rank
        for each in self.properties:
            code = f"<{self._CODES[each['type']]}"
            [found[each["id"]]] = struct.unpack_from(code, data, at)
            at += struct.calcsize(code)
        padding = -at % 4
        assert data[at : at + padding] == bytes(padding)
        return found, at + padding

    def single(self, data: bytes) -> dict[str, Any]:
        found, at = self.one(data)
        for relationship in self.info["relationships"]:
            [number] = struct.unpack_from("<I", data, at)
            ids = struct.unpack_from(f"<{number}Q", data, at + 4)
            found[relationship["id"]] = list(ids)
            at += 4 + 8 * number
        assert at == len(data)
        return found

    def several(self, data: bytes) -> dict[int, dict[str, Any]]:
        [number] = struct.unpack_from("<Q", data)
        at, found = 8, []
        for _ in range(number):
            # Padding counts from the annotation's start, which is a multiple of 4.
            annotation, at = self.one(data, at)
            found.append(annotation)
        ids = struct.unpack_from(f"<{number}Q", data, at)
        assert at + 8 * number == len(data)
        return dict(zip(ids, found, strict=True))


def test_info_says_what_the_specification_asks_for(path: pathlib.Path) -> None:
    info = json.loads(json.dumps(annotations.info(path)))
    assert info["@type"] == "neuroglancer_annotations_v1"
    assert info["annotation_type"] == "POINT"
    assert list(info["dimensions"].items()) == [(name, [1e-9, "m"]) for name in "xyz"]
    [nt] = [p for p in info["properties"] if p["id"] == "nt"]
    assert nt["type"] == "uint8"
    assert dict(zip(nt["enum_values"], nt["enum_labels"], strict=True)) == {
        **dict(enumerate(CLASSES)),
        3: "no prediction",
    }
    [level] = info["spatial"]
    low, high = np.array(info["lower_bound"]), np.array(info["upper_bound"])
    np.testing.assert_array_equal(
        np.multiply(level["grid_shape"], level["chunk_size"]), high - low
    )
    assert level["limit"] == 4
    points = _Reader(info).several(annotations.spatial(path)).values()
    for point in points:
        assert (low <= point["point"]).all() and (point["point"] < high).all()


def test_every_row_with_a_position_is_a_point(path: pathlib.Path) -> None:
    read = _Reader(annotations.info(path)).several(annotations.spatial(path))
    assert sorted(read) == [0, 1, 3, 4]  # row numbers, not synapse ids
    for row, found in read.items():
        position = [COLUMNS[f"{axis}_nm"][row] for axis in "xyz"]
        assert found["point"] == tuple(np.float32(position))
        values = np.array(PROBABILITIES[row], np.float32)
        if np.isnan(values).any():
            assert (found["nt"], found["probability"]) == (3, 0)
        else:
            expected = (int(values.argmax()), values.max())
            assert (found["nt"], found["probability"]) == expected


def test_one_point_names_its_synapse_and_neuron_exactly(path: pathlib.Path) -> None:
    reader = _Reader(annotations.info(path))
    together = reader.several(annotations.spatial(path))
    for row in (0, 1, 3, 4):
        found = reader.single(annotations.by_id(path, row))
        assert found.pop("synapse") == [COLUMNS["synapse_id"][row]]
        neuron = COLUMNS["neuron_id"][row]
        assert found.pop("neuron") == ([] if neuron is None else [neuron])
        assert found == together[row]


@pytest.mark.parametrize("number", [2, 5, -1, 2**63, 2**64 - 1])
def test_rows_that_are_not_there(path: pathlib.Path, number: int) -> None:
    assert annotations.by_id(path, number) is None


def test_points_of_a_neuron_and_of_a_shared_synapse(path: pathlib.Path) -> None:
    reader = _Reader(annotations.info(path))
    of_neuron = annotations.related(path, "neuron", NEURON)
    assert sorted(reader.several(of_neuron)) == [0, 3]
    of_synapse = annotations.related(path, "synapse", 2**62 + 1)
    assert sorted(reader.several(of_synapse)) == [0, 1]
    assert annotations.related(path, "neuron", 1) is None
    assert annotations.related(path, "by_id", 0) is None


def test_no_point_at_all(tmp_path: pathlib.Path) -> None:
    columns = dict.fromkeys(synapses.POSITION, [NAN])
    path = _write(tmp_path, table_of([[NAN] * 3], columns))
    info = annotations.info(path)
    assert (np.array(info["upper_bound"]) > info["lower_bound"]).all()
    assert _Reader(info).several(annotations.spatial(path)) == {}
    assert "position" not in _state(annotations.link(path, VIEW))


def test_first_points_of_a_cell_are_from_all_over(tmp_path: pathlib.Path) -> None:
    rows = 400
    columns = {name: np.arange(rows, dtype=float) for name in synapses.POSITION}
    path = _write(tmp_path, table_of(np.full((rows, 3), 1 / 3), columns))
    read = _Reader(annotations.info(path)).several(annotations.spatial(path))
    first = list(read)[:40]
    assert min(first) < rows / 4 and max(first) > rows * 3 / 4
    assert annotations.spatial(path) == annotations.spatial(path)


def _state(link: str) -> dict[str, Any]:
    return json.loads(urllib.parse.unquote(urllib.parse.urlsplit(link).fragment[1:]))


def test_link_shows_volume_and_points_in_the_classes_colours(
    path: pathlib.Path,
) -> None:
    link = annotations.link(path, VIEW, "https://viewer.example/")
    assert link.startswith("https://viewer.example/#!%7B")
    state = _state(link)
    assert state["dimensions"] == {"x": [4e-9, "m"], "y": [4e-9, "m"], "z": [4e-8, "m"]}
    image, points = state["layers"]
    assert image["source"] == {"url": f"precomputed://{VIEW}/volume"}
    assert points["source"] == f"precomputed://{VIEW}/annotations"
    for place, each in enumerate(neurons_table.legend(CLASSES)):
        colour = bytes.fromhex(annotations.COLOURS[each.colour][1:])
        mixed = ", ".join(f"{part / 255:.3f}" for part in colour)
        assert f"prop_nt() == {place}u) setColor(vec3({mixed}))" in points["shader"]
    at = np.multiply(state["position"], [4, 4, 40])
    xyz = np.transpose([COLUMNS[f"{axis}_nm"] for axis in "xyz"])
    assert np.abs(xyz - at).max(axis=1)[~np.isnan(xyz).any(axis=1)].min() < 4


def test_class_names_cannot_change_the_shader(tmp_path: pathlib.Path) -> None:
    classes = ("a\n}", "b")
    path = _write(tmp_path, table_of([[0.5, 0.5]], {}, classes))
    [_, points] = _state(annotations.link(path, VIEW))["layers"]
    assert points["shader"].count("\n") == 6
    assert points["shader"].count("}") == 1


@pytest.mark.parametrize(("offset_nm", "left"), [((80, 8, 12), 0), ((80, 8, 13), 0.25)])
def test_part_of_a_voxel_that_an_image_cannot_state_is_in_the_link(
    tmp_path: pathlib.Path, offset_nm: tuple[float, ...], left: float
) -> None:
    path = _write(tmp_path, table_of(PROBABILITIES, COLUMNS), offset_nm)
    [image, _] = _state(annotations.link(path, VIEW))["layers"]
    matrix = image["source"].get("transform", {}).get("matrix", np.eye(3, 4).tolist())
    np.testing.assert_allclose(matrix, np.column_stack([np.eye(3), [left, 0, 0]]))


def test_palette_is_that_of_reports_in_the_dark() -> None:
    package = pathlib.Path(annotations.__file__).parents[1]
    for name in ("pages/style.css", "serve/static/page.css"):
        dark = (package / name).read_text().partition("prefers-color-scheme: dark")[2]
        for number, colour in enumerate(annotations.COLOURS):
            assert f"--c{number}: {colour};" in dark


def test_a_changed_file_is_read_again(path: pathlib.Path) -> None:
    before = annotations.info(path)["spatial"][0]["limit"]
    columns = {name: values[:1] for name, values in COLUMNS.items()}
    _write(path.parent, table_of(PROBABILITIES[:1], columns))
    assert (before, annotations.info(path)["spatial"][0]["limit"]) == (4, 1)
