# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pyarrow as pa
import pytest

from synister_jax.exchange.agreement import Agreement

CLASSES = ["gaba", "dopamine", "neither"]


def rows(p: np.ndarray, first: int, shift: float = 0) -> pa.Table:
    ids = np.arange(first, first + len(p))
    position = {name: ids + shift for name in ("z_nm", "y_nm", "x_nm")}
    columns = dict(zip(CLASSES, p.astype(np.float32).T, strict=True))
    return pa.table({"id": ids} | position | {"neuron_id": ids // 4} | columns)


def measured(p: np.ndarray, q: np.ndarray, piece: int) -> Agreement:
    found = Agreement(CLASSES, CLASSES, CLASSES, (1, 1, 1), 7)
    for at in range(0, len(p), piece):
        left, right = rows(p[at : at + piece], at), rows(q[at : at + piece], at, 0.5)
        found.add(left, right, left["neuron_id"])
    return found


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_pieces_add_up(piece: int) -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet([0.3, 0.3, 1e3], (2, 80)).astype(np.float32)
    q[:40] = p[:40]
    found = measured(p, q, piece)
    p, q = p.astype(float), q.astype(float)
    for index, name in enumerate(CLASSES):
        numbers = found.numbers()["probabilities"][name]
        expected = np.corrcoef(p[:, index], q[:, index])[0, 1]
        assert numbers["correlation"] == pytest.approx(expected, rel=1e-9)
        expected = np.abs(p - q)[:, index].mean()
        assert numbers["mean_absolute_difference"] == pytest.approx(expected)
    distance = np.abs(p - q).sum(axis=1) / 2
    order = np.argsort(-distance, kind="stable")[:7]
    assert found.largest()["id_a"].to_pylist() == order.tolist()
    np.testing.assert_allclose(found.largest()["total_variation"], distance[order])
    positions = found.numbers()["positions"]
    assert positions == {
        "count": 80,
        "mean_difference_nm_zyx": [0.5, 0.5, 0.5],
        "apart": {
            "count": 0,
            "mean_difference_nm_zyx": [0, 0, 0],
            "mean_distance_nm_zyx": [0, 0, 0],
        },
    }


def placed(p: np.ndarray, z_nm: np.ndarray) -> pa.Table:
    table = rows(p, 0)
    return table.set_column(table.column_names.index("z_nm"), "z_nm", pa.array(z_nm))


@pytest.mark.parametrize("piece", [7, 1000])
def test_distances_do_not_cancel(piece: int) -> None:
    """The distances under `apart` ignore pairs that differ by only half a voxel."""
    p = np.tile([1.0, 0, 0], (100, 1))
    z_nm = np.arange(100.0)
    moved = z_nm + np.where(np.arange(100) % 2, 50, -50)
    moved[:4] = z_nm[:4] + 0.5
    left, right = placed(p, z_nm), placed(p, moved)
    found = Agreement(CLASSES, CLASSES, CLASSES, (1, 1, 1), 7)
    for at in range(0, 100, piece):
        a, b = left.slice(at, piece), right.slice(at, piece)
        found.add(a, b, a["neuron_id"])
    positions = found.numbers()["positions"]
    assert positions["mean_difference_nm_zyx"] == [0.02, 0, 0]
    assert positions["apart"] == {
        "count": 96,
        "mean_difference_nm_zyx": [0, 0, 0],
        "mean_distance_nm_zyx": [50, 0, 0],
    }
    assert found.scattered


def test_one_shift_or_some_rows_elsewhere_are_not_scattered() -> None:
    p = np.tile([1.0, 0, 0], (100, 1))
    z_nm = np.arange(100.0)
    sign = np.where(np.arange(100) % 2, 1, -1)
    few = np.where(np.arange(100) < 90, sign * 50, 0)
    for shift, expected in ((40, False), (few, False), (40 * sign, True)):
        found = Agreement(CLASSES, CLASSES, CLASSES, (1, 1, 1), 7)
        left = placed(p, z_nm)
        found.add(left, placed(p, z_nm + shift), left["neuron_id"])
        assert found.scattered == expected


def test_what_does_not_vary_has_no_correlation() -> None:
    p = np.full((30, 3), 0.1)
    p[:, 1] = np.linspace(0, 0.9, 30)
    numbers = measured(p, p, 4).numbers()
    found = {n: of["correlation"] for n, of in numbers["probabilities"].items()}
    assert found == {"gaba": None, "dopamine": pytest.approx(1), "neither": None}
    assert numbers["synapses"]["agreement"] == 1


def test_equal_distances_keep_the_order_and_equal_rows_are_left_out() -> None:
    p = np.tile([1.0, 0, 0], (20, 1))
    q = p.copy()
    q[3::2] = [0, 1, 0]
    found = measured(p, q, 3)
    assert found.largest()["id_a"].to_pylist() == [3, 5, 7, 9, 11, 13, 15]
    assert len(measured(p, p, 3).largest()) == 0


def test_zeros_and_nan_are_no_prediction() -> None:
    p = np.array([[0, 0, 0], [1, 0, np.nan], [0, 1, 0], [0, 1, 0]])
    q = np.array([[1, 0, 0], [1, 0, 0], [np.nan] * 3, [0, 0, 1]])
    found = measured(p, q, 10)
    assert found.predicted == {"both": 1, "only_a": 1, "only_b": 2}
    assert found.confusion.sum() == found.confusion[1, 2] == 1
