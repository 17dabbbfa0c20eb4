# SPDX-License-Identifier: Apache-2.0
"""Splits a synapse table into train, validation and test parts without shared groups.

A group is a neuron, a hemilineage, a brain region or a cell type. Each whole group goes
to one part. An integer programme chooses the part of each group, so that every class
comes close to its fractions. The method is from Eckstein et al. (Cell 2024). It is
extended from two parts to three.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError
from synister_jax.ground_truth import split_solver, split_targets
from synister_jax.tables import synapses
from synister_jax.tables.synapses import GROUP_COLUMNS

_PER_SYNAPSE_SEED = 19120623  # the seed of the original


class ImpossibleSplit(UserError):
    """No split is within the tolerance.

    The message names the classes and the best fractions that each class can reach.
    """


@dataclasses.dataclass(frozen=True)
class Split:
    """The part of every row, and how close the parts come to their targets.

    Attributes:
      parts: [rows] object; train, validation, test or None.
      classes: the classes that take part.
      targets: [classes, 3] int, wanted synapses (or neurons) of each class and part, in
        the order of synapses.PARTS.
      counts: [classes, 3] int, the synapses (or neurons) that the split has.
      objective: sum over classes and parts of |count - target| / target, without the
        classes in `per_synapse`.
      bound: a lower bound: no split of these groups has a smaller objective.
      stopped: "" if the solver has finished. "nodes" if its budget of nodes is spent;
        every machine then finds the same split. "clock" if its time is over; another
        machine can then find another split.
      seconds: the time that the split took.
      per_synapse: the classes that are split synapse by synapse, so that their neurons
        are in several parts. Their targets and counts are always synapses.
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
        """The difference of the objective and its lower bound."""
        return self.objective - self.bound

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no better split exists."""
        return self.gap == 0


def classes_of(table: pa.Table) -> tuple[str, ...]:
    """Returns the known neurotransmitters of the table.

    Their order is the order of `synapses.NEUROTRANSMITTERS`. A value with several
    transmitters does not count.
    """
    there = set(pc.unique(table["neurotransmitter"]).to_pylist())
    return tuple(name for name in synapses.NEUROTRANSMITTERS if name in there)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The settings of a split.

    Attributes:
      by: the kind of the groups: neuron, hemilineage, brain_region or cell_type. With
        cell_type, a neuron without a cell type is a group of its own.
      fractions: the fractions of train, validation and test; a part with the fraction 0
        stays empty.
      classes: the classes that take part; by default, all classes in the table.
      hold_out: the ids of synapses that are kept out of the split.
      hold_out_part: "train" puts the held-out synapses that could take part into train.
        Other synapses of their neurons can be in other parts.
      balance: the units that are counted, "synapses" or "neurons".
      shared_cell_types: at least one neuron of every cell type is in train, as in BANC;
        possible only with by="neuron".
      per_synapse_fallback: split a class synapse by synapse if no split by groups is
        within the tolerance. Otherwise such a class is an error.
      seed: another seed gives another split.
      time_limit_s: stop the solver after this time, in seconds of wall time, if its
        budget of nodes is not spent before.
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
        """Checks that the table can be split with these settings.

        Raises:
          UserError: a setting has no possible value; the message names its option.
        """
        if self.by not in GROUP_COLUMNS:
            raise UserError(f"--by={self.by}: give one of {', '.join(GROUP_COLUMNS)}")
        column = GROUP_COLUMNS[self.by]
        if table[column].null_count == len(table):
            raise UserError(
                f"--by={self.by}: no row has a {column}; split by another group"
            )
        if self.balance not in ("synapses", "neurons"):
            raise UserError(f"--balance={self.balance}: give synapses or neurons")
        if self.hold_out_part not in (None, "train"):
            raise UserError(f"--hold_out_part={self.hold_out_part}: give none or train")
        fractions = self.fractions
        shown = ", ".join(f"{f:g}" for f in fractions)
        if len(fractions) != 3 or not all(0 <= f <= 1 for f in fractions):
            raise UserError(
                f"--fractions={shown}: give three numbers from 0 to 1, for "
                f"{', '.join(synapses.PARTS)}"
            )
        if not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise UserError(
                f"--fractions={shown} add up to {sum(fractions):g}; give three "
                "fractions that add up to 1"
            )
        if self.shared_cell_types and (self.by != "neuron" or not fractions[0]):
            raise UserError("--shared_cell_types needs --by=neuron and a train part")
        synapses.check_classes(self.classes or ())


def make(table: pa.Table, scheme: Scheme) -> Split:
    """Splits a synapse table so that no group is in two parts.

    The split does not depend on the order of the rows. It is the same on every machine
    unless the clock stops the solver (`Split.stopped`).

    Args:
      table: the synapse table. A row takes part if it has exactly one known
        neurotransmitter, which is one of the classes, and a group, and is not held out.
        With balance="neurons", it also needs a neuron. All other rows get no part.
      scheme: the settings.

    Raises:
      ImpossibleSplit: the fraction of a class in some part would be more than 5
        percentage points off.
      UserError: a setting is wrong or no row can take part; the message names the
        option of make_splits.py.
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
    targets = np.stack([split_targets.targets(n, fractions) for n in counts.sum(0)])
    for k in per_synapse:
        of_class = labels == k
        targets[k] = split_targets.targets(of_class.sum(), fractions)
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
            "--synapses: no row can be split; a row must have one known "
            f"neurotransmitter ({', '.join(classes) or 'none is in the table'}) and a "
            f"{GROUP_COLUMNS[by]}, and must not be held out; give a table with such "
            "rows"
        )
    there = np.bincount(labels, minlength=len(classes))
    missing = [name for name, n in zip(classes, there, strict=True) if not n]
    if missing:
        raise UserError(
            "--synapses: no row that can be split has the class "
            f"{' or '.join(missing)}; leave the class out of --classes"
        )


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Returns each value's rank among the sorted values, [n] int64; -1 for null."""
    encoded = column.combine_chunks().dictionary_encode()
    rank = np.argsort(pc.sort_indices(encoded.dictionary).to_numpy())
    indices = pc.fill_null(encoded.indices, -1).to_numpy()
    return np.where(indices < 0, -1, np.append(rank, -1)[indices])


