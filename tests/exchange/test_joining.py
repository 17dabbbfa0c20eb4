# SPDX-License-Identifier: Apache-2.0
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.exchange import joining, published
from synister_jax.exchange.joining import Side


def side(folder: pathlib.Path, name: str, ids: Sequence[int | None]) -> Side:
    """Writes a table with positions (id, 2, 3). Its gaba is the row number / 128."""
    count = len(ids)
    at = [np.nan if i is None else float(i) for i in ids]
    columns = {
        "synapse_id": pa.array(ids, pa.int64()),
        "z_nm": at,
        "y_nm": [2.0] * count,
        "x_nm": [3.0] * count,
        "gaba": np.arange(count) / 128,
        "ach": np.zeros(count),
    }
    path = folder / f"{name}.feather"
    feather.write_feather(pa.table(columns), str(path), chunksize=7)
    return Side(published.open(path))


def joined(a: Side, b: Side, by: str, folder: pathlib.Path) -> list[tuple]:
    """Returns (id, row of A, row of B) of all pairs, in the order of the join."""
    rows = []
    for left, right in joining.pairs(a, b, by, (1, 1, 1), ["gaba", "da"], folder):
        assert left["id"].equals(right["id"])
        assert np.isnan(left["da"].to_numpy()).all()  # no table has this class
        numbers = [
            (x["gaba"].to_numpy() * 128).astype(int).tolist() for x in (left, right)
        ]
        rows += zip(left["id"].to_pylist(), *numbers, strict=True)
    return rows


@pytest.mark.parametrize("by", ["id", "position"])
def test_the_first_row_of_a_key_is_joined(tmp_path: pathlib.Path, by: str) -> None:
    a = side(tmp_path, "a", [5, 3, None, 9, 5, 1, 5])
    b = side(tmp_path, "b", [9, 5, 9, 8, 7, 6, 2, None, None, 5])
    assert joined(a, b, by, tmp_path) == [(5, 0, 1), (9, 3, 0)]
    assert (a.rows, a.without_key, a.duplicates, a.alone) == (7, 1, 2, 2)
    assert (b.rows, b.without_key, b.duplicates, b.alone) == (10, 2, 2, 4)
    assert [x["id"] for x in a.duplicate_examples] == [5, 5]
    assert [x["id"] for x in a.alone_examples] == [1, 3]
    assert [x["id"] for x in b.alone_examples] == [2, 6, 7]  # the first three
    assert b.alone_examples[0] == {"id": 2, "z_nm": 2.0, "y_nm": 2.0, "x_nm": 3.0}
    assert a.lowest_nm_zyx.tolist() == [1, 2, 3]
    assert a.highest_nm_zyx.tolist() == [9, 2, 3]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".feather"] == []


@pytest.mark.parametrize("batch", [1, 2, 3, 1000])
def test_keys_go_on_from_batch_to_batch(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """The size of the sorted batches does not change the pairs."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 60, 100).tolist() for _ in range(2)]
    whole = joining.sql.run

    def cut(*arguments):
        table = pa.Table.from_batches(whole(*arguments))
        return iter(table.combine_chunks().to_batches(max_chunksize=batch))

    monkeypatch.setattr(joining.sql, "run", cut)
    a, b = side(tmp_path, "a", ids[0]), side(tmp_path, "b", ids[1])
    common = sorted(set(ids[0]) & set(ids[1]))
    expected = [(i, ids[0].index(i), ids[1].index(i)) for i in common]
    assert joined(a, b, "id", tmp_path) == expected
    for own, found in zip(ids, (a, b), strict=True):
        assert found.duplicates == 100 - len(set(own))
        assert found.alone == len(set(own)) - len(common)


@pytest.mark.parametrize("grid", [1e-300, 2e-17])
def test_a_grid_without_numbers_is_told(tmp_path: pathlib.Path, grid: float) -> None:
    a, b = side(tmp_path, "a", [80, 240]), side(tmp_path, "b", [80])
    message = "a.feather: z of 240 nm is too large for a grid .* larger --tolerance_nm"
    with pytest.raises(UserError, match=message):
        list(joining.pairs(a, b, "position", (grid, 1, 1), ["gaba"], tmp_path))


def test_positions_meet_on_the_grid(tmp_path: pathlib.Path) -> None:
    a, b = side(tmp_path, "a", [80, 160, 240]), side(tmp_path, "b", [83, 150, 241])
    found = joining.pairs(a, b, "position", (8, 8, 8), ["gaba"], tmp_path)
    left, right = map(pa.concat_tables, zip(*found, strict=True))
    assert left["id"].to_pylist() == [80, 240]
    assert right["id"].to_pylist() == [83, 241]
