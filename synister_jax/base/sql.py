# SPDX-License-Identifier: Apache-2.0
"""SQL over more rows than fit in memory: DuckDB does it, on disk where it must."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Generator, Iterator

import duckdb
import pyarrow as pa

from synister_jax.base.errors import UserError

# What DuckDB holds before it goes to disk; more is hardly faster (100 million rows of
# 28 bytes sorted in 26 s with this, in 24 s with twice as much, on two cores).
MEMORY = "1GB"


def run(
    query: str,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    folder: pathlib.Path | None,
    threads: int | None = None,
) -> Generator[pa.RecordBatch, None, None]:
    """The rows of `query`, an SQL statement over `batches`, which it calls `rows`.

    One batch at least, though it may be empty.

    Args:
      folder: where the disk has room for all of them once more; nothing stays there.
        None: all that the query holds must fit in memory.
      threads: with 1, floats are added in the order of the rows, and sums are the same
        bit for bit each time; by default one for each core.

    Raises:
      UserError: the disk is full, or without a folder the memory; and whatever
        `batches` raises.
    """
    raised: list[BaseException] = []

    def watched() -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except BaseException as error:  # DuckDB would make its own of it
            raised.append(error)
            raise

    # Each thread needs memory of its own: 128 of them run out of this.
    threads = threads or min(8, os.cpu_count() or 1)
    config: dict[str, str | bool | int | float | list[str]] = {}
    config |= {"memory_limit": MEMORY, "threads": str(threads)}
    config["preserve_insertion_order"] = "false"  # only ORDER BY says what comes first
    with _spill(folder) as spill:
        config["temp_directory"] = "" if spill is None else str(spill)
        try:
            with duckdb.connect(config=config) as database:
                database.execute("SET enable_progress_bar = false")
                reader = pa.RecordBatchReader.from_batches(schema, watched())
                database.register("rows", reader)
                answer = database.sql(query).to_arrow_reader(1 << 16)
                first = next(answer, None)
                if first is None:
                    first = pa.RecordBatch.from_pylist([], answer.schema)
                yield first
                yield from answer
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if raised:
                raise raised[0] from None
            raise UserError(
                f"cannot query in {folder or 'memory'}: {error}; mend that, rerun"
            ) from None


@contextlib.contextmanager
def _spill(folder: pathlib.Path | None) -> Iterator[pathlib.Path | None]:
    """The folder for what does not fit in memory; it is gone before and after."""
    if folder is None:
        yield None
        return
    spill = folder / "query.tmp"
    shutil.rmtree(spill, ignore_errors=True)  # of a run that was killed
    try:
        yield spill
    finally:
        shutil.rmtree(spill, ignore_errors=True)
