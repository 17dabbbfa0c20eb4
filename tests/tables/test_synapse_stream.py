# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather, parquet

from synister_jax.base.errors import UserError
from synister_jax.tables import file_formats, reading, synapse_stream, synapses
from synister_jax.tables.mongo import address, documents
from synister_jax.tables.synapse_stream import SynapseStream
from tests.helpers.export_v3 import write_export
from tests.helpers.mongo_server import load_table
from tests.helpers.table_formats import WRITERS, contract_table, widened, write

BATCH_ROWS = 64
SUFFIXES = ("feather", "parquet", "csv")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_formats, "BATCH_ROWS", BATCH_ROWS)
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 4096)
    monkeypatch.setattr(documents, "_BATCH_ROWS", BATCH_ROWS)


def all_of(source: SynapseStream) -> pa.Table:
    return pa.concat_tables(source.tables())


def same_rows(found: pa.Table, expected: pa.Table) -> bool:
    """Compares names, types, values and metadata. Columns may differ in nullability."""
    return (
        found.schema.names == expected.schema.names
        and found.schema.types == expected.schema.types
        and found.schema.metadata == expected.schema.metadata
        and all(found[n].equals(expected[n]) for n in found.column_names)
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_files_give_the_rows_of_a_load_in_their_order(
    tmp_path: pathlib.Path, small_batches: None, kind: str
) -> None:
    path = write(kind, tmp_path, widened(contract_table()))
    source = reading.open(path)
    tables = list(source.tables())
    assert len(tables) >= 5
    assert same_rows(pa.concat_tables(tables), reading.load(path))
    assert same_rows(all_of(source), reading.load(path))  # it can be read again
    assert source.name == str(path)


def test_an_export_gives_the_rows_of_a_load_in_their_order(
    tmp_path: pathlib.Path,
) -> None:
    write_export(tmp_path)
    assert same_rows(all_of(reading.open(tmp_path)), reading.load(tmp_path))
    assert len(all_of(reading.open(tmp_path))) == 3


def test_a_database_gives_the_rows_of_a_load_in_their_order(
    mongo_database: str, small_batches: None
) -> None:
    table = contract_table()
    # In a database, a neuron has one neurotransmitter and one hemilineage.
    place = table.column_names.index("neuron_id")
    neurons = pa.array(np.arange(len(table)))
    load_table(mongo_database, table.set_column(place, "neuron_id", neurons))
    source = reading.open(mongo_database)
    assert len(list(source.tables())) >= 5
    expected = reading.load(mongo_database)
    assert expected["synapse_id"].equals(table["synapse_id"])
    assert same_rows(all_of(source), expected)
    assert source.name == address.redact(mongo_database)


def changed(name: str, row: int, value: object, kind: pa.DataType) -> pa.Table:
    """Returns a synapse table with `value` in this row of the column `name`."""
    table = contract_table().replace_schema_metadata(None)
    values = table[name].to_pylist()
    values[row] = value
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, kind))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("synapse_id", None, r"synapse_id is missing: row 150 \(None\)"),
        ("neurotransmitter", "glu", r"neurotransmitter 'glu' .*: row 150 \('glu'\)"),
        ("split_skeleton", "dev", r"split_skeleton is not .*: row 150 \('dev'\)"),
    ],
)
def test_a_row_of_the_third_batch_is_named_by_its_number_in_the_file(
    tmp_path: pathlib.Path,
    small_batches: None,
    kind: str,
    name: str,
    value: object,
    message: str,
) -> None:
    types = {"synapse_id": pa.int64()}
    table = changed(name, 150, value, types.get(name, pa.string()))
    source = reading.open(write(kind, tmp_path, table))
    rows = 0
    with pytest.raises(UserError, match=message):
        for batch in source.tables():
            rows += len(batch)
    assert 80 <= rows <= 150
    of_part = reading.open(source.name, ("skeleton", "test"))
    with pytest.raises(UserError, match=message):
        all_of(of_part)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_coordinate_that_is_no_number_is_named_by_its_row(
    tmp_path: pathlib.Path, small_batches: None, suffix: str
) -> None:
    table = changed("y_nm", 150, 0.0, pa.float64())
    place = table.column_names.index("y_nm")
    texts = table["y_nm"].cast(pa.string()).to_pylist()
    texts[150] = "here"
    table = table.set_column(place, "y_nm", pa.array(texts))
    kinds = {"feather": "feather, many batches, zstd", "parquet": "parquet, row groups"}
    path = write(kinds.get(suffix, "csv"), tmp_path, table)
    with pytest.raises(UserError, match="row 150: y_nm is 'here', not a number"):
        all_of(reading.open(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("column", ["synapse_id", "neuron_id"])
def test_ids_that_are_floats_or_text_are_refused(
    tmp_path: pathlib.Path, suffix: str, column: str
) -> None:
    for values, told in (([5.5, 6.5], "double"), (["5a", "6"], "string")):
        columns: dict[str, list] = {"synapse_id": [5, 6]}
        columns |= dict.fromkeys(synapses.POSITION, [0.0, 1.0]) | {column: values}
        path = tmp_path / f"t.{suffix}"
        writers = {
            "feather": lambda table, path: feather.write_feather(table, str(path)),
            "parquet": parquet.write_table,
            "csv": csv.write_csv,
        }
        writers[suffix](pa.table(columns), path)
        message = f"{path}: column {column} is {told}; ids must be integers"
        if suffix == "csv":  # CSV columns have no type
            message = f"cannot read .*{path}: .*int64: invalid value '5(.5|a)'"
        with pytest.raises(UserError, match=message):
            all_of(reading.open(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_id_beyond_int64_is_refused(tmp_path: pathlib.Path, suffix: str) -> None:
    columns = {"synapse_id": pa.array([5, 2**64 - 1], pa.uint64())}
    columns |= dict.fromkeys(synapses.POSITION, pa.array([0.0, 1.0]))
    path = tmp_path / f"t.{suffix}"
    kinds = {"feather": "feather, one batch, plain", "parquet": "parquet, row groups"}
    WRITERS[kinds.get(suffix, "csv")][1](path, pa.table(columns))
    message = "row 1: synapse_id is 18446744073709551615, not int64"
    if suffix == "csv":
        message = "invalid value '18446744073709551615'"
    with pytest.raises(UserError, match=message):
        all_of(reading.open(path))


def awkward_table() -> pa.Table:
    columns = {"synapse_id": [3, 1, 3, 2, 1, 3]}
    columns["z_nm"] = [None, 1.0, 2.0, 3.0, 4.0, 5.0]
    columns["y_nm"] = [0.0, float("nan"), 2.0, None, 4.0, 5.0]
    columns["x_nm"] = [0.0, 1.0, None, float("nan"), 4.0, 5.0]
    return pa.table(columns)


BAD = [[True, False, False], [False, True, False], [False, False, True]]
BAD += [[False, True, True], [False] * 3, [False] * 3]


@pytest.mark.parametrize("kind", WRITERS)
def test_bad_positions_become_nan_and_ids_may_be_there_twice(
    tmp_path: pathlib.Path, kind: str
) -> None:
    path = write(kind, tmp_path, awkward_table())
    table = all_of(reading.open(path))
    assert table["synapse_id"].to_pylist() == [3, 1, 3, 2, 1, 3]
    assert not any(table[name].null_count for name in synapses.POSITION)
    assert np.isnan(synapses.positions_nm_zyx(table)).tolist() == BAD
    with pytest.raises(UserError, match="duplicate synapse_id: row 2"):
        reading.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_infinite_position_is_bad_too(tmp_path: pathlib.Path, suffix: str) -> None:
    columns: dict[str, list] = {"synapse_id": [1, 2, 3]}
    columns |= dict.fromkeys(synapses.POSITION, [0.0, float("inf"), -float("inf")])
    kinds = {"feather": "feather, one batch, plain", "parquet": "parquet, row groups"}
    path = write(kinds.get(suffix, "csv"), tmp_path, pa.table(columns))
    positions = synapses.positions_nm_zyx(all_of(reading.open(path)))
    assert np.isnan(positions).all(axis=1).tolist() == [False, True, True]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_without_rows_is_one_table_with_all_columns(
    tmp_path: pathlib.Path, kind: str
) -> None:
    path = write(kind, tmp_path, contract_table().slice(0, 0))
    [table] = reading.open(path).tables()
    assert len(table) == 0
    names = [*synapses.SCHEMA.names, "split_skeleton", "split_brain region"]
    assert table.column_names == names
    assert table.schema.types == contract_table().schema.types
    [none] = reading.open(path, ("skeleton", "test")).tables()
    assert len(none) == 0
    with pytest.raises(UserError, match="no split 'hemilineage' here"):
        all_of(reading.open(path, ("hemilineage", "test")))


def test_a_feather_file_of_one_batch_without_rows(tmp_path: pathlib.Path) -> None:
    schema = contract_table().schema
    with pa.ipc.new_file(str(tmp_path / "t.feather"), schema) as sink:
        sink.write_batch(pa.RecordBatch.from_pylist([], schema))
    [table] = reading.open(tmp_path / "t.feather").tables()
    assert len(table) == 0 and table.column_names == schema.names


def test_an_export_or_database_without_rows_is_one_table_with_all_columns(
    tmp_path: pathlib.Path, mongo_database: str
) -> None:
    write_export(tmp_path, synapses_v3={})
    load_table(mongo_database, contract_table().slice(0, 0))
    for uri in (tmp_path, mongo_database):
        [table] = reading.open(uri).tables()
        assert len(table) == 0 and table.column_names[:9] == synapses.SCHEMA.names


@pytest.mark.parametrize("kind", [*WRITERS, "mongo"])
def test_a_part_is_its_rows_in_their_order(
    tmp_path: pathlib.Path,
    small_batches: None,
    request: pytest.FixtureRequest,
    kind: str,
) -> None:
    table = contract_table()
    if kind == "mongo":
        uri = request.getfixturevalue("mongo_database")
        place = table.column_names.index("neuron_id")
        neurons = pa.array(np.arange(len(table)))
        load_table(uri, table.set_column(place, "neuron_id", neurons))
    else:
        uri = write(kind, tmp_path, widened(table))
    together = []
    for part in synapses.PARTS:
        source = reading.open(uri, ("brain region", part))
        found = all_of(source)
        inside = pc.fill_null(pc.equal(table["split_brain region"], part), False)
        assert found["synapse_id"].equals(table.filter(inside)["synapse_id"])
        assert found["y_nm"].equals(table.filter(inside)["y_nm"])
        together += found["synapse_id"].to_pylist()
    assert 150 < len(together) == len(set(together)) < len(table)


def test_an_unknown_split_or_part_is_refused(tmp_path: pathlib.Path) -> None:
    path = write("csv", tmp_path, contract_table())
    with pytest.raises(UserError, match="no part 'testing'; it is one of train, "):
        reading.open(path, ("skeleton", "testing"))
    source = reading.open(path, ("hemilineage", "test"))
    known = "no split 'hemilineage' here; the table has skeleton, brain region"
    with pytest.raises(UserError, match=known):
        all_of(source)


def test_what_cannot_be_read_is_told_when_it_is_opened(tmp_path: pathlib.Path) -> None:
    (tmp_path / "t.csv").write_text("synapse_id,z_nm,y_nm\n1,2,3\n")
    (tmp_path / "two.csv").write_text("synapse_id,z_nm,y_nm,x_nm,x_nm\n1,2,3,4,5\n")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("nothing.csv", "nothing.csv does not exist"),
        ("t.csv", "t.csv has no column x_nm; it has synapse_id, z_nm, y_nm"),
        ("two.csv", "two.csv has two columns of one name"),
        ("folder", "hemi_lineages_v3.json does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            reading.open(tmp_path / name)


def checksum_of(*tables: pa.Table) -> str:
    found = synapse_stream.Checksum()
    for table in tables:
        found.update(table)
    return found.hexdigest()


def source_of(table: pa.Table, rows: int) -> SynapseStream:
    return SynapseStream("table", lambda: iter(table.to_batches(max_chunksize=rows)))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=8))
def test_checksum_does_not_depend_on_batches(cuts: list[int]) -> None:
    table = contract_table()
    edges = [0, *sorted(cuts), len(table)]
    pieces = [table.slice(a, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert checksum_of(*pieces) == checksum_of(table)
    # Nor does the checksum depend on the chunks of a table in memory.
    assert checksum_of(pa.concat_tables(pieces)) == checksum_of(table)


@pytest.mark.parametrize("kind", WRITERS)
def test_checksum_is_that_of_the_rows_whatever_the_file(
    tmp_path: pathlib.Path, small_batches: None, kind: str
) -> None:
    table = contract_table()
    found = synapse_stream.checksum(reading.open(write(kind, tmp_path, widened(table))))
    assert found.rows == len(table)
    assert found.hexdigest() == checksum_of(table)


def test_checksum_tells_order_ids_positions_and_nan_apart() -> None:
    table = contract_table(50)
    seen = {checksum_of(table)}

    def see(other: pa.Table) -> None:
        before = len(seen)
        seen.add(checksum_of(other))
        assert len(seen) == before + 1

    order = np.arange(50)
    order[[3, 4]] = 4, 3
    see(table.take(pa.array(order)))
    see(table.slice(1))
    see(table.slice(0, 49))
    see(table.slice(0, 0))
    see(pa.concat_tables([table, table.slice(49)]))
    for name in synapse_stream.Checksum.NAMES:
        values = table[name].to_numpy().copy()
        place = table.column_names.index(name)
        values[7] = np.nextafter(values[7], 1e9) if name != "synapse_id" else 5
        see(table.set_column(place, name, pa.array(values)))
        if name != "synapse_id":
            values[7] = np.nan
            see(table.set_column(place, name, pa.array(values)))
    # Two whole columns are exchanged.
    z, y = (table.column_names.index(name) for name in ("z_nm", "y_nm"))
    see(table.set_column(z, "z_nm", table["y_nm"]).set_column(y, "y_nm", table["z_nm"]))


def test_checksum_does_not_tell_labels_apart() -> None:
    """Labels do not change the predictions, and may be corrected later."""
    table = contract_table(50)
    place = table.column_names.index("cell_type")
    other = table.set_column(place, "cell_type", pa.nulls(50, pa.string()))
    assert checksum_of(other) == checksum_of(table)


def test_checksum_of_a_part_is_that_of_its_rows() -> None:
    table = contract_table()
    inside = pc.fill_null(pc.equal(table["split_skeleton"], "test"), False)
    source = source_of(table, 41)
    source = SynapseStream("table", source.raw_batches, ("skeleton", "test"))
    found = synapse_stream.checksum(source)
    assert found.rows == pc.sum(inside).as_py() > 0
    assert found.hexdigest() == checksum_of(table.filter(inside))
