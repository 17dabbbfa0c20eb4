# SPDX-License-Identifier: Apache-2.0
import gzip
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet

from synister_jax.base.errors import UserError
from synister_jax.tables import file_formats, reading, synapses
from tests.helpers.table_formats import (
    ROWS,
    WRITERS,
    contract_table,
    widened,
    write,
    write_feather,
)

BATCH_ROWS = 64


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_formats, "BATCH_ROWS", BATCH_ROWS)
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 4096)


def batches_of(path: pathlib.Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    schema, batches = file_formats.open(path, synapses.columns_to_read(str(path)))
    return schema, list(batches)


@pytest.mark.parametrize("kind", WRITERS)
def test_all_rows_in_order_in_small_batches_without_unknown_columns(
    tmp_path: pathlib.Path, small_batches: None, kind: str
) -> None:
    table = contract_table()
    schema, batches = batches_of(write(kind, tmp_path, widened(table)))
    assert schema.names == table.column_names
    assert len(batches) >= 5 and max(map(len, batches)) <= BATCH_ROWS
    found = pa.Table.from_batches(batches, schema)
    # The file reader leaves coordinates in text as text. `conform` converts them.
    found = synapses.conform(found.replace_schema_metadata(None), "made up")
    assert found.equals(table)


# A CSV file cannot hold dictionary-encoded columns.
@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "csv"])
def test_labels_may_be_dictionary_encoded(
    tmp_path: pathlib.Path, small_batches: None, kind: str
) -> None:
    table = contract_table()
    encoded = table.replace_schema_metadata(None)
    for name in ("neurotransmitter", "cell_type", "split_skeleton"):
        place = table.column_names.index(name)
        encoded = encoded.set_column(place, name, table[name].dictionary_encode())
    encoded = encoded.add_column(0, "other", table["hemilineage"].dictionary_encode())
    schema, batches = batches_of(write(kind, tmp_path, encoded))
    found = pa.Table.from_batches(batches, schema)
    assert synapses.conform(found, "made up").equals(table)


def labelled(rows: int, label: Callable[[int], str]) -> pa.Table:
    columns = {
        "synapse_id": np.arange(rows),
        **dict.fromkeys(synapses.POSITION, np.arange(rows) * 1.0),
        "cell_type": [label(i) for i in range(rows)],
    }
    return pa.table(columns)


def test_a_line_break_in_a_csv_label_may_lie_anywhere_in_a_block(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 1024)
    table = labelled(500, lambda i: "line\n" * (i % 90) + f'"{i}",')
    path = tmp_path / "t.csv"
    csv.write_csv(table, path)
    schema, batches = batches_of(path)
    assert len(batches) > 50
    found = pa.Table.from_batches(batches, schema)
    assert found["cell_type"].equals(table["cell_type"])
    assert found["synapse_id"].equals(table["synapse_id"])


def test_a_packed_csv_is_read_as_a_csv(tmp_path: pathlib.Path) -> None:
    table = labelled(500, lambda i: "line\n" * (i % 9) + f'"{i}",')
    csv.write_csv(table, tmp_path / "t.csv")
    packed = gzip.compress((tmp_path / "t.csv").read_bytes())
    (tmp_path / "t.csv.gz").write_bytes(packed)
    expected = reading.load(tmp_path / "t.csv")
    assert reading.load(tmp_path / "t.csv.gz").equals(expected)
    assert len(expected) == 500
    (tmp_path / "t.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cannot read synapse table .*t.csv.gz: "):
        reading.load(tmp_path / "t.csv.gz")
    (tmp_path / "t.gz").write_bytes(packed)
    with pytest.raises(UserError, match="cannot tell the format .*.csv, .csv.gz"):
        file_formats.open(tmp_path / "t.gz", choose_nothing)


