# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather, parquet

from synister_jax.base.errors import UserError
from synister_jax.tables import reading, synapses
from tests.helpers.export_v3 import write_export
from tests.helpers.small_data import shared_data


def rows(**columns: list) -> pa.Table:
    table = {"synapse_id": [5, 6, 7], "z_nm": [0.0, 40.0, 80.0]}
    table |= {"y_nm": [1.0, 2.0, 3.0], "x_nm": [4.0, 5.0, 6.0]}
    table |= {"neuron_id": [720575940612345678, 2, None]}
    table |= {"neurotransmitter": ["gaba", None, "gaba+octopamine"]}
    return pa.table(table | columns)


def test_export_v3(tmp_path: pathlib.Path) -> None:
    write_export(tmp_path)
    table = reading.load(tmp_path)
    assert table.schema.names[:9] == synapses.SCHEMA.names
    assert table["synapse_id"].to_pylist() == [9, 3, 8]
    assert synapses.positions_nm_zyx(table).tolist() == [
        [40, 80, 400],
        [3, 2, 1],
        [9, 8, 7],
    ]
    assert table["neuron_id"].to_pylist() == [16, 27, 30]
    assert table["hemilineage"].to_pylist() == ["ALad1", None, "ALad1"]
    known = ["acetylcholine", None, "gaba+octopamine"]
    assert table["neurotransmitter"].to_pylist() == known
    assert table["split_skeleton"].to_pylist() == ["train", None, "validation"]
    assert table["split_brain_region"].to_pylist() == ["test", None, None]


def test_labels_leave_out_unknown_and_multiple_transmitters() -> None:
    table = rows()
    assert synapses.labels(table, ["acetylcholine", "gaba"]).tolist() == [1, -1, -1]


def test_published_neurons_and_hemilineages(tmp_path: pathlib.Path) -> None:
    published = shared_data("fafb_v3")
    neurons = json.loads((published / "skeletons_v3.json").read_text())
    made_up = {
        str(i): {"skeleton_id": int(n), "x": i, "y": 0, "z": 0, "brain_region": None}
        for i, n in enumerate(neurons)
    }
    hemilineages = json.loads((published / "hemi_lineages_v3.json").read_text())
    change = {"skeletons_v3": neurons, "hemi_lineages_v3": hemilineages}
    write_export(tmp_path, **change, synapses_v3=made_up)
    counts = reading.load(tmp_path)["neurotransmitter"].value_counts().to_pylist()
    found = {c["values"]: c["counts"] for c in counts}
    assert found == {
        "acetylcholine": 397,
        "gaba": 165,
        "dopamine": 83,
        "glutamate": 32,
        "octopamine": 5,
        "serotonin": 5,
        "gaba+octopamine": 1,
        None: 2116,
    }


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
name = st.none() | st.text("abcαβ,\"'+ _1", min_size=1).filter(
    lambda text: text.strip() == text
)
row = st.fixed_dictionaries(
    {"synapse_id": st.integers(-(2**63), 2**63 - 1)}
    | dict.fromkeys(synapses.POSITION, finite)
    | {"neuron_id": st.none() | st.integers(0, 2**63 - 1)}
    | {"neurotransmitter": st.sampled_from([None, "gaba", "dopamine+gaba"])}
    | dict.fromkeys(("hemilineage", "brain_region", "cell_type"), name)
    | {"split_a": st.sampled_from([None, *synapses.PARTS])}
)


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.lists(row, unique_by=lambda line: line["synapse_id"], min_size=1))
def test_any_table_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict]
) -> None:
    schema = pa.schema([*synapses.SCHEMA, ("split_a", pa.string())])
    table = synapses.conform(pa.Table.from_pylist(lines, schema), "drawn")
    folder = tmp_path_factory.mktemp("files")
    for suffix in ("feather", "parquet"):
        synapses.write(table, folder / f"a.{suffix}")
        found = reading.load(folder / f"a.{suffix}")
        assert found.equals(table) and found.schema.equals(table.schema)
    csv.write_csv(table, folder / "a.csv")
    assert reading.load(folder / "a.csv").equals(table)