def _cell_types(table: pa.Table, neurons: np.ndarray) -> np.ndarray:
    """Returns the code of each row's cell type; -1 for none.

    If a row has no cell type, the cell type of its neuron is used.
    """
    types = _codes(table["cell_type"])
    known = (types >= 0) & (neurons >= 0)
    of_neuron = np.full(neurons.max(initial=-1) + 1, -1)
    of_neuron[neurons[known]] = types[known]
    wrong = np.flatnonzero(known & (of_neuron[neurons] != types))
    if len(wrong):
        neuron_id = table["neuron_id"][int(wrong[0])].as_py()
        raise UserError(
            f"--synapses: neuron {neuron_id} has two cell types; give each neuron one "
            "cell type"
        )
    fill = (types < 0) & (neurons >= 0)
    types[fill] = of_neuron[neurons[fill]]
    return types


def _groups(
    table: pa.Table, by: str, neurons: np.ndarray, types: np.ndarray
) -> np.ndarray:
    """Returns the code of each row's group, in the order of the values; -1 for none."""
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
        raise UserError(
            "--hold_out: none of its synapses is in --synapses; check that both tables "
            "have the same kind of ids"
        )
    return held_out


def _solve_all(
    groups: split_solver.Groups, classes: Sequence[str], by: str, fallback: bool
) -> tuple[list[split_solver.Solution], list[int], set[str]]:
    """Solves sets of classes that share no group, one set after the other.

    Returns:
      The solutions, the classes without a solution, and why the solver stopped early.
    """
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
    """Returns the message about classes without a split, which is one line."""
    parts = "/".join(synapses.PARTS)
    wanted = "/".join(f"{f:.2f}" for f in groups.fractions)
    described = []
    for k in [k for failure in failures for k in failure.classes]:
        counts = groups.counts[:, k]
        target = split_targets.targets(counts.sum(), groups.fractions)
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
        f"{split_solver.TOLERANCE * 100:g} percentage points of {wanted} for "
        f"{', '.join(described)}; split these classes synapse by synapse "
        f"(--per_synapse_fallback), try other --fractions, {doubt}or leave the classes "
        "out of --classes"
    )


def _per_synapse(ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Draws a part for each id, [n] int; each part has exactly its target size."""
    drawn = np.random.default_rng(_PER_SYNAPSE_SEED).permutation(len(ids))
    part = np.empty(len(ids), np.int64)
    part[np.argsort(ids)[drawn]] = np.repeat(np.arange(3), targets)
    return part
