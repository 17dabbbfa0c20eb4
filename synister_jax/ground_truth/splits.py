# SPDX-License-Identifier: Apache-2.0
"""Train, validation and test parts of a synapse table, balanced and free of leaks.

A group (neuron, hemilineage, brain region, cell type) goes whole to one part; an
integer programme chooses which, so that every class comes close to its fractions:
Eckstein et al., Cell 2024, extended from two parts to three.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError
from synister_jax.ground_truth import split_solver
from synister_jax.tables import synapses
from synister_jax.tables.synapses import GROUP_COLUMNS

_PER_SYNAPSE_SEED = 19120623  # the original's


class ImpossibleSplit(UserError):
    """No split within tolerance; names the classes and the best that each can do."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A part for every row, and how close the parts come to their targets.

    Attributes:
      parts: [rows] object: train, validation, test or None.
      classes: the classes taking part.
      targets: [classes, 3] int synapses (or neurons) in the order of synapses.PARTS.
      counts: [classes, 3] int, achieved.
      objective: sum over classes and parts of |count - target| / target, without the
        classes in `per_synapse`.
      bound: no split of these groups has a smaller objective.
      stopped: "" (solved to the end), "nodes" (budget spent: the same answer
        everywhere) or "clock" (another machine may find another split).
      seconds: time taken.
      per_synapse: classes split synapse by synapse: their neurons are in several
        parts. Their targets and counts are synapses always.
    """

    parts: np.ndarray
    classes: tuple[str, ...]
    targets: np.ndarray
    counts: np.ndarray
    objective: float
    bound: float
    stopped: str
    seconds: float
    per_synapse: tuple[str, ...]

    @property
    def gap(self) -> float:
        return self.objective - self.bound

    @property
    def optimal(self) -> bool:
        """Whether no better split exists, proven."""
        return self.gap == 0


def classes_of(table: pa.Table) -> tuple[str, ...]:
    """The single known neurotransmitters in the table, in the order of synapses."""
    there = set(pc.unique(table["neurotransmitter"]).to_pylist())
    return tuple(name for name in synapses.NEUROTRANSMITTERS if name in there)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a split is to be made.

    Attributes:
      by: neuron, hemilineage, brain_region or cell_type (a neuron without a type is
        a group of its own).
      fractions: of train, validation and test; a part with fraction 0 is not made.
      classes: default all that are in the table.
      hold_out: ids of synapses to keep out of the split.
      hold_out_part: "train" puts held-out rows that could take part there. The rest
        of their neurons may be elsewhere.
      balance: what to count, "synapses" or "neurons".
      shared_cell_types: at least one neuron of every cell type is in train (the rule
        of BANC); by neuron only.
      per_synapse_fallback: split classes that cannot come within tolerance synapse by
        synapse instead of raising.
      seed: another seed gives another split.
      time_limit_s: of wall time, should the budget of nodes not be enough.
    """

    by: str
    fractions: Sequence[float] = (0.64, 0.16, 0.20)
    classes: Sequence[str] | None = None
    hold_out: np.ndarray | None = None
    hold_out_part: str | None = None
    balance: str = "synapses"
    shared_cell_types: bool = False
    per_synapse_fallback: bool = False
    seed: int = 0
    time_limit_s: float = 60.0

    def check(self, table: pa.Table) -> None:
        """Raises `UserError` for what the table cannot be split by."""
        if self.by not in GROUP_COLUMNS:
            raise UserError(f"--by={self.by}: it is one of {', '.join(GROUP_COLUMNS)}")
        column = GROUP_COLUMNS[self.by]
        if table[column].null_count == len(table):
            raise UserError(
                f"--by={self.by}: no row has a {column}; split by something else"
            )
        if self.balance not in ("synapses", "neurons"):
            raise UserError(f"--balance={self.balance}: it is synapses or neurons")
        if self.hold_out_part not in (None, "train"):
            raise UserError(
                f"--hold_out_part={self.hold_out_part}: it is none or train"
            )
        fractions = self.fractions
        shown = ", ".join(f"{f:g}" for f in fractions)
        if len(fractions) != 3 or not all(0 <= f <= 1 for f in fractions):
            raise UserError(
                f"--fractions={shown}: three numbers from 0 to 1 are needed, for "
                f"{', '.join(synapses.PARTS)}"
            )
        if not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise UserError(
                f"--fractions={shown} add up to {sum(fractions):g}, not to 1"
            )
        if self.shared_cell_types and (self.by != "neuron" or not fractions[0]):
            raise UserError("--shared_cell_types needs --by=neuron and a train part")
        synapses.check_classes(self.classes or ())


