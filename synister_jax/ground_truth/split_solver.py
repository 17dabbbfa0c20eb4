# SPDX-License-Identifier: Apache-2.0
"""Solves the integer programme that divides groups into parts with balanced classes.

The programme was published with Synister (Eckstein et al., Cell 2024) for two parts.
This module chooses all three parts together. It works on counts and knows no tables.

- Groups with equal counts share one integer variable for each part.
- Classes that share no group are solved separately.
- The optimum of each class alone is a lower bound for the joint optimum.
- Among equally good splits, a split is preferred whose parts also have their share of
  the groups. Otherwise the solver fills train with small neurons, and the other parts
  with a few large neurons.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from scipy import optimize, sparse
from scipy.sparse import csgraph

from synister_jax.ground_truth import split_targets

TOLERANCE = 0.05  # largest absolute error of a class's fraction in a part
_ROUNDING = 1e-9
# Parts get groups in the order train, test, validation: a class with one group is in
# train, and a class with two groups is in train and test.
_FILL_ORDER = (0, 2, 1)
# The budget of HiGHS in nodes times columns. The budget does not depend on the clock,
# so every machine finds the same split. A hard case takes about 20 s on two cores.
_WORK = 1_500_000
_FEWEST_NODES, _MOST_NODES = 200, 50_000
# The number of groups in a part can differ from its share by this fraction of the
# share, or by 1 group where the fraction is less.
_SPREAD = 0.1
# An objective counts as equal to its bound if the difference is below this fraction of
# the cost of a single synapse in the largest part.
_EQUAL = 1e-3


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups that are divided into parts, and how to divide them.

    Attributes:
      counts: [groups, classes] int, synapses (or neurons) of each group and class.
      fractions: [parts] float, wanted fraction of each part; a part with the fraction 0
        stays empty.
      cell_types: [groups] int, code of the cell type, or -1. Every cell type must have
        at least one group in part 0.
      anchored: [groups] bool; these groups must be in part 0.
      seed: the seed of the order of the variables, which decides among equal splits.
      deadline: the value of time.monotonic(), in seconds, at which the solver stops.
    """

    counts: np.ndarray
    fractions: np.ndarray
    cell_types: np.ndarray
    anchored: np.ndarray
    seed: int
    deadline: float


@dataclasses.dataclass(frozen=True)
class Solution:
    """The part of each group that has at least one of the solved classes.

    Attributes:
      groups: [n] int, index of the group.
      parts: [n] int, index of the part.
      deviations: [classes] float, the largest of |fraction - wanted| over the parts.
      objective: sum over classes and parts of |count - target| / target.
      bound: a lower bound: no solution has a smaller objective.
      stopped: "" if the solver has finished; "nodes" if its budget is spent; "clock" if
        its time is over.
    """

    groups: np.ndarray
    parts: np.ndarray
    deviations: np.ndarray
    objective: float
    bound: float
    stopped: str


class Infeasible(Exception):
    """No solution is within the tolerance.

    `classes` are the indices of the classes, the worst class first. `stopped` has the
    values of `Solution.stopped`.
    """

    def __init__(self, classes: Sequence[int], stopped: str) -> None:
        super().__init__(classes)
        self.classes, self.stopped = list(classes), stopped


