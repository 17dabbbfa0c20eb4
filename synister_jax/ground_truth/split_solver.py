# SPDX-License-Identifier: Apache-2.0
"""The integer programme behind splits: whole groups to parts, classes in balance.

Published with Synister (Eckstein et al., Cell 2024) for two parts; here all three are
chosen together. It knows counts only, no tables. Equal groups are one integer variable
a part, classes that share no group are programmes of their own, and the optimum of
each class alone bounds the joint one from below. Of equally good splits one is taken
whose parts have their share of the groups too, where there is one: left to itself, a
solver fills train with small neurons and the rest with a few large ones.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse
from scipy.sparse import csgraph

TOLERANCE = 0.05  # of a class's fraction in a part, absolute
_ROUNDING = 1e-9
_WINDOW = 300  # counts on either side of a target that the lower bound looks at
_LARGEST_SUBSET_SUM = 10**10  # bits to shift
_FILL_ORDER = (0, 2, 1)  # a class with one group is in train, with two also in test
# HiGHS stops after about this many nodes x columns, wherever the clock stands: a hard
# case takes some 20 s on two cores and has the same answer everywhere.
_WORK = 1_500_000
_FEWEST_NODES, _MOST_NODES = 200, 50_000
_SPREAD = 0.1  # of a part's share of the groups: how far it may be off, at least 1
_EQUAL = 1e-3  # of the cost of a single synapse in the largest part


@dataclasses.dataclass(frozen=True)
class Groups:
    """What is to be divided.

    Attributes:
      counts: [groups, classes] int.
      fractions: [parts] float; parts with fraction 0 are not made.
      cell_types: [groups] int; each has at least one group in part 0; -1 for none.
      anchored: [groups] bool; these are in part 0.
      seed: of the order of the variables, which decides among equal splits.
      deadline: time.monotonic() at which the clock stops the solver.
    """

    counts: np.ndarray
    fractions: np.ndarray
    cell_types: np.ndarray
    anchored: np.ndarray
    seed: int
    deadline: float


@dataclasses.dataclass(frozen=True)
class Solution:
    """A part for each group that has one of the classes solved for.

    Attributes:
      groups: [n] int.
      parts: [n] int, index of a part.
      deviations: [classes] float, the largest of |fraction - wanted| over the parts.
      objective: sum over classes and parts of |count - target| / target.
      bound: no solution has a smaller objective.
      stopped: "" for solved to the end, "nodes" or "clock".
    """

    groups: np.ndarray
    parts: np.ndarray
    deviations: np.ndarray
    objective: float
    bound: float
    stopped: str


class Infeasible(Exception):
    """No solution within tolerance: `classes`, the worst first; `stopped` as above."""

    def __init__(self, classes: Sequence[int], stopped: str) -> None:
        super().__init__(classes)
        self.classes, self.stopped = list(classes), stopped


def anchor(counts: np.ndarray, cell_types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`cell_types` and `anchored` of Groups, with as few constraints as will do.

    Of a cell type whose groups are all alike it does not matter which is in part 0:
    the first is put there and the others are free.
    """
    kinds = np.unique(np.column_stack([cell_types, counts]), axis=0)
    values, kinds_of_type = np.unique(kinds[:, 0], return_counts=True)
    alike = values[(kinds_of_type == 1) & (values >= 0)]
    _, first = np.unique(cell_types, return_index=True)
    anchored = np.zeros(len(cell_types), bool)
    anchored[first] = np.isin(cell_types[first], alike)
    return np.where(np.isin(cell_types, alike), -1, cell_types), anchored


def independent(groups: Groups, classes: Sequence[int]) -> list[list[int]]:
    """`classes` in sets that have no group, and no cell type, in common."""
    own = groups.cell_types.max(initial=-1) + 1 + np.arange(len(groups.counts))
    unit = np.where(groups.cell_types < 0, own, groups.cell_types)
    group, column = np.nonzero(groups.counts[:, classes])
    has = sparse.csr_array((np.ones(len(group)), (unit[group], column)))
    number, of_class = csgraph.connected_components(has.T @ has)
    return [
        [classes[i] for i in np.flatnonzero(of_class == n).tolist()]
        for n in range(number)
    ]