def make(table: pa.Table, scheme: Scheme) -> Split:
    """Splits a synapse table so that no group is in two parts.

    The answer does not depend on the order of the rows. It is the same on every
    machine unless the clock stops the solver (`Split.stopped`).

    Args:
      table: synapse table. Rows take part that have one known neurotransmitter, of
        `classes`, and a group, and are not held out; all others get no part.

    Raises:
      ImpossibleSplit: a class would be more than 5 points off in some part.
      UserError: names the argument that is wrong by the option of make_splits.py.
    """
    start = time.monotonic()
    scheme.check(table)
    by, fractions = scheme.by, np.asarray(scheme.fractions, float)
    given = scheme.classes
    classes = tuple(classes_of(table) if given is None else given)
    labels = synapses.labels(table, classes)
    neurons = _codes(table["neuron_id"])
    types = _cell_types(table, neurons)
    groups = _groups(table, by, neurons, types)
    usable = (labels >= 0) & (groups >= 0)
    if scheme.balance == "neurons":
        usable &= neurons >= 0
    held_out = _held_out(table, scheme.hold_out)
    rows = np.flatnonzero(usable & ~held_out)
    labels = labels[rows]
    _check_rows(labels, classes, by)

    _, first, group_of_row = np.unique(
        groups[rows], return_index=True, return_inverse=True
    )
    shape = (len(first), len(classes))
    cell = group_of_row * shape[1] + labels
    counted = cell
    if scheme.balance == "neurons":
        neuron_of_cell = np.unique(np.stack([cell, neurons[rows]]), axis=1)
        counted = neuron_of_cell[0]
    counts = np.bincount(counted, minlength=math.prod(shape)).reshape(shape)
    group_types = (
        types[rows][first] if scheme.shared_cell_types else np.full(shape[0], -1)
    )

    shuffle = np.random.default_rng(scheme.seed).permutation(shape[0])
    groups_to_split = split_solver.Groups(
        counts[shuffle],
        fractions,
        *split_solver.anchor(counts[shuffle], group_types[shuffle]),
        seed=scheme.seed,
        deadline=start + scheme.time_limit_s,
    )
    solved, per_synapse, reasons = _solve_all(
        groups_to_split, classes, by, scheme.per_synapse_fallback
    )
    part_of_group = np.zeros(shape[0], np.int64)
    for solution in solved:
        part_of_group[shuffle[solution.groups]] = solution.parts

    part = part_of_group[group_of_row]
    achieved = np.stack([counts[part_of_group == p].sum(axis=0) for p in range(3)], 1)
    targets = np.stack([split_solver.targets(n, fractions) for n in counts.sum(0)])
    for k in per_synapse:
        of_class = labels == k
        targets[k] = split_solver.targets(of_class.sum(), fractions)
        achieved[k] = targets[k]
        ids = table["synapse_id"].to_numpy()[rows[of_class]]
        part[of_class] = _per_synapse(ids, targets[k])
    parts = np.full(len(table), None, object)
    if scheme.hold_out_part is not None:
        parts[usable & held_out] = scheme.hold_out_part
    parts[rows] = np.array(synapses.PARTS, object)[part]
    return Split(
        parts=parts,
        classes=classes,
        targets=targets,
        counts=achieved,
        objective=float(sum(solution.objective for solution in solved)),
        bound=float(sum(solution.bound for solution in solved)),
        stopped=next((why for why in ("clock", "nodes") if why in reasons), ""),
        seconds=time.monotonic() - start,
        per_synapse=tuple(classes[k] for k in per_synapse),
    )


def _check_rows(labels: np.ndarray, classes: Sequence[str], by: str) -> None:
    if not len(labels):
        raise UserError(
            "--synapses: no row has one known neurotransmitter "
            f"({', '.join(classes) or 'none is in the table'}) and a "
            f"{GROUP_COLUMNS[by]} and is not held out; nothing can be split"
        )
    there = np.bincount(labels, minlength=len(classes))
    missing = [name for name, n in zip(classes, there, strict=True) if not n]
    if missing:
        raise UserError(
            f"no row that can take part is {' or '.join(missing)}; leave it out by "
            "--classes"
        )


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Rank of each value among the column's sorted values, [n] int64; -1 for null."""
    encoded = column.combine_chunks().dictionary_encode()
    rank = np.argsort(pc.sort_indices(encoded.dictionary).to_numpy())
    indices = pc.fill_null(encoded.indices, -1).to_numpy()
    return np.where(indices < 0, -1, np.append(rank, -1)[indices])


