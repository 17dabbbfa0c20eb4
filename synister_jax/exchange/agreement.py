# SPDX-License-Identifier: Apache-2.0
"""How far two predictions of the same synapses agree, counted a piece at a time."""

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

# Of joined rows with positions: where so many lie elsewhere, in no one direction, ids
# mean other synapses. A net shift of less than that share of the distance is none.
_NEARLY_ALL, _ONE_DIRECTION = 0.95, 0.5
# A row a synapse that both predict: the indices of its calls.
CALLED = pa.schema([("neuron", pa.int64()), ("a", pa.int32()), ("b", pa.int32())])


class Agreement:
    """Counts over joined synapses; all numbers are over those that both predict."""

    def __init__(
        self,
        classes: Sequence[str],
        of_a: Sequence[str],
        of_b: Sequence[str],
        grid_nm_zyx: Sequence[float],
        largest: int,
    ) -> None:
        """
        Args:
          classes: all, in the order in which ties are broken.
          grid_nm_zyx: positions further apart on an axis are counted as apart.
          largest: how many of the rows that differ most to keep.
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
        """Counts joined rows (joining.pairs).

        Returns:
          which rows both predict, bool [n], and of these the calls in A and in B.
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
            np.where(own, x, -1).argmax(axis=1)  # the first of equals
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
        """Nearly all joined rows lie elsewhere in B, here and there."""
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
        """Of these rows and those kept so far the ones that differ most."""
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
        """The rows that differ most, the most different first.

        `id_a`, `id_b`, the position (A's, else B's), `neuron_id`, `called_a`,
        `called_b`, `total_variation` (½ Σ |p − q| over all classes, 0 for a class that
        a side lacks) and `a_<class>_prob`, `b_<class>_prob`. Equal rows are not in it.
        """
        assert self._kept is not None
        return self._kept

    def numbers(self) -> dict[str, Any]:
        """`synapses`, `probabilities` and `positions` of comparison.json."""
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
    """Whether signed differences add up, of their sums or means [3] and absolute ones.

    By chance they would add up to about 1/√n of the absolute ones.
    """
    net = np.linalg.norm(shift_nm_zyx)
    return bool(net >= _ONE_DIRECTION * np.linalg.norm(distance_nm_zyx))


def _predicted(values: np.ndarray) -> np.ndarray:
    """[n] bool. Published tables have 0 throughout where there is no prediction."""
    return ~np.isnan(values).any(axis=1) & (values > 0).any(axis=1)


def of_confusion(counts: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """`count`, `agreement`, `per_class`, `confusion` and `confusion_by_row`."""
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
    """Means, variances and covariances of columns, added batch by batch.

    Deviations from the mean are added up, as in Chan, Golub and LeVeque (1983): sums of
    squares would lose the digits of a rare class.
    """

    def __init__(self, columns: int) -> None:
        self._count = 0
        self._mean = np.zeros((2, columns))
        self._squares = np.zeros((2, columns))
        self._products = np.zeros(columns)

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """[n, columns] each."""
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
        """Pearson's; None where a column does not vary (by more than 1e-9)."""
        varies = np.all(self._squares > self._count * 1e-18, axis=0)
        scale = np.sqrt(self._squares.prod(axis=0))
        return [
            float(np.clip(product / size, -1, 1)) if there else None
            for product, size, there in zip(self._products, scale, varies, strict=True)
        ]


def neurons_query(classes: int) -> str:
    """SQL over rows as `CALLED`: votes by neuron, most synapses first."""
    votes = ", ".join(
        f"count(*) FILTER ({side} = {i}) AS {side}{i}"
        for side in "ab"
        for i in range(classes)
    )
    return f"""SELECT neuron, count(*) AS synapses, {votes} FROM rows
        WHERE neuron IS NOT NULL GROUP BY neuron ORDER BY synapses DESC, neuron"""


@dataclasses.dataclass
class Neurons:
    """Majority votes by neuron, from the rows of `neurons_query`."""

    classes: Sequence[str]
    _different: list[pa.Table] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._confusion = np.zeros((len(self.classes),) * 2, np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        names = np.asarray(self.classes)
        count = batch["synapses"].to_numpy()
        columns: dict[str, Any] = {"neuron_id": batch["neuron"], "synapses": count}
        called = []
        for side in "ab":
            votes = np.stack(
                [batch[f"{side}{i}"].to_numpy() for i in range(len(names))], axis=1
            )
            called.append(votes.argmax(axis=1))  # the first of equals
            columns[f"called_{side}"] = pa.array(names[called[-1]], pa.string())
            columns[f"fraction_{side}"] = votes.max(axis=1) / count
        self._confusion += accuracy.confusion(called[0], called[1], len(names))
        table = pa.table(columns)
        self._different.append(table.filter(pa.array(called[0] != called[1])))

    def numbers(
        self, sides: tuple[Side, Side], ids_differ: int
    ) -> dict[str, Any] | None:
        """`neurons` of comparison.json."""
        if not any(side.with_neuron for side in sides):
            return None
        return {
            "ids_of": "a" if sides[0].with_neuron else "b",
            "ids_differ": ids_differ,
            "rule": "majority vote, ties to the first class",
            **of_confusion(self._confusion, self.classes),
        }

    def different(self) -> pa.Table:
        """Neurons that are called differently, most synapses first.

        `neuron_id`, `synapses`, and for either side `called_…` and `fraction_…`, the
        share of the synapses that voted for it.
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