def solve(groups: Groups, classes: Sequence[int], *, spread: bool = True) -> Solution:
    """The best split of the groups of `classes` within tolerance.

    With `spread` each part has its share of the groups too, where that is free.

    Raises:
      Infeasible: there is none, or the solver found none.
    """
    if np.count_nonzero(groups.fractions) == 1:
        everything = np.arange(len(groups.counts))
        parts = np.full(len(everything), groups.fractions.argmax())
        return Solution(everything, parts, np.zeros(len(classes)), 0.0, 0.0, "")
    if len(classes) == 1:
        counts = groups.counts[:, classes[0]]
        least = [least_objective(counts[counts > 0], groups.fractions)]
    else:
        least = _each_alone(groups, classes)
    found = _within_any_tolerance(groups, classes, least, spread)
    if isinstance(found, str):
        number = (groups.counts[:, classes] > 0).sum(axis=0)
        raise Infeasible([classes[i] for i in np.argsort(number)], found)
    if (found.deviations <= TOLERANCE + _ROUNDING).all():
        return found
    strict = _optimise(groups, classes, least, tolerance=TOLERANCE)
    if isinstance(strict, str):
        order = np.argsort(-found.deviations, kind="stable")
        off = [i for i in order if found.deviations[i] > TOLERANCE + _ROUNDING]
        raise Infeasible([classes[i] for i in off], strict)
    return strict


def nearest(groups: Groups, which: int) -> np.ndarray | None:
    """[parts] fractions of one class whose largest deviation is the smallest."""
    found = _optimise(groups, [which], [0.0], minimise_worst=True)
    if isinstance(found, str):
        return None
    counts = groups.counts[found.groups, which]
    held = np.bincount(found.parts, counts, minlength=len(groups.fractions))
    return held / held.sum()


def _within_any_tolerance(
    groups: Groups, classes: Sequence[int], least: Sequence[float], spread: bool
) -> Solution | str:
    if not spread:
        return _optimise(groups, classes, least)
    even = _optimise(groups, classes, least, spread=True)
    if isinstance(even, Solution) and even.objective == even.bound:
        return even
    found = _optimise(groups, classes, least)
    if isinstance(found, str):
        return found
    by_clock = even == "clock" or getattr(even, "stopped", "") == "clock"
    found = dataclasses.replace(found, stopped="clock" if by_clock else found.stopped)
    if isinstance(even, str) or even.objective > found.objective * (1 + _ROUNDING):
        return found
    # Equal objectives may be summed with other roundings.
    proven = found.bound == found.objective
    bound = even.objective if proven else min(found.bound, even.objective)
    return dataclasses.replace(even, bound=bound, stopped=found.stopped)


def _each_alone(groups: Groups, classes: Sequence[int]) -> list[float]:
    """Lower bound of each class's objective; Infeasible names all that cannot be."""
    least, wrong, stopped = [], [], ""
    for which in classes:
        try:
            least.append(solve(groups, [which], spread=False).bound)
        except Infeasible as error:
            wrong.append(which)
            stopped = stopped or error.stopped
    if wrong:
        raise Infeasible(wrong, stopped)
    return least


@dataclasses.dataclass(frozen=True)
class _Kinds:
    """Groups alike in what matters for the classes solved for, merged."""

    members: np.ndarray  # [n] int, index of a group
    kind: np.ndarray  # [n] int, of each member
    many: np.ndarray  # [kinds] int
    counts: np.ndarray  # [kinds, classes] int
    cell_types: np.ndarray  # [kinds] int
    anchored: np.ndarray  # [kinds] bool


