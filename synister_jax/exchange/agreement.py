# SPDX-License-Identifier: Apache-2.0
"""Measures how far two tables of predictions agree on the same synapses.

Table A and table B are joined by synapse. The joined rows are counted batch by batch,
so that the tables do not have to fit into memory.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.evaluation import accuracy
from synister_jax.exchange.joining import Side
from synister_jax.tables import synapses

# If more than this share of the joined rows has another position in B, and the shifts
# have no common direction, then the same id means different synapses in A and in B.
# Shifts have a common direction if their sum is at least this share of the distance.
_NEARLY_ALL, _ONE_DIRECTION = 0.95, 0.5
# One row for each synapse that both tables predict: its neuron, and the indices of the
# classes that A and B call.
CALLED = pa.schema([("neuron", pa.int64()), ("a", pa.int32()), ("b", pa.int32())])


class Agreement:
    """The counts over joined synapses, from which the measures of agreement follow.

    All measures use only the synapses that both tables predict.
    """

    def __init__(
        self,
        classes: Sequence[str],
        of_a: Sequence[str],
        of_b: Sequence[str],
        grid_nm_zyx: Sequence[float],
        largest: int,
    ) -> None:
        """Starts with empty counts.

        Args:
          classes: the classes of A and of B together. If two classes have the same
            probability, the first of them in this order is called.
          of_a: the classes of A.
          of_b: the classes of B.
          grid_nm_zyx: [3] nm. Two positions are counted as apart if they differ by
            more than this on any axis.
          largest: how many of the rows that differ most are kept.
        """
        self.classes = list(classes)
        self._own = [np.isin(classes, own) for own in (of_a, of_b)]
        common = self._own[0] & self._own[1]
        self.common = [n for n, both in zip(classes, common, strict=True) if both]
        self._grid, self._most = np.asarray(grid_nm_zyx), largest
        self.joined = 0
        self.predicted = collections.Counter(both=0, only_a=0, only_b=0)
        self.confusion = np.zeros((len(classes),) * 2, np.int64)
        self.neuron_ids_differ = 0
        self._moments = _Moments(len(classes))
        self._difference = np.zeros(len(classes))  # sum of |p − q|
        self._positions = 0
        self._apart = 0
        self._shift = np.zeros(3)  # sum of B − A
        self._apart_shift = np.zeros(3)
        self._apart_distance = np.zeros(3)  # sum of |B − A|
        self._kept: pa.Table | None = None

    def add(
        self, left: pa.Table, right: pa.Table, neuron: pa.ChunkedArray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts one batch of joined rows.

        Args:
          left: the n rows of A, as `joining.pairs` yields them.
          right: the n rows of B, in the same order.
          neuron: int64 [n], the neuron of each row.

        Returns:
          A bool array [n] that says which rows both tables predict; and for these rows
          the indices of the classes that A calls and that B calls.
        """
        self.joined += len(left)
        self._compare_positions(left, right)
        ids = [side["neuron_id"] for side in (left, right)]
        self.neuron_ids_differ += pc.sum(pc.not_equal(*ids)).as_py() or 0
        values = [
            np.stack([side[name].to_numpy() for name in self.classes], axis=1)
            for side in (left, right)
        ]
        known = [
            _predicted(value[:, own])
            for value, own in zip(values, self._own, strict=True)
        ]
        both = known[0] & known[1]
        self.predicted["both"] += int(both.sum())
        self.predicted["only_a"] += int((known[0] & ~both).sum())
        self.predicted["only_b"] += int((known[1] & ~both).sum())
        p, q = (
            np.where(own, value[both], 0).astype(np.float64)
            for value, own in zip(values, self._own, strict=True)
        )
        called = [
            np.where(own, x, -1).argmax(axis=1)  # ties: the first class
            for x, own in zip((p, q), self._own, strict=True)
        ]
        self.confusion += accuracy.confusion(called[0], called[1], len(self.classes))
        self._difference += np.abs(p - q).sum(axis=0)
        self._moments.add(p, q)
        mask = pa.array(both)
        self._keep(left.filter(mask), right.filter(mask), neuron.filter(mask), p, q)
        return both, *called

    def _compare_positions(self, left: pa.Table, right: pa.Table) -> None:
        shift = np.stack(
            [right[n].to_numpy() - left[n].to_numpy() for n in synapses.POSITION], 1
        )
        shift = shift[~np.isnan(shift).any(axis=1)]
        self._positions += len(shift)
        self._shift += shift.sum(axis=0)
        apart = shift[(np.abs(shift) > self._grid).any(axis=1)]
        self._apart += len(apart)
        self._apart_shift += apart.sum(axis=0)
        self._apart_distance += np.abs(apart).sum(axis=0)

    @property
    def scattered(self) -> bool:
        """Whether nearly all rows are shifted in B, without a common direction."""
        apart = self._apart > _NEARLY_ALL * self._positions
        return apart and not in_one_direction(self._apart_shift, self._apart_distance)

    def _keep(
        self,
        left: pa.Table,
        right: pa.Table,
        neuron: pa.ChunkedArray,
        p: np.ndarray,
        q: np.ndarray,
    ) -> None:
        """Keeps the rows that differ most, among these rows and the kept rows."""
        distance = np.abs(p - q).sum(axis=1) / 2
        order = np.argsort(-distance, kind="stable")[: self._most]
        at = order[distance[order] > 0]
        left, right = left.take(pa.array(at)), right.take(pa.array(at))
        columns: dict[str, Any] = {"id_a": left["id"], "id_b": right["id"]}
        for name in synapses.POSITION:
            columns[name] = pc.coalesce(left[name], right[name])
        columns["neuron_id"] = neuron.take(pa.array(at))
        names = np.asarray(self.classes)
        for side, values, own in zip("ab", (p, q), self._own, strict=True):
            best = np.where(own, values[at], -1).argmax(axis=1)
            columns[f"called_{side}"] = pa.array(names[best], pa.string())
        columns["total_variation"] = distance[at]
        for side, values, own in zip("ab", (p, q), self._own, strict=True):
            for index in np.flatnonzero(own):
                column = values[at, index].astype(np.float32)
                columns[f"{side}_{names[index]}_prob"] = column
        table = pa.table(columns)
        if self._kept is not None:
            table = pa.concat_tables([self._kept, table])
        order = np.argsort(-table["total_variation"].to_numpy(), kind="stable")
        self._kept = table.take(pa.array(order[: self._most])).combine_chunks()

    def largest(self) -> pa.Table:
        """Returns the rows that differ most. The most different row comes first.

        The columns are `id_a`, `id_b`, the position (from A, or from B where A has no
        position), `neuron_id`, `called_a`, `called_b`, `total_variation`,
        `a_<class>_prob` and `b_<class>_prob`. `total_variation` is ½ Σ |p − q| over
        all classes; a class that a table lacks has probability 0 there. Rows with
        equal probabilities are left out.
        """
        assert self._kept is not None
        return self._kept

    def numbers(self) -> dict[str, Any]:
        """Returns `synapses`, `probabilities` and `positions` for comparison.json."""
        count = self.predicted["both"]
        correlation = self._moments.correlation()
        probabilities = {
            name: {
                "mean_absolute_difference": _ratio(self._difference[index], count),
                "correlation": correlation[index],
            }
            for index, name in enumerate(self.classes)
            if name in self.common
        }
        apart = max(self._apart, 1)
        positions = {
            "count": self._positions,
            "mean_difference_nm_zyx": (self._shift / max(self._positions, 1)).tolist(),
            "apart": {
                "count": self._apart,
                "mean_difference_nm_zyx": (self._apart_shift / apart).tolist(),
                "mean_distance_nm_zyx": (self._apart_distance / apart).tolist(),
            },
        }
        total_variation = _ratio(self._difference.sum() / 2, count)
        return {
            "synapses": {
                **of_confusion(self.confusion, self.classes),
                "mean_total_variation": total_variation,
            },
            "probabilities": probabilities,
            "positions": positions if self._positions else None,
        }


