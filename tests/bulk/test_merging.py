# SPDX-License-Identifier: Apache-2.0
import gc
import pathlib
from collections.abc import Callable
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from synister_jax.base import sql
from synister_jax.base.errors import UserError
from synister_jax.bulk import merging, options, planning, unit_results
from synister_jax.bulk.planning import Plan
from synister_jax.bulk.unit_results import UnitResult
from synister_jax.em.volumes import Volume
from synister_jax.tables import predictions, reading, synapses
from synister_jax.tables.synapse_stream import SynapseStream
from tests.helpers.plans import (
    expected_rows,
    make_plan,
    make_volume,
    names_in,
    positions_in_and_out,
    source_of,
    table_of,
)

CLASSES = ("gaba", "acetylcholine", "dopamine")
ABOUT = {"members": [{"workdir": "run", "step": 7}], "views": 1}
ROWS = 1000
FORMATS = sorted(merging.WRITERS)


def probabilities_of(rows: np.ndarray) -> np.ndarray:
    """Returns probabilities that depend only on the row, and differ for all rows."""
    first = (np.asarray(rows) + 1) / np.float32(1 << 20)
    return np.stack([first, 1 - first, first / 3], axis=1).astype(np.float32)


def is_whole(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows) % 11 != 4


def write_parts(plan: Plan) -> None:
    for unit in reversed(range(len(plan))):
        rows, _ = plan.unit(unit)
        whole = is_whole(rows)
        values = np.where(whole[:, None], probabilities_of(rows), 0).astype(np.float32)
        corners = frozenset({(8, 0, 32 * unit), (0, 0, 0)})
        unit_results.write(plan, unit, UnitResult(rows, whole, values, corners))


def labelled(positions: np.ndarray, seed: int = 0) -> pa.Table:
    """Returns rows in random order, with neuron ids and a split."""
    rng = np.random.default_rng(seed)
    count = len(positions)
    table = table_of(positions[rng.permutation(count)])
    parts_of_split = [None, *synapses.PARTS]
    split = [parts_of_split[i] for i in rng.integers(0, 4, count)]
    table = table.append_column("neuron_id", pa.array(rng.integers(0, 2**62, count)))
    return table.append_column("split_skeleton", pa.array(split, pa.string()))


@pytest.fixture
def volume(tmp_path: pathlib.Path) -> Volume:
    return make_volume(tmp_path / "volume")


@pytest.fixture
def table() -> pa.Table:
    return labelled(positions_in_and_out(ROWS))


@pytest.fixture
def plan(tmp_path: pathlib.Path, volume: Volume, table: pa.Table) -> Plan:
    plan = make_plan(source_of(table, 130), volume, tmp_path / "out", 70)
    write_parts(plan)
    return plan


def merge(
    plan: Plan, source: SynapseStream, volume: Volume, file_format: str = "feather"
) -> tuple[merging.Merged, pathlib.Path]:
    merged = merging.Merged()
    name, write = options.FORMATS[file_format], merging.WRITERS[file_format]
    write(plan.folder / name, merging.tables(plan, source, volume, ABOUT, merged))
    return merged, plan.folder / name


def read(path: pathlib.Path) -> pa.Table:
    if path.is_dir():
        pieces = [parquet.read_table(file) for file in sorted(path.iterdir())]
        return pa.concat_tables(pieces)
    return predictions.load(path)


def same(a: pa.Table, b: pa.Table) -> bool:
    """Returns whether two tables are equal. NaN counts as equal to NaN."""
    wanted = [n for n in a.column_names if not n.startswith(("nt_", "z_", "y_", "x_"))]
    return (
        a.schema.equals(b.schema, check_metadata=True)
        and a.select(wanted).equals(b.select(wanted))
        and np.array_equal(
            predictions.probabilities(a), predictions.probabilities(b), equal_nan=True
        )
        and np.array_equal(
            synapses.positions_nm_zyx(a), synapses.positions_nm_zyx(b), equal_nan=True
        )
    )