def anchor(counts: np.ndarray, cell_types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `cell_types` and `anchored` for `Groups`, with few constraints.

    If all groups of a cell type have equal counts, any of them can be the group in part
    0. The first group is then put into part 0, and the other groups are free.

    Args:
      counts: [groups, classes] int.
      cell_types: [groups] int, code of the cell type, or -1.
    """
    kinds = np.unique(np.column_stack([cell_types, counts]), axis=0)
    values, kinds_of_type = np.unique(kinds[:, 0], return_counts=True)
    alike = values[(kinds_of_type == 1) & (values >= 0)]
    _, first = np.unique(cell_types, return_index=True)
    anchored = np.zeros(len(cell_types), bool)
    anchored[first] = np.isin(cell_types[first], alike)
    return np.where(np.isin(cell_types, alike), -1, cell_types), anchored


def independent(groups: Groups, classes: Sequence[int]) -> list[list[int]]:
    """Divides `classes` into sets that share no group and no cell type."""
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
    """Returns the best split of the groups of `classes` within the tolerance.

    Args:
      groups: the groups.
      classes: the indices of the classes to solve.
      spread: also give each part its share of the groups, where this does not make the
        objective worse.

    Raises:
      Infeasible: no split is within the tolerance, or the solver has found none.
    """
    if np.count_nonzero(groups.fractions) == 1:
        everything = np.arange(len(groups.counts))
        parts = np.full(len(everything), groups.fractions.argmax())
        return Solution(everything, parts, np.zeros(len(classes)), 0.0, 0.0, "")
    if len(classes) == 1:
        counts = groups.counts[:, classes[0]]
        least = [split_targets.least_objective(counts[counts > 0], groups.fractions)]
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
    """Returns the fractions [parts] of one class that come nearest to the wanted ones.

    The largest deviation over the parts is as small as possible. The result is None if
    the solver has found no split.
    """
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
    # Equal objectives can differ by rounding, because the order of their sums differs.
    proven = found.bound == found.objective
    bound = even.objective if proven else min(found.bound, even.objective)
    return dataclasses.replace(even, bound=bound, stopped=found.stopped)


def _each_alone(groups: Groups, classes: Sequence[int]) -> list[float]:
    """Returns a lower bound of the objective of each class.

    Raises:
      Infeasible: some classes have no split even alone; the error names all of them.
    """
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
    """The groups, merged into kinds whose groups are equal for the solved classes."""

    members: np.ndarray  # [n] int, index of the group
    kind: np.ndarray  # [n] int, kind of each member
    many: np.ndarray  # [kinds] int, number of groups
    counts: np.ndarray  # [kinds, classes] int
    cell_types: np.ndarray  # [kinds] int
    anchored: np.ndarray  # [kinds] bool


def _merge(groups: Groups, classes: Sequence[int]) -> _Kinds:
    """Merges equal groups into kinds, whose order depends on the seed."""
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
    """Returns the solution for `classes`, or why there is none.

    The text is "" if it is proven that there is no solution. Otherwise it is a value of
    `Solution.stopped`.
    """
    kinds = _merge(groups, classes)
    made = np.flatnonzero(groups.fractions)
    fractions = groups.fractions[made]
    totals = kinds.many @ kinds.counts
    wanted = np.stack(
        [split_targets.targets(n, groups.fractions)[made] for n in totals], axis=1
    )
    weights = 1 / np.maximum(wanted, 1)
    unit = weights.min()  # the smallest possible deviation costs 1
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
    # The presolve of HiGHS 1.12 sometimes fails (status "Solve error"). The programme
    # is then solved without presolve.
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
    # The status is 0 for solved, 1 for the time limit, and 2 for infeasible. It is 4
    # for the node limit, but also if presolve finds that the programme is infeasible.
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
    """Returns the constraints of the integer programme.

    Its columns are, in this order: the number of groups of each kind in each part after
    the first; the excess of each part and class over its target; the shortage of each
    part and class; and the largest deviation of a fraction.
    """
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
    """Returns (matrix, rest): the sums in each part are matrix @ columns + rest.

    The weights have the shape [kinds, m], and the sums have the shape [parts * m]. The
    first part has no columns, because it has all groups that are in no other part.
    """
    others = sparse.csr_array(weights.T.astype(float))
    first = sparse.hstack([-others] * (parts - 1))
    matrix = sparse.vstack([first, sparse.block_diag([others] * (parts - 1))])
    rest = np.zeros((parts, weights.shape[1]))
    rest[0] = many @ weights
    return matrix.tocsr(), rest.ravel()


def _dealt(kinds: _Kinds, chosen: np.ndarray) -> np.ndarray:
    """Returns the part of each member.

    Within each kind, the first members go to part 1 and the next members to part 2. The
    remaining members go to part 0.
    """
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
