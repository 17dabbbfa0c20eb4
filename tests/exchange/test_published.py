# SPDX-License-Identifier: Apache-2.0
"""Reads every kind of file that other projects write, made here with its columns."""

import gzip
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from synister_jax.base.errors import UserError
from synister_jax.exchange import published
from synister_jax.tables import file_formats, predictions, synapses

FULL = ("gaba", "acetylcholine", "glutamate", "octopamine", "serotonin", "dopamine")
BODY = 720_575_940_612_345_679  # float64 cannot hold this number
ID = 5_813_105_172_000_000_123


def values(classes: int) -> np.ndarray:
    """Returns [3, classes] float32 probabilities. The second row is NaN."""
    result = np.random.default_rng(0).dirichlet(np.ones(classes), 3)
    result[1] = np.nan
    return result.astype(np.float32)


def write(path: pathlib.Path, columns: Mapping[str, Any]) -> pathlib.Path:
    table = pa.table(dict(columns))
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, str(path), compression="uncompressed")
    else:
        sink = pa.BufferOutputStream()
        csv.write_csv(table, sink)
        content = sink.getvalue().to_pybytes()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(source: published.Published) -> pa.Table:
    return pa.concat_tables(source.tables())


def named(names: list[str], p: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(names, p.T, strict=True))