def expected_answer(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Returns (statuses, probabilities [n, 3]), computed row by row."""
    conformed = pa.concat_tables(source_of(table).tables())
    positions = synapses.positions_nm_zyx(conformed)
    starts = expected_rows(positions)
    statuses, probabilities = [], np.full((len(table), 3), np.nan, np.float32)
    for row, position in enumerate(positions):
        if not (np.abs(position) < 1e9).all():
            statuses.append("bad_position")
        elif row not in starts:
            statuses.append("outside")
        elif not is_whole(np.array([row]))[0]:
            statuses.append("missing_data")
        else:
            start, shape = np.array(starts[row]), np.array((4, 16, 18))
            inside = (start >= 0).all() and (start + shape <= (60, 500, 700)).all()
            statuses.append("ok" if inside else "partly_outside")
            probabilities[row] = probabilities_of(np.array([row]))[0]
    return statuses, probabilities


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("batch_rows", [1, 64, ROWS])
def test_every_row_is_answered_in_the_order_of_the_table(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str, batch_rows: int
) -> None:
    if batch_rows == 1:
        table = table.slice(0, 150)
        plan = make_plan(table, volume, plan.folder.with_name("short"), 70)
        write_parts(plan)
    merged, path = merge(plan, source_of(table, batch_rows), volume, file_format)
    answer = read(path)
    statuses, probabilities = expected_answer(table)
    assert answer["status"].to_pylist() == statuses
    np.testing.assert_array_equal(predictions.probabilities(answer), probabilities)
    assert answer["synapse_id"].equals(table["synapse_id"])
    assert answer["neuron_id"].equals(table["neuron_id"])
    assert answer["split_skeleton"].equals(table["split_skeleton"])
    counts = {name: statuses.count(name) for name in set(statuses)}
    assert merged.status == counts and len(counts) == 5
    corners = {(8, 0, 32 * unit) for unit in range(len(plan))} | {(0, 0, 0)}
    assert merged.unreadable == corners


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_answer_tells_its_classes_and_what_made_it(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str
) -> None:
    _, path = merge(plan, source_of(table, 100), volume, file_format)
    answer = read(path)
    predictions.check(answer.schema, path)
    assert predictions.classes(answer) == CLASSES
    assert predictions.about(answer) == {"classes": list(CLASSES), **ABOUT}
    columns = [predictions.probability_column(name) for name in CLASSES]
    assert [n for n in answer.column_names if n.startswith("nt")] == columns
    assert {answer.schema.field(n).type for n in columns} == {pa.float32()}


def test_parquet_is_several_files_in_order_and_the_same_rows(
    plan: Plan, volume: Volume, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_FILE_ROWS", 200)
    _, path = merge(plan, source_of(table, 64), volume, "parquet")
    names = sorted(file.name for file in path.iterdir())
    assert names == [f"part-{i:05d}.parquet" for i in range(len(names))]
    sizes = [parquet.read_metadata(path / name).num_rows for name in names]
    assert sizes == [256, 256, 256, 232]
    _, one = merge(plan, source_of(table, 64), volume, "feather")
    assert same(read(path), read(one))
    assert same(parquet.read_table(path), read(one))  # as one data set
    for name in names:
        predictions.check(parquet.read_schema(path / name), name)


@pytest.mark.parametrize("file_format", FORMATS)
def test_merging_again_gives_the_same_bytes(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str
) -> None:
    def content(path: pathlib.Path) -> list[tuple[str, bytes]]:
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(file.name, file.read_bytes()) for file in found]

    _, path = merge(plan, source_of(table, 100), volume, file_format)
    first = content(path)
    merge(plan, source_of(table, 100), volume, file_format)
    assert content(path) == first
    # The files that a killed command left do not disturb.
    if file_format == "parquet":
        left = path.with_name("predictions.parquet.partial")
        left.mkdir()
        (left / "part-00007.parquet").write_bytes(b"PAR1")
    else:
        path.with_name("predictions.feather.partial").write_bytes(b"ARROW1")
    (plan.folder / "query.tmp").mkdir()
    (plan.folder / "query.tmp" / "old").write_bytes(b"x")
    merge(plan, source_of(table, 100), volume, file_format)
    assert content(path) == first
    assert not any("partial" in n or "query.tmp" in n for n in names_in(plan.folder))


def test_a_shorter_answer_leaves_no_file_of_a_longer_one(
    plan: Plan, volume: Volume, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_FILE_ROWS", 200)
    _, path = merge(plan, source_of(table, 64), volume, "parquet")
    monkeypatch.setattr(merging, "_FILE_ROWS", 500)
    merge(plan, source_of(table, 64), volume, "parquet")
    assert len(list(path.iterdir())) == 2 and len(read(path)) == ROWS


def refused(
    plan: Plan, table: pa.Table, volume: Volume, file_format: str, message: str
) -> None:
    """Merges, and checks that this raises a UserError and writes no answer."""
    before = names_in(plan.folder)
    with pytest.raises(UserError, match=message):
        merge(plan, source_of(table, 130), volume, file_format)
    gc.collect()
    left = names_in(plan.folder) - before
    assert not [name for name in left if "parquet.partial" not in name]


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_refused_answer_leaves_nothing(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str
) -> None:
    """The partial answer is deleted: for a whole brain it takes many gigabytes."""
    before = names_in(plan.folder)
    with pytest.raises(UserError, match="changed during the prediction"):
        merge(plan, source_of(table.slice(0, 990), 130), volume, file_format)
    gc.collect()
    assert names_in(plan.folder) == before


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("damage", ["missing", "damaged", "of another unit"])
def test_without_one_part_there_is_no_answer(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str, damage: str
) -> None:
    path = unit_results.path_of(plan, 5)
    if damage == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0xFF
        other = unit_results.path_of(plan, 4).read_bytes()
        path.write_bytes(content if damage == "damaged" else other)
    message = f"^{path}: the file is missing or damaged; run the command again"
    refused(plan, table, volume, file_format, message)


Change = Callable[[pa.Table], pa.Table]


def with_value(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, table[name].type))


def swapped(table: pa.Table, a: int, b: int) -> pa.Table:
    order = np.arange(len(table))
    order[[a, b]] = order[[b, a]]
    return table.take(pa.array(order))


CHANGES: dict[str, Change] = {
    "rows swapped": lambda t: swapped(t, 500, 501),
    "rows far apart swapped": lambda t: swapped(t, 3, 997),
    "another id": lambda t: with_value(t, "synapse_id", 999, 10**9),
    "a position moved a little": lambda t: with_value(
        t, "x_nm", 640, (t["x_nm"][640].as_py() or 0.0) + 1e-6
    ),
    "a position moved out": lambda t: with_value(t, "z_nm", 640, 1e8),
    "a position lost": lambda t: with_value(t, "y_nm", 640, None),
    "a row inside added": lambda t: pa.concat_tables([t, t.slice(600, 1)]),
    "a row outside added": lambda t: pa.concat_tables(
        [t, with_value(t, "z_nm", 0, 1e8).slice(0, 1)]
    ),
    "the last rows lost": lambda t: t.slice(0, len(t) - 20),
    "the first row lost": lambda t: t.slice(1),
    "no rows": lambda t: t.slice(0, 0),
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_changed_since_is_refused(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str, change: str
) -> None:
    changed = CHANGES[change](table)
    assert not changed.equals(table)
    message = r"table .*changed during the prediction; choose another --output"
    refused(plan, changed, volume, file_format, message)
    # The unchanged table can still be merged.
    merge(plan, source_of(table), volume, file_format)


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_error_in_the_table_is_that_error(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str
) -> None:
    split = "split_skeleton"
    bad = with_value(table, split, 998, "nonsense")
    refused(plan, bad, volume, file_format, r"split_skeleton is not .*: row 998")


def test_labels_that_changed_since_are_in_the_answer(
    plan: Plan, volume: Volume, table: pa.Table
) -> None:
    renamed = with_value(table, "neuron_id", 17, 42)
    _, path = merge(plan, source_of(renamed), volume)
    assert read(path)["neuron_id"][17].as_py() == 42


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_refused_answer_leaves_the_one_before(
    plan: Plan, volume: Volume, table: pa.Table, file_format: str
) -> None:
    _, path = merge(plan, source_of(table, 100), volume, file_format)
    before = read(path)
    with pytest.raises(UserError, match="changed during the prediction"):
        merge(plan, source_of(table.slice(1)), volume, file_format)
    assert same(read(path), before)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_table_without_rows_or_without_crops_is_answered(
    tmp_path: pathlib.Path, volume: Volume, table: pa.Table, file_format: str
) -> None:
    far = labelled(np.full((30, 3), 1e8))
    for name, given in (("none", table.slice(0, 0)), ("far", far)):
        plan = make_plan(given, volume, tmp_path / name)
        assert len(plan) == 0
        merged, path = merge(plan, source_of(given, 7), volume, file_format)
        answer = read(path)
        assert answer["status"].to_pylist() == ["outside"] * len(given)
        assert predictions.classes(answer) == CLASSES
        assert np.isnan(predictions.probabilities(answer)).all()
        assert merged.status == ({"outside": 30} if len(given) else {})


def test_a_part_of_the_table_is_answered_alone(
    tmp_path: pathlib.Path, volume: Volume, table: pa.Table
) -> None:
    feather.write_feather(table, str(tmp_path / "t.feather"), chunksize=50)
    # Some batches have no row of the test part.
    order = np.argsort([p != "test" for p in table["split_skeleton"].to_pylist()])
    feather.write_feather(table.take(order), str(tmp_path / "t.feather"), chunksize=50)
    source = reading.open(tmp_path / "t.feather", ("skeleton", "test"))
    given = pa.concat_tables(source.tables())
    assert 100 < len(given) < 500 and 0 in [len(t) for t in source.tables()]
    plan = make_plan(source, volume, tmp_path / "part", 30)
    write_parts(plan)
    _, path = merge(plan, source, volume)
    answer = read(path)
    statuses, probabilities = expected_answer(given)
    assert answer["synapse_id"].equals(given["synapse_id"])
    assert answer["status"].to_pylist() == statuses
    np.testing.assert_array_equal(predictions.probabilities(answer), probabilities)


@pytest.mark.long
def test_parts_larger_than_the_memory_are_merged_on_the_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DuckDB needs memory for every thread, so the test uses one on every machine.
    connect = duckdb.connect
    monkeypatch.setattr(
        duckdb, "connect", lambda config: connect(config=config | {"threads": 1})
    )
    monkeypatch.setattr(sql, "MEMORY", "40MB")
    rows, shape = 600_000, (4000, 4000, 4000)
    volume = make_volume(tmp_path / "v", shape, (64, 64, 64), (1, 1, 1), (0, 0, 0))
    positions = np.random.default_rng(0).random((rows, 3)) * 3900 + 50
    source = source_of(table_of(positions), 50_000)
    classes = [f"class {i}" for i in range(9)]
    made_from = {"classes": classes}
    out = tmp_path / "out"
    plan = planning.make(source, volume, (4, 4, 4), out, 50_000, made_from)
    for unit in range(len(plan)):
        numbers, _ = plan.unit(unit)
        values = np.repeat(probabilities_of(numbers)[:, :1], 9, axis=1)
        whole = np.ones(len(numbers), bool)
        unit_results.write(plan, unit, UnitResult(numbers, whole, values, frozenset()))
    merged, spilled, first = merging.Merged(), 0, 0
    for answer in merging.tables(plan, source, volume, ABOUT, merged):
        found = (out / "query.tmp").glob("*")
        spilled = max(spilled, sum(path.stat().st_size for path in found))
        numbers = np.arange(first, first + len(answer))
        np.testing.assert_array_equal(
            predictions.probabilities(answer)[:, 8], probabilities_of(numbers)[:, 0]
        )
        first += len(answer)
    assert first == rows and merged.status == {"ok": rows}
    assert spilled > 1 << 20
    assert not (out / "query.tmp").exists()
