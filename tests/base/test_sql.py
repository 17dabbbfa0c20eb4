# SPDX-License-Identifier: Apache-2.0
import gc
import os
import pathlib
import resource
from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import sql
from synister_jax.base.errors import UserError

SCHEMA = pa.schema([("key", pa.int64()), ("row", pa.int64()), ("value", pa.float32())])
QUERY = 'SELECT "row", value FROM rows ORDER BY key, "row"'
BATCH = 100_000


def batches(count: int, batch: int = BATCH) -> Iterator[pa.RecordBatch]:
    for number in range(count):
        rng = np.random.default_rng(number)
        rows = np.arange(number * batch, (number + 1) * batch)
        columns = [rng.integers(-50, 2**40, batch), rows, rows.astype(np.float32)]
        yield pa.record_batch(list(map(pa.array, columns)), SCHEMA)


def expected_rows(count: int, batch: int = BATCH) -> np.ndarray:
    keys = np.concatenate([b["key"].to_numpy() for b in batches(count, batch)])
    return np.argsort(keys, kind="stable")


def rows_of(found: Iterator[pa.RecordBatch]) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0, np.int64), *(b["row"].to_numpy() for b in found)]
    )


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB with one thread.

    Each thread needs some memory. Without this limit, the memory that DuckDB needs
    would depend on the machine.
    """
    connect = duckdb.connect
    monkeypatch.setattr(
        duckdb, "connect", lambda config: connect(config=config | {"threads": 1})
    )


def spilled_bytes(folder: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in (folder / "query.tmp").glob("*"))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_rows_come_in_order(tmp_path: pathlib.Path, count: int) -> None:
    found = rows_of(sql.run(QUERY, SCHEMA, batches(count, 1000), tmp_path))
    assert count == 0 or (found == expected_rows(count, 1000)).all()
    assert len(found) == count * 1000 and not list(tmp_path.iterdir())


@pytest.mark.long
def test_what_does_not_fit_in_memory_goes_to_the_folder_and_is_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(sql, "MEMORY", "40MB")
    found, most = [], 0
    for batch in sql.run(QUERY, SCHEMA, batches(12), tmp_path):
        most = max(most, spilled_bytes(tmp_path))
        np.testing.assert_array_equal(batch["value"], batch["row"].cast(pa.float32()))
        found.append(batch["row"].to_numpy())
    assert most > 1 << 20
    np.testing.assert_array_equal(np.concatenate(found), expected_rows(12))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", ["3MB", "12MB", "20MB", "24MB", "30MB"])
def test_too_little_memory_is_told_in_one_way(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
    memory: str,
) -> None:
    """The message is the same while rows go in and while rows come out."""
    monkeypatch.setattr(sql, "MEMORY", memory)
    try:
        found = rows_of(sql.run(QUERY, SCHEMA, batches(10), tmp_path))
    except UserError as error:
        assert f"temporary files in {tmp_path}: Out of Memory" in str(error)
    else:
        np.testing.assert_array_equal(found, expected_rows(10))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(sql, "MEMORY", "40MB")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match=f"temporary files in {tmp_path}: IO Error"):
            rows_of(sql.run(QUERY, SCHEMA, batches(12), tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_error_while_rows_come_out_is_told_the_same_way(
    tmp_path: pathlib.Path,
) -> None:
    query = f"""SELECT CASE WHEN "row" = 150_000 THEN error('the disk is full')
        ELSE "row" END AS "row" FROM ({QUERY})"""
    with pytest.raises(UserError, match=f"files in {tmp_path}: .*disk is full"):
        rows_of(sql.run(query, SCHEMA, batches(10), tmp_path))
    assert not list(tmp_path.iterdir())


class Odd(Exception):
    pass


@pytest.mark.parametrize("at", [0, 5, 11])
@pytest.mark.parametrize("error", [UserError("row 3"), Odd("odd"), KeyboardInterrupt()])
def test_what_the_rows_raise_is_raised(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
    at: int,
    error: BaseException,
) -> None:
    # With this limit, rows are on the disk when the last batch comes.
    monkeypatch.setattr(sql, "MEMORY", "40MB")

    def broken() -> Iterator[pa.RecordBatch]:
        yield from batches(at)
        raise error

    with pytest.raises(type(error)) as caught:
        rows_of(sql.run(QUERY, SCHEMA, broken(), tmp_path))
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_who_stops_early_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(sql, "MEMORY", "40MB")
    sorted_rows = sql.run(QUERY, SCHEMA, batches(12), tmp_path)
    next(sorted_rows)
    assert spilled_bytes(tmp_path)
    del sorted_rows
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_and_other_files_stay(tmp_path: pathlib.Path) -> None:
    stale = tmp_path / "query.tmp" / "deep"
    stale.mkdir(parents=True)
    (stale / "duckdb_temp_storage_DEFAULT-0.tmp").write_bytes(os.urandom(1000))
    (tmp_path / "mine").write_text("kept")
    found = rows_of(sql.run(QUERY, SCHEMA, batches(2), tmp_path))
    np.testing.assert_array_equal(found, expected_rows(2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_may_have_any_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(sql, "MEMORY", "40MB")
    folder = tmp_path / 'it\'s "a" {folder}; ünd'
    folder.mkdir()
    most = 0
    for _ in sql.run(QUERY, SCHEMA, batches(12), folder):
        most = max(most, spilled_bytes(folder))
    assert most and not list(folder.iterdir())


def test_two_sort_at_once(tmp_path: pathlib.Path) -> None:
    runs = []
    for name, count in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        runs.append(sql.run(QUERY, SCHEMA, batches(count, 50_000), tmp_path / name))
    firsts = [next(run) for run in runs]
    for first, run, count in zip(firsts, runs, (3, 5), strict=True):
        rows = np.concatenate([first["row"].to_numpy(), rows_of(run)])
        np.testing.assert_array_equal(rows, expected_rows(count, 50_000))