def in_one_direction(
    shift_nm_zyx: Sequence[float] | np.ndarray,
    distance_nm_zyx: Sequence[float] | np.ndarray,
) -> bool:
    """Returns whether the shifts between positions have a common direction.

    The net shift of n rows in random directions is only about 1/√n of the distance.

    Args:
      shift_nm_zyx: [3], the sum or the mean of the signed differences.
      distance_nm_zyx: [3], the sum or the mean of the absolute differences.
    """
    net = np.linalg.norm(shift_nm_zyx)
    return bool(net >= _ONE_DIRECTION * np.linalg.norm(distance_nm_zyx))


def _predicted(values: np.ndarray) -> np.ndarray:
    """Returns bool [n]: which rows of `values` [n, classes] have a prediction.

    Published tables have probability 0 for every class of a row without a prediction.
    """
    return ~np.isnan(values).any(axis=1) & (values > 0).any(axis=1)


def of_confusion(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Returns the measures of agreement that follow from a confusion matrix.

    Args:
      counts: int [classes, classes]; rows are the calls in A, columns the calls in B.
      classes: the names of the rows and columns.

    Returns:
      `count`, `agreement`, `per_class`, `confusion` and `confusion_by_row`.
    """
    in_a, in_b, both = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    return {
        "count": int(counts.sum()),
        "agreement": _ratio(both.sum(), counts.sum()),
        "per_class": {
            name: {
                "called_a": int(x),
                "called_b": int(y),
                "both": int(z),
                "of_a": _ratio(z, x),
                "of_b": _ratio(z, y),
            }
            for name, x, y, z in zip(classes, in_a, in_b, both, strict=True)
        },
        "confusion": counts.tolist(),
        "confusion_by_row": accuracy.fractions(counts, axis=1),
    }


def _ratio(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


class _Moments:
    """The means, variances and covariances of columns, updated batch by batch.

    The update adds up deviations from the mean, as in Chan, Golub and LeVeque (1983).
    Sums of squares would lose the digits of a rare class.
    """

    def __init__(self, columns: int) -> None:
        self._count = 0
        self._mean = np.zeros((2, columns))
        self._squares = np.zeros((2, columns))
        self._products = np.zeros(columns)

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """Adds a batch. `p` and `q` have shape [n, columns]."""
        if not len(p):
            return
        values = np.stack([p, q])
        mean = values.mean(axis=1)
        deviation = values - mean[:, None]
        total = self._count + len(p)
        step = mean - self._mean
        weight = self._count * len(p) / total
        self._squares += (deviation**2).sum(axis=1) + step**2 * weight
        products = (deviation[0] * deviation[1]).sum(axis=0)
        self._products += products + step[0] * step[1] * weight
        self._mean += step * len(p) / total
        self._count = total

    def correlation(self) -> list[float | None]:
        """Returns the Pearson correlation of each column.

        The value is None where the standard deviation of a column is at most 1e-9.
        """
        varies = np.all(self._squares > self._count * 1e-18, axis=0)
        scale = np.sqrt(self._squares.prod(axis=0))
        return [
            float(np.clip(product / size, -1, 1)) if there else None
            for product, size, there in zip(self._products, scale, varies, strict=True)
        ]


def neurons_query(classes: int) -> str:
    """Returns the SQL query that counts the votes of each neuron.

    The query reads a table `rows` with the columns of `CALLED`. The neuron with the
    most synapses comes first.

    Args:
      classes: the number of classes.
    """
    votes = ", ".join(
        f"count(*) FILTER ({side} = {i}) AS {side}{i}"
        for side in "ab"
        for i in range(classes)
    )
    return f"""SELECT neuron, count(*) AS synapses, {votes} FROM rows
        WHERE neuron IS NOT NULL GROUP BY neuron ORDER BY synapses DESC, neuron"""


@dataclasses.dataclass
class Neurons:
    """The majority votes of neurons, counted from the rows of `neurons_query`."""

    classes: Sequence[str]
    _different: list[pa.Table] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._confusion = np.zeros((len(self.classes),) * 2, np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts one batch of the rows that `neurons_query` gives."""
        names = np.asarray(self.classes)
        count = batch["synapses"].to_numpy()
        columns: dict[str, Any] = {"neuron_id": batch["neuron"], "synapses": count}
        called = []
        for side in "ab":
            votes = np.stack(
                [batch[f"{side}{i}"].to_numpy() for i in range(len(names))], axis=1
            )
            called.append(votes.argmax(axis=1))  # ties: the first class
            columns[f"called_{side}"] = pa.array(names[called[-1]], pa.string())
            columns[f"fraction_{side}"] = votes.max(axis=1) / count
        self._confusion += accuracy.confusion(called[0], called[1], len(names))
        table = pa.table(columns)
        self._different.append(table.filter(pa.array(called[0] != called[1])))

    def numbers(
        self, sides: tuple[Side, Side], ids_differ: int
    ) -> dict[str, Any] | None:
        """Returns `neurons` for comparison.json.

        Args:
          sides: A and B.
          ids_differ: the number of joined rows whose `neuron_id` differs.

        Returns:
          None if neither table has neurons.
        """
        if not any(side.with_neuron for side in sides):
            return None
        return {
            "ids_of": "a" if sides[0].with_neuron else "b",
            "ids_differ": ids_differ,
            "rule": "majority vote, ties to the first class",
            **of_confusion(self._confusion, self.classes),
        }

    def different(self) -> pa.Table:
        """Returns the neurons that A and B call differently, most synapses first.

        The columns are `neuron_id`, `synapses`, and for each table `called_…` and
        `fraction_…`. The fraction is the share of the neuron's synapses that voted for
        the called class.
        """
        schema = pa.schema(
            [
                ("neuron_id", pa.int64()),
                ("synapses", pa.int64()),
                ("called_a", pa.string()),
                ("fraction_a", pa.float64()),
                ("called_b", pa.string()),
                ("fraction_b", pa.float64()),
            ]
        )
        return pa.concat_tables([schema.empty_table(), *self._different])