P6, P7, P8 = values(6), values(7), values(8)
XYZ = {"x": [10, 20, 30], "y": [1, 2, 3], "z": [100, 200, 300]}
SEVEN = [*FULL, "neither"]
EIGHT = sorted([*FULL, "histamine", "tyramine"])
BODIES = pa.array([BODY, None, 0])
KINDS = {
    "zenodo": (
        ".feather",
        named([f"nts_8.{n}" for n in SEVEN], P7)
        | {"body": BODIES, **XYZ, "id": [ID, 2, 3]},
        (8, 8, 8),
        SEVEN,
        P7,
    ),
    "flyem": (
        ".feather",
        {
            "point_id": pa.array([ID, 2, 3], pa.uint64()),
            **{name: pa.array(v, pa.int32()) for name, v in XYZ.items()},
            "conf": [0.5, 0.5, 0.5],
            "body": BODIES,
            **named([f"nt_{n}_prob" for n in [*FULL, "unknown"]], P7),
            "split": pa.array(["train", "test", None]).dictionary_encode(),
        },
        (8, 8, 8),
        SEVEN,
        P7,
    ),
    "cave": (
        ".feather",
        {
            "id": [ID, 2, 3],
            "pre_pt_root_id": BODIES,
            "post_pt_root_id": [1, 2, 3],
            "cleft_score": [30, 60, 90],
            **named(["gaba", "ach", "glut", "oct", "ser", "da"], P6),
            "pre_pt_position": [[10, 1, 100], [20, 2, 200], [30, 3, 300]],
            "post_pt_position": [[0, 0, 0]] * 3,
        },
        None,
        FULL,
        P6,
    ),
    "fafbseg": (
        ".csv.gz",
        {
            "id": [ID, 2, 3],
            "pre": BODIES,
            "post": [1, 2, 3],
            **{f"pre_{axis}": v for axis, v in XYZ.items()},
            **{f"post_{axis}": v for axis, v in XYZ.items()},
            **named(list(FULL), P6),
        },
        None,
        FULL,
        P6,
    ),
    "banc": (
        ".parquet",
        {
            "id": [ID, 2, 3],
            **{n: v.astype(np.float16) for n, v in named(EIGHT, P8).items()},
            "predicted_nt": ["gaba", None, "tyramine"],
            "probability": np.array([0.9, np.nan, 0.5], np.float16),
        },
        None,
        EIGHT,
        P8.astype(np.float16).astype(np.float32),
    ),
    "request": (
        ".csv",
        {
            "position_id": [ID, 2, 3],
            "skid": [BODY, -1, -1],
            **XYZ,
            **named(list(FULL), P6),
        },
        None,
        FULL,
        P6,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_known_by_its_columns(tmp_path: pathlib.Path, kind: str) -> None:
    suffix, columns, voxel_size, classes, expected = KINDS[kind]
    source = published.open(write(tmp_path / f"any{suffix}", columns), voxel_size)
    assert source.classes == tuple(classes)
    table = read(source)
    assert table.schema == source.schema
    assert table["id"].to_pylist() == [ID, 2, 3]
    for index, name in enumerate(classes):
        np.testing.assert_array_equal(table[name].to_numpy(), expected[:, index])
    position = np.array([[100, 1, 10], [200, 2, 20], [300, 3, 30]], float)
    if kind == "banc":
        assert table["z_nm"].null_count == 3 and not source.has_positions
        assert table["neuron_id"].null_count == 3
    else:
        scale = 8 if voxel_size else 1
        found = synapses.positions_nm_zyx(table)
        np.testing.assert_array_equal(found, position * scale)
        assert source.in_voxels == bool(voxel_size)
        assert table["neuron_id"].to_pylist() == [BODY, None, None]


def test_our_own_table_also_as_a_folder(
    tmp_path: pathlib.Path, synapse_table: pa.Table
) -> None:
    rng = np.random.default_rng(1)
    classes = ("unknown", "gaba", "neither")
    table = synapses.conform(synapse_table, "here")
    p = rng.dirichlet(np.ones(3), len(table)).astype(np.float32)
    made = predictions.build(table, p, ["ok"] * len(table), classes, {})
    feather.write_feather(made, str(tmp_path / "a.feather"), compression="lz4")
    (tmp_path / "b.parquet").mkdir()
    parquet.write_table(made.slice(0, 50), tmp_path / "b.parquet" / "part-0.parquet")
    parquet.write_table(made.slice(50), tmp_path / "b.parquet" / "part-1.parquet")
    for name in ("a.feather", "b.parquet"):
        source = published.open(tmp_path / name)
        assert source.classes == classes and source.has_positions
        found = read(source)
        assert found["id"].equals(made["synapse_id"])
        assert found["neuron_id"].equals(made["neuron_id"])
        assert found["neurotransmitter"].equals(made["neurotransmitter"])
        np.testing.assert_array_equal(
            synapses.positions_nm_zyx(found), synapses.positions_nm_zyx(made)
        )
        columns = [found[c].to_numpy() for c in classes]
        np.testing.assert_array_equal(np.stack(columns, 1), p)


def test_only_flyem_says_unknown_for_neither(tmp_path: pathlib.Path) -> None:
    ids, p = {"id": [ID, 2, 3]}, values(3)
    for names, classes in (
        (["nt_gaba_prob", "nt_unknown_prob"], ("gaba", "neither")),
        (
            ["nt_gaba_prob", "nt_neither_prob", "nt_unknown_prob"],
            ("gaba", "neither", "unknown"),
        ),
        (["nts_3.gaba", "nts_3.unknown"], ("gaba", "unknown")),
        (["gaba", "unknown"], ("gaba", "unknown")),
    ):
        path = write(tmp_path / "t.feather", ids | dict(zip(names, p.T, strict=False)))
        assert published.open(path).classes == classes


def test_a_line_break_in_a_packed_csv(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 1024)
    known = ["line\n" * (i % 90) for i in range(300)]
    columns = {"id": range(300), "gaba": [0.5] * 300, "ach": [0.5] * 300}
    path = write(tmp_path / "t.csv.gz", columns | {"neurotransmitter": known})
    table = read(published.open(path))
    assert table["id"].to_pylist() == list(range(300))


def test_voxels_without_a_size_are_no_positions(tmp_path: pathlib.Path) -> None:
    suffix, columns, *_ = KINDS["zenodo"]
    source = published.open(write(tmp_path / f"t{suffix}", columns))
    assert source.in_voxels and not source.has_positions
    assert read(source)["x_nm"].null_count == 3


def test_coordinates_as_text_leave_the_ids(tmp_path: pathlib.Path) -> None:
    columns = KINDS["cave"][1] | {"pre_pt_position": ["[1 2 3]"] * 3}
    columns["post_pt_position"] = ["[1 2 3]"] * 3
    source = published.open(write(tmp_path / "t.csv", columns))
    assert not source.has_positions and read(source)["id"][0].as_py() == ID


def two(**columns: Any) -> dict[str, Any]:
    return {"gaba": [0.5, 0.25], "ach": [0.5, 0.75]} | columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            two(id=[1.0, 2.0]),
            "row 0: id is 1.0; ids must be integers, because floats",
        ),
        (two(id=["7", "1.2e18"]), "row 1: id is '1.2e18'; ids must be"),
        (two(id=[1, 2], body=[1.0, np.nan]), "row 0: body is 1.0; ids must be"),
        (
            two(id=[1, 2], gaba=[0.5, 37]),
            "row 1: gaba is 37, which is not a probability",
        ),
        (
            two(id=[1, 2], gaba=["a", "b"]),
            "column gaba has the type string; probabilities must be numbers",
        ),
        (
            two(),
            "its columns are gaba, ach; recognised columns: gaba, ach. The table needs",
        ),
        (
            {"tag": ["gaba"], "value": [0.9], "id": [1]},
            "columns are tag, value, id; recognised columns: id",
        ),
        ({"id": [1], "nts_3.gaba": [0.5]}, "at least two classes"),
        (
            {"id": [1], "nts_3.gaba": [0.5], "nts_8.gaba": [0.5]},
            "nts_3.gaba and nts_8.gaba both belong to the class gaba; remove one",
        ),
        (two(id=[1, 2], pre_pt_position=[[1, 2, 3], [1]]), "column pre_pt_position:"),
    ],
)
def test_what_is_no_such_table_is_told(
    tmp_path: pathlib.Path, columns: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "t.feather", columns)
    with pytest.raises(UserError) as caught:
        read(published.open(path))
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["t.feather", "t.parquet", "t.csv.gz"])
def test_a_file_cut_short_is_told(tmp_path: pathlib.Path, name: str) -> None:
    rng = np.random.default_rng(0)
    p = rng.random((2, 5000))
    path = write(tmp_path / name, {"id": np.arange(5000), "gaba": p[0], "ach": p[1]})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"cannot read predictions {path}: "):
        read(published.open(path))


def test_absent_packed_and_empty_are_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="predictions .*no.feather does not exist"):
        published.open(tmp_path / "no.feather")
    with pytest.raises(UserError, match="no.csv.gz"):
        published.open(tmp_path / "no.csv.gz")
    with pytest.raises(UserError, match="unpack it first: bunzip2 t.feather.bz2"):
        published.open(tmp_path / "t.feather.bz2")
    with pytest.raises(UserError, match="a folder without Parquet files"):
        published.open(tmp_path)


def test_files_of_a_folder_have_the_same_columns(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.parquet", two(id=[1, 2]))
    write(tmp_path / "b.parquet", two(id=[3, 4], body=[1, 2]))
    with pytest.raises(
        UserError, match="b.parquet does not have the same columns as .*a.parquet"
    ):
        published.open(tmp_path)