def _merge(groups: Groups, classes: Sequence[int]) -> _Kinds:
    """In an order that the seed decides."""
    is_member = np.any(groups.counts[:, classes] > 0, axis=1)
    typed = groups.cell_types >= 0
    is_member |= typed & np.isin(groups.cell_types, groups.cell_types[is_member])
    members = np.flatnonzero(is_member)
    columns = [groups.counts[:, classes], groups.cell_types, groups.anchored]
    keys = np.column_stack(columns)[members]
    _, first, kind, many = np.unique(
        keys, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    shuffle = np.random.default_rng(groups.seed).permutation(len(first))
    chosen = members[first[shuffle]]
    return _Kinds(
        members=members,
        kind=np.argsort(shuffle)[kind],
        many=many[shuffle],
        counts=groups.counts[chosen][:, classes],
        cell_types=groups.cell_types[chosen],
        anchored=groups.anchored[chosen],
    )


def _optimise(
    groups: Groups,
    classes: Sequence[int],
    least: Sequence[float],
    *,
    tolerance: float = 1.0,
    spread: bool = False,
    minimise_worst: bool = False,
) -> Solution | str:
    """Solves for `classes`, or says why there is no solution ("" for proven)."""
    kinds = _merge(groups, classes)
    made = np.flatnonzero(groups.fractions)
    fractions = groups.fractions[made]
    totals = kinds.many @ kinds.counts
    wanted = np.stack([targets(n, groups.fractions)[made] for n in totals], axis=1)
    weights = 1 / np.maximum(wanted, 1)
    unit = weights.min()  # the smallest possible deviation costs 1 in the programme
    constraints = _constraints(
        kinds,
        made,
        fractions,
        wanted,
        weights / unit,
        np.array(least) / unit,
        spread,
        with_worst=minimise_worst or tolerance < 1,
    )
    x, deviations = len(kinds.many) * (len(made) - 1), wanted.size
    cost = np.zeros(x + 2 * deviations + 1)
    if minimise_worst:
        cost[-1] = 1
    else:
        cost[x:-1] = np.tile(weights.ravel() / unit, 2)
    most = np.full(len(cost), np.inf)
    most[:x] = np.tile(kinds.many * ~kinds.anchored, len(made) - 1)
    most[-1] = tolerance + _ROUNDING
    work = _WORK // 10 if spread else _WORK
    nodes = int(np.clip(work // len(cost), _FEWEST_NODES, _MOST_NODES))
    # HiGHS 1.12 now and then trips over its own presolve (status "Solve error").
    for presolve in (True, False):
        found = optimize.milp(
            cost,
            constraints=constraints,
            bounds=optimize.Bounds(0, most),
            integrality=np.arange(len(cost)) < x,
            options={
                "presolve": presolve,
                "mip_rel_gap": 0,
                "node_limit": nodes,
                "time_limit": max(1.0, groups.deadline - time.monotonic()),
            },
        )
        if found.x is not None or "error" not in found.message:
            break
    # 0 solved, 1 time, 2 infeasible; 4 is nodes, or infeasible found by presolve.
    proven = found.status in (0, 2) or "infeasible or unbounded" in found.message
    stopped = "" if proven else "clock" if found.status == 1 else "nodes"
    if found.x is None:
        return stopped
    chosen = np.rint(found.x[:x]).astype(np.int64).reshape(-1, len(kinds.many))
    counts = chosen @ kinds.counts
    counts = np.concatenate([[totals - counts.sum(axis=0)], counts])
    objective = float((np.abs(counts - wanted) * weights).sum())
    bound = float(sum(least))
    if not (minimise_worst or spread):
        proven_bound = objective if proven else (found.mip_dual_bound or 0.0) * unit
        bound = max(bound, proven_bound)
    if bound > objective - _EQUAL * unit:
        bound, stopped = objective, ""
    return Solution(
        groups=kinds.members,
        parts=made[_dealt(kinds, chosen)],
        deviations=np.abs(counts / totals - fractions[:, None]).max(axis=0),
        objective=objective,
        bound=bound,
        stopped=stopped,
    )


def _constraints(
    kinds: _Kinds,
    made: np.ndarray,
    fractions: np.ndarray,
    wanted: np.ndarray,
    costs: np.ndarray,
    least: np.ndarray,
    spread: bool,
    with_worst: bool,
) -> optimize.LinearConstraint:
    """Columns: groups of each kind in each part after the first; over, then under, for
    each part and class; the worst deviation of a fraction."""
    parts, classes = wanted.shape
    in_part, rest = _part_sums(kinds.counts, kinds.many, parts)
    has = kinds.counts > 0
    has_in_part, has_rest = _part_sums(has, kinds.many, parts)
    rank = np.argsort([p for i in _FILL_ORDER for p in np.flatnonzero(made == i)])
    number = kinds.many @ has
    fewest, most = rank[:, None] < np.minimum(number, parts), np.inf
    if spread:
        share = fractions[:, None] * number
        slack = np.maximum(1, _SPREAD * share)
        fewest = np.maximum(fewest, share - slack)
        most = (share + slack).ravel() - has_rest
    types = np.unique(kinds.cell_types[kinds.cell_types >= 0])
    is_type = kinds.cell_types[:, None] == types
    known, known_rest = _part_sums(is_type, kinds.many, parts)
    one_part = sparse.hstack([sparse.eye_array(len(kinds.many))] * (parts - 1))
    eye = sparse.eye_array(wanted.size)
    of_class = sparse.hstack([sparse.eye_array(classes)] * parts)
    cost = of_class @ sparse.diags_array(costs.ravel())
    total = np.tile(wanted.sum(axis=0), parts)
    worst = sparse.csr_array(total[:, None].astype(float))
    exact = np.repeat(fractions, classes) * total - rest
    rows = [
        # matrix blocks, lowest, highest
        ([one_part, None, None, None], -np.inf, kinds.many),
        ([has_in_part, None, None, None], fewest.ravel() - has_rest, most),
        ([known[: len(types)], None, None, None], 1 - known_rest[: len(types)], np.inf),
        ([in_part, -eye, eye, None], wanted.ravel() - rest, wanted.ravel() - rest),
        ([None, cost, cost, sparse.csr_array((classes, 1))], least, np.inf),
    ]
    if with_worst:
        rows += [
            ([in_part, None, None, -worst], -np.inf, exact),
            ([in_part, None, None, worst], exact, np.inf),
        ]
    matrix = sparse.block_array([blocks for blocks, _, _ in rows], format="csr")
    limits = [np.broadcast_arrays(low, high) for _, low, high in rows]
    low, high = np.concatenate(limits, axis=1)
    return optimize.LinearConstraint(matrix, low, high)


def _part_sums(
    weights: np.ndarray, many: np.ndarray, parts: int
) -> tuple[sparse.csr_array, np.ndarray]:
    """Sums of weights [kinds, m] in each part: matrix @ columns + rest, [parts * m].

    The first part has no columns: it holds what the others do not.
    """
    others = sparse.csr_array(weights.T.astype(float))
    first = sparse.hstack([-others] * (parts - 1))
    matrix = sparse.vstack([first, sparse.block_diag([others] * (parts - 1))])
    rest = np.zeros((parts, weights.shape[1]))
    rest[0] = many @ weights
    return matrix.tocsr(), rest.ravel()


def _dealt(kinds: _Kinds, chosen: np.ndarray) -> np.ndarray:
    """Part of each member: of a kind, the first go to part 1, the next to part 2 …"""
    order = np.argsort(kinds.kind, kind="stable")
    start = np.cumsum(kinds.many) - kinds.many
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - start[kinds.kind[order]]
    part = np.zeros(len(order), np.int64)
    low = 0
    for number, high in enumerate(np.cumsum(chosen, axis=0), start=1):
        part[(rank >= low) & (rank < high[kinds.kind])] = number
        low = high[kinds.kind]
    return part


def targets(count: int, fractions: np.ndarray) -> np.ndarray:
    """[parts] int: truncated; the first part that is made takes the rest."""
    wanted = np.floor(fractions * count + _ROUNDING).astype(np.int64)
    wanted[np.flatnonzero(fractions)[0]] += count - wanted.sum()
    return wanted


def least_objective(sizes_of_groups: np.ndarray, fractions: np.ndarray) -> float:
    """Lower bound of sum over parts of |count - target| / target, for one class.

    Which counts can parts have at all? Sums of group sizes; the nearest such sums to
    the targets that leave such a sum to the first part are a relaxation that a solver's
    LP does not see.

    Args:
      sizes_of_groups: [groups] int, positive.
      fractions: [parts], adding up to 1.
    """
    total = int(sizes_of_groups.sum())
    sizes, many = np.unique(sizes_of_groups, return_counts=True)
    made = np.flatnonzero(fractions)
    if len(sizes) * total > _LARGEST_SUBSET_SUM:
        return 0.0
    is_sum = _subset_sums(sizes.tolist(), many.tolist(), total)
    wanted = targets(total, fractions)[made]
    weights = 1 / np.maximum(wanted, 1)
    near = [np.array([0])] * 2
    for i, target in enumerate(wanted[1:]):
        first = max(target - _WINDOW, 0)
        near[i] = first + np.flatnonzero(is_sum[first : target + _WINDOW + 1])
    others = near[0][:, None] + near[1]
    possible = (others <= total) & is_sum[np.minimum(others, total)]
    cost = weights[0] * np.abs(others - wanted[1:].sum())
    cost += weights[1] * np.abs(near[0] - wanted[1])[:, None]
    if len(made) == 3:
        cost += weights[2] * np.abs(near[1] - wanted[2])
    outside = (_WINDOW + 1) * weights[1:].min()
    return float(min(cost[possible].min(initial=np.inf), outside))


def _subset_sums(sizes: list[int], many: list[int], total: int) -> np.ndarray:
    """[total + 1] bool: whether some of the groups add up to the index."""
    sums = 1
    for size, left in zip(sizes, many, strict=True):
        take = 1
        while left:
            take = min(take, left)
            sums |= sums << (size * take)
            left -= take
            take *= 2
    octets = np.frombuffer(sums.to_bytes(total // 8 + 1, "little"), np.uint8)
    return np.unpackbits(octets, bitorder="little")[: total + 1].astype(bool)
