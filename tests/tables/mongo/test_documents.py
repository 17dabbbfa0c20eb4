# SPDX-License-Identifier: Apache-2.0
"""Converts rows of a synapse table to the original's documents, and back."""

import math

import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.tables import synapses
from synister_jax.tables.mongo import documents


def table(**columns: list) -> pa.Table:
    """Returns a checked table of three synapses of two neurons."""
    known = {"synapse_id": [5, 6, 7], "z_nm": [40.0, 0.5, 80.0]}
    known |= {"y_nm": [1.0, 2.0, 3.0], "x_nm": [4.0, 5.0, 6.0]}
    known |= {"neuron_id": [2**62, 3, 2**62], "hemilineage": ["B", None, "B"]}
    known |= {"neurotransmitter": ["gaba+dopamine", None, "gaba+dopamine"]}
    return synapses.conform(pa.table(known | columns), "here")


def back(written: dict) -> pa.Table:
    by_id = {
        name: {document[documents.ID_FIELDS[name]]: document for document in found}
        for name, found in written.items()
        if name != "synapses"
    }
    schema = pa.schema([field.with_nullable(True) for field in synapses.SCHEMA])
    batches = documents.to_batches(
        written["synapses"], by_id["skeletons"], by_id["hemi_lineages"], schema
    )
    return pa.Table.from_batches(batches, schema)


def test_documents_of_a_table() -> None:
    written = documents.from_table(table(cell_type=["KC", None, "KC"]))
    assert written["hemi_lineages"] == [
        {"hemi_lineage_id": 0, "hemi_lineage_name": "B", "nt_guess": None},
        {"hemi_lineage_id": 1, "hemi_lineage_name": None, "nt_guess": None},
    ]
    assert written["skeletons"] == [
        {
            "skeleton_id": 2**62,
            "hemi_lineage_id": 0,
            "nt_known": ["gaba", "dopamine"],
            "type": "KC",
        },
        {"skeleton_id": 3, "hemi_lineage_id": 1, "nt_known": None},
    ]
    first, second, _ = written["synapses"]
    assert first == {
        "synapse_id": 5,
        "x": 4,
        "y": 1,
        "z": 40,
        "skeleton_id": 2**62,
        "splits": None,
        "prepost": None,
        "meta_id": None,
        "brain_region": None,
    }
    assert {type(first[axis]) for axis in "xyz"} == {int}
    assert second["z"] == 0.5


def test_there_and_back() -> None:
    given = table(brain_region=["AL", None, "MB"], cell_type=["KC", None, "KC"])
    found = back(documents.from_table(given))
    for name in found.column_names:
        assert found[name].to_pylist() == given[name].to_pylist(), name


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"neurotransmitter": ["gaba", None, "dopamine"]},
            rf"neuron {2**62} has two values of neurotransmitter: 'gaba' and",
        ),
        ({"hemilineage": ["B", None, None]}, "two values of hemilineage: 'B' and None"),
        ({"cell_type": ["a", None, "b"]}, "two values of cell_type"),
        (
            {"neuron_id": [2**62, 3, None]},
            r"1 rows have no neuron_id, .*nsmitter.*\(the first is synapse 7\)",
        ),
    ],
)
def test_what_the_layout_cannot_hold(columns: dict[str, list], message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents.from_table(table(**columns))


@pytest.mark.parametrize(
    ("value", "stored"),
    [(40.0, 40), (-3.0, -3), (0.5, 0.5), (2.0**53, 2.0**53), (None, None)]
    + [(math.nan, None), (math.inf, None), (-math.inf, None)],
)
def test_whole_nanometres_are_integers(
    value: float | None, stored: int | float | None
) -> None:
    found = documents.whole_if_whole(value)
    assert found == stored and type(found) is type(stored)


SYNAPSE = {"synapse_id": 9, "skeleton_id": 1, "x": 1, "y": 2.5, "z": 3}
SKELETON = {"skeleton_id": 1, "hemi_lineage_id": 2, "nt_known": ["gaba"]}
HEMI_LINEAGE = {"hemi_lineage_id": 2, "hemi_lineage_name": "A"}


def test_fields_that_old_databases_lack() -> None:
    row = documents.row(SYNAPSE, {1: SKELETON}, {2: HEMI_LINEAGE})
    assert row["neurotransmitter"] == "gaba" and row["hemilineage"] == "A"
    assert row["brain_region"] is None and row["cell_type"] is None
    assert row["y_nm"] == 2.5 and isinstance(row["z_nm"], float)
    alone = documents.row(SYNAPSE | {"skeleton_id": None}, {}, {})
    assert alone["neuron_id"] is None and alone["hemilineage"] is None


@pytest.mark.parametrize("name", ["NONE", "na", "New", "UNKNOWN", "unknown3", "", None])
def test_names_of_no_hemilineage(name: str | None) -> None:
    named = HEMI_LINEAGE | {"hemi_lineage_name": name}
    assert documents.row(SYNAPSE, {1: SKELETON}, {2: named})["hemilineage"] is None


@pytest.mark.parametrize(
    ("synapse", "skeleton", "message"),
    [
        ({"synapse_id": 9.0}, {}, r"synapse 9\.0: id 9\.0, not an integer"),
        ({"skeleton_id": 1.0}, {}, r"synapse 9: id 1\.0, not an integer"),
        ({"skeleton_id": 4}, {}, "synapse 9: 'skeleton 4' is missing"),
        ({"z": "3"}, {}, "synapse 9: coordinate '3', not a number"),
        ({"splits": ["train"]}, {}, "synapse 9: "),
        ({}, {"nt_known": "gaba"}, "nt_known 'gaba' of skeleton 1, not a list"),
        ({}, {"hemi_lineage_id": 3}, "'hemi_lineage 3' is missing"),
    ],
)
def test_unusable_documents(synapse: dict, skeleton: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents.row(SYNAPSE | synapse, {1: SKELETON | skeleton}, {2: HEMI_LINEAGE})


@pytest.mark.parametrize("field", ["synapse_id", "skeleton_id", "x", "y", "z"])
def test_missing_fields(field: str) -> None:
    synapse = {name: value for name, value in SYNAPSE.items() if name != field}
    with pytest.raises(UserError, match=f"'{field}' is missing"):
        documents.row(synapse, {1: SKELETON}, {2: HEMI_LINEAGE})


def test_a_value_that_does_not_fit_its_column() -> None:
    schema = pa.schema([("synapse_id", pa.int64()), ("split_s", pa.string())])
    rows = [{"synapse_id": 1}, {"synapse_id": 2, "split_s": 3}]
    with pytest.raises(UserError, match="synapse 2: split_s: "):
        list(documents.in_batches(rows, schema))
    with pytest.raises(UserError, match="synapse 1 has split_t, which no synapse had"):
        list(documents.in_batches([{"synapse_id": 1, "split_t": "test"}], schema))