@pytest.mark.parametrize("suffix", ["feather", "parquet", "csv"])
def test_file_formats_agree(tmp_path: pathlib.Path, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    table = rows(split_skeleton=["train", None, "test"], other=[1, 2, 3])
    write = {
        "feather": lambda t: feather.write_feather(t, str(path)),
        "parquet": lambda t: parquet.write_table(t, path),
        "csv": lambda t: csv.write_csv(t, path),
    }
    write[suffix](table)
    loaded = reading.load(path)
    assert loaded["synapse_id"].to_pylist() == [5, 6, 7]
    # A float cannot hold all digits of this id, so the reader must not use floats.
    assert loaded["neuron_id"].to_pylist() == [720575940612345678, 2, None]
    assert loaded["split_skeleton"].to_pylist() == ["train", None, "test"]
    assert loaded["hemilineage"].null_count == 3
    assert "other" not in loaded.column_names


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"synapse_id": [5, 5, 7]}, r"duplicate synapse_id: row 1 \(5\)"),
        ({"synapse_id": [5, None, 7]}, r"synapse_id is missing: row 1"),
        ({"synapse_id": [5.0, 6.0, 7.0]}, "ids must be integers"),
        ({"z_nm": [0.0, None, 1.0]}, "z_nm is missing or not finite: row 1"),
        ({"x_nm": [0.0, 1.0, float("inf")]}, "x_nm .* row 2"),
        ({"x_nm": ["0", "1", "here"]}, "x_nm"),
        (
            {"neurotransmitter": ["gaba", "gaba+glu", None]},
            r"unknown neurotransmitter 'glu' .*row 1 \('gaba\+glu'\)",
        ),
        (
            {"split_skeleton": ["train", "training", None]},
            r"split_skeleton is not one of train, validation, test: row 1",
        ),
    ],
)
def test_bad_rows_are_named(
    tmp_path: pathlib.Path, columns: dict[str, list], message: str
) -> None:
    feather.write_feather(rows(**columns), str(tmp_path / "t.feather"))
    with pytest.raises(UserError, match=message):
        reading.load(tmp_path / "t.feather")


def test_bad_positions_are_kept_when_asked(tmp_path: pathlib.Path) -> None:
    text = "synapse_id,z_nm,y_nm,x_nm\n1,,2,3\n2,1,2,3\n3,nan,inf,3\n"
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match="z_nm is missing or not finite: row 0"):
        reading.load(tmp_path / "t.csv")
    [table] = reading.open(tmp_path / "t.csv").tables()
    positions = synapses.positions_nm_zyx(table)
    assert np.isnan(positions[:, 0]).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("synapse_id,z_nm,y_nm\n1,2,3\n", "no column x_nm"),
        ("synapse_id,z_nm,y_nm,x_nm\n1,2,3,four\n", "row 0: x_nm is 'four'"),
        ("synapse_id,z_nm,y_nm,x_nm\n1.5,2,3,4\n", "invalid value '1.5'"),
        ("synapse_id,z_nm,y_nm,x_nm,x_nm\n1,2,3,4,5\n", "two columns of one name"),
    ],
)
def test_bad_csv(tmp_path: pathlib.Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        reading.load(tmp_path / "t.csv")


def test_empty_tables(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.csv").write_text("synapse_id,z_nm,y_nm,x_nm\n")
    feather.write_feather(rows().slice(0, 0), str(tmp_path / "t.feather"))
    write_export(tmp_path, synapses_v3={})
    for path in (tmp_path / "t.csv", tmp_path / "t.feather", tmp_path):
        table = reading.load(path)
        assert len(table) == 0 and table.schema.names[:9] == synapses.SCHEMA.names


def test_bad_export(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="hemi_lineages_v3.json does not exist"):
        reading.load(tmp_path)
    write_export(tmp_path, skeletons_v3={})
    with pytest.raises(UserError, match="synapse 9: 'skeleton 16' is missing"):
        reading.load(tmp_path)
    write_export(tmp_path, synapses_v3=[1, 2])
    with pytest.raises(UserError, match="objects by id"):
        reading.load(tmp_path)
    neuron = {"hemi_lineage_id": 1, "nt_known": "gaba"}
    write_export(tmp_path, skeletons_v3=dict.fromkeys(["16", "27", "30"], neuron))
    with pytest.raises(UserError, match="synapse 9: .*'gaba' of skeleton 16"):
        reading.load(tmp_path)
    with pytest.raises(UserError, match="cannot tell the format"):
        reading.load(tmp_path / "skeletons_v3.json")
    with pytest.raises(UserError, match="does not exist"):
        reading.load(tmp_path / "nothing.feather")


def test_unknown_split_and_part() -> None:
    table = rows(split_skeleton=["train", None, "test"])
    part = synapses.in_part(table, "skeleton", "test")
    assert part.tolist() == [False, False, True]
    with pytest.raises(UserError, match="no split 'hemilineage'.* has skeleton"):
        synapses.in_part(table, "hemilineage", "test")
    with pytest.raises(UserError, match="no part 'testing'"):
        synapses.in_part(table, "skeleton", "testing")