def _cell_types(table: pa.Table, neurons: np.ndarray) -> np.ndarray:
    """Code of each row's cell type, that of its neuron where it has none itself."""
    types = _codes(table["cell_type"])
    known = (types >= 0) & (neurons >= 0)
    of_neuron = np.full(neurons.max(initial=-1) + 1, -1)
    of_neuron[neurons[known]] = types[known]
    wrong = np.flatnonzero(known & (of_neuron[neurons] != types))
    if len(wrong):
        neuron_id = table["neuron_id"][int(wrong[0])].as_py()
        raise UserError(f"--synapses: neuron {neuron_id} has two cell types; mend that")
    fill = (types < 0) & (neurons >= 0)
    types[fill] = of_neuron[neurons[fill]]
    return types


def _groups(
    table: pa.Table, by: str, neurons: np.ndarray, types: np.ndarray
) -> np.ndarray:
    """Code of each row's group, in the order of the groups' values; -1 for none."""
    if by == "neuron":
        return neurons
    if by == "cell_type":
        own = np.where(neurons < 0, -1, types.max() + 1 + neurons)
        return np.where(types < 0, own, types)
    return _codes(table[GROUP_COLUMNS[by]])


def _held_out(table: pa.Table, hold_out: np.ndarray | None) -> np.ndarray:
    if hold_out is None:
        return np.zeros(len(table), bool)
    held_out = np.isin(table["synapse_id"].to_numpy(), hold_out)
    if not held_out.any():
        raise UserError("--hold_out: none of its synapses is in --synapses; same ids?")
    return held_out


def _solve_all(
    groups: split_solver.Groups, classes: Sequence[str], by: str, fallback: bool
) -> tuple[list[split_solver.Solution], list[int], set[str]]:
    """Solutions, the classes that none is for, and why the solver stopped early."""
    solutions: list[split_solver.Solution] = []
    left_out: list[int] = []
    failures: list[split_solver.Infeasible] = []
    waiting = split_solver.independent(groups, range(len(classes)))
    while waiting:
        together = waiting.pop(0)
        try:
            solutions.append(split_solver.solve(groups, together))
        except split_solver.Infeasible as error:
            failures.append(error)
            worst = error.classes[0]
            left_out.append(worst)
            rest = [k for k in together if k != worst]
            if fallback and rest:
                waiting += split_solver.independent(groups, rest)
    if failures and not fallback:
        raise ImpossibleSplit(_explain(groups, classes, by, failures))
    reasons = {x.stopped for x in solutions} | {x.stopped for x in failures}
    return solutions, sorted(left_out), reasons


def _explain(
    groups: split_solver.Groups,
    classes: Sequence[str],
    by: str,
    failures: Sequence[split_solver.Infeasible],
) -> str:
    """One line for the user."""
    parts = "/".join(synapses.PARTS)
    wanted = "/".join(f"{f:.2f}" for f in groups.fractions)
    described = []
    for k in [k for failure in failures for k in failure.classes]:
        counts = groups.counts[:, k]
        target = split_solver.targets(counts.sum(), groups.fractions)
        best = split_solver.nearest(groups, k)
        can = "none" if best is None else "/".join(f"{f:.2f}" for f in best)
        described.append(
            f"{classes[k]} ({np.count_nonzero(counts)} groups; target "
            f"{'/'.join(f'{t:,}' for t in target)}; best possible alone {can})"
        )
    stopped = {failure.stopped for failure in failures} - {""}
    doubt = "or a longer --time_limit_s, " if "clock" in stopped else ""
    found = "was found within the solver's budget" if stopped else "exists"
    return (
        f"no split by {by} {found} with {parts} within "
        f"{split_solver.TOLERANCE * 100:g} points of {wanted} for "
        f"{', '.join(described)}; split these synapse by synapse "
        f"(--per_synapse_fallback), try other --fractions, {doubt}or leave them out "
        "by --classes"
    )


def _per_synapse(ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Part of each id, [n] int: at random, in parts of exactly the target sizes."""
    drawn = np.random.default_rng(_PER_SYNAPSE_SEED).permutation(len(ids))
    part = np.empty(len(ids), np.int64)
    part[np.argsort(ids)[drawn]] = np.repeat(np.arange(3), targets)
    return part