def test_a_csv_label_longer_than_a_block_is_read_or_named_as_the_reason(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No real label is as long as a block (8 MiB), but none may be read wrongly."""
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 1024)
    table = labelled(40, lambda i: "line\n" * (900 if i == 20 else 3))
    path = tmp_path / "t.csv"
    csv.write_csv(table, path)
    try:
        schema, batches = batches_of(path)
    except UserError as error:
        assert str(path) in str(error) and "block" in str(error)
    else:
        found = pa.Table.from_batches(batches, schema)
        assert found["cell_type"].equals(table["cell_type"])


def test_null_is_written_in_csv_as_nothing_na_or_null(tmp_path: pathlib.Path) -> None:
    lines = ["synapse_id,z_nm,y_nm,x_nm,neuron_id,cell_type"]
    lines += ["1,0,0,0,,", "2,0,0,0,NA,NA", "3,0,0,0,NULL,NULL", "4,0,0,0,5,None"]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    schema, batches = batches_of(tmp_path / "t.csv")
    table = pa.Table.from_batches(batches, schema)
    assert table["neuron_id"].to_pylist() == [None, None, None, 5]
    assert table["cell_type"].to_pylist() == [None, None, None, "None"]


@pytest.mark.parametrize("kind", ["feather, one batch, lz4", "parquet, one row group"])
def test_what_is_not_needed_is_not_even_decoded(
    tmp_path: pathlib.Path, kind: str
) -> None:
    table = contract_table()
    noise = [np.random.default_rng(i).bytes(4_000) for i in range(ROWS)]
    wide = table.replace_schema_metadata(None).add_column(0, "embedding", [noise])
    path = write(kind, tmp_path, wide)
    content = bytearray(path.read_bytes())
    content[200_000:210_000] = bytes(10_000)  # within the embeddings
    path.write_bytes(content)
    reader = {".feather": feather.read_table, ".parquet": parquet.read_table}
    try:
        whole = reader[path.suffix](path)["embedding"].to_pylist()
    except (OSError, pa.ArrowException):
        whole = None
    assert whole != noise
    schema, batches = batches_of(path)
    found = pa.Table.from_batches(batches, schema)
    assert found.replace_schema_metadata(table.schema.metadata).equals(table)


@pytest.mark.parametrize(
    "kind", ["feather, many batches, zstd", "parquet, row groups", "csv"]
)
def test_a_table_is_read_in_the_memory_of_a_few_batches(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(file_formats, "BATCH_ROWS", 1000)
    # Arrow reads up to 32 blocks ahead of a slow consumer, so the blocks must be small.
    monkeypatch.setattr(file_formats, "_CSV_BLOCK_BYTES", 16_000)
    label = np.random.default_rng(0).bytes(100).hex()
    table = labelled(60_000, lambda i: f"{label}{i}")
    if kind == "csv":
        path = write(kind, tmp_path, table)
    elif kind.startswith("feather"):
        path = tmp_path / "t.feather"
        write_feather(path, table, 1000, "zstd")
    else:
        path = tmp_path / "t.parquet"
        parquet.write_table(table, path, row_group_size=1000, use_dictionary=False)
    whole = table.nbytes
    del table
    before = pa.total_allocated_bytes()
    rows = most = 0
    _, batches = file_formats.open(path, synapses.columns_to_read(str(path)))
    for batch in batches:
        rows += len(batch)
        most = max(most, pa.total_allocated_bytes() - before)
    assert rows == 60_000 and most < whole / 5, (most, whole)


def choose_nothing(names: Sequence[str]) -> dict[str, pa.DataType]:
    raise UserError(f"none of {list(names)}")


@pytest.mark.parametrize("kind", WRITERS)
def test_who_chooses_may_refuse_by_the_names(tmp_path: pathlib.Path, kind: str) -> None:
    path = write(kind, tmp_path, labelled(3, str))
    with pytest.raises(UserError, match=r"none of \['synapse_id', 'z_nm', "):
        file_formats.open(path, choose_nothing)


def test_a_file_that_is_not_there_or_of_no_known_format(tmp_path: pathlib.Path) -> None:
    for name, message in [
        ("nothing.feather", "nothing.feather does not exist"),
        ("t.xlsx", "cannot tell the format of .*t.xlsx; .*.feather, .parquet, .csv"),
        ("t.feather", "cannot read synapse table .*t.feather: "),
        ("t.parquet", "cannot read synapse table .*t.parquet: "),
    ]:
        if not name.startswith("nothing"):
            (tmp_path / name).write_text("synapse_id,z_nm,y_nm,x_nm\n1,2,3,4\n")
        with pytest.raises(UserError, match=message):
            file_formats.open(tmp_path / name, choose_nothing)
    for suffix in ("feather", "parquet", "csv"):
        (tmp_path / f"none.{suffix}").write_bytes(b"")
        with pytest.raises(UserError, match=f"cannot read .*none.{suffix}"):
            file_formats.open(tmp_path / f"none.{suffix}", choose_nothing)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="cannot read .*folder.csv"):
        file_formats.open(tmp_path / "folder.csv", choose_nothing)


def until_error(batches: Iterator[pa.RecordBatch], rows: list[int]) -> None:
    for batch in batches:
        rows.append(len(batch))


@pytest.mark.parametrize(
    "kind", ["feather, many batches, zstd", "parquet, row groups", "csv"]
)
def test_damage_far_inside_is_an_error_of_the_file_while_reading(
    tmp_path: pathlib.Path, small_batches: None, kind: str
) -> None:
    noise = [np.random.default_rng(i).bytes(50).hex() for i in range(ROWS)]
    path = write(kind, tmp_path, labelled(ROWS, noise.__getitem__))
    content = bytearray(path.read_bytes())
    place = len(content) * 2 // 3
    damage = b"\n,,,,,,\n" if kind == "csv" else b"\xff" * 4_000
    content[place : place + len(damage)] = damage
    path.write_bytes(content)
    rows: list[int] = []
    _, batches = file_formats.open(path, synapses.columns_to_read(str(path)))
    with pytest.raises(UserError, match=f"cannot read synapse table {path}: "):
        until_error(batches, rows)
    assert rows  # the rows before the damage are read
