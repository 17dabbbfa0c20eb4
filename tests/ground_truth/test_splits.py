# SPDX-License-Identifier: Apache-2.0
"""Compares splits with all possible assignments, and checks the rules of a split."""

import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synister_jax.base.errors import UserError
from synister_jax.ground_truth import dialects, importing, splits
from synister_jax.tables import synapses
from tests.helpers.small_data import shared_data

CLASSES = ("gaba", "acetylcholine", "glutamate")
FRACTIONS = (0.64, 0.16, 0.20)


def table_of(counts: Sequence[Sequence[int]], column: str = "hemilineage") -> pa.Table:
    """Returns `counts[group][class]` synapses; every entry of `counts` is a neuron."""
    rows = []
    for group, of_group in enumerate(counts):
        for index, count in enumerate(of_group):
            row = {"neurotransmitter": CLASSES[index]}
            row |= {"neuron_id": 10 * group + index, "hemilineage": f"H{group:03d}"}
            rows += [row] * count
    facts = pa.Table.from_pylist(rows)
    ids = np.arange(len(rows)) * 7
    columns = {name: np.zeros(len(rows)) for name in synapses.POSITION}
    columns |= {"synapse_id": ids} | {n: facts[n] for n in facts.column_names}
    return synapses.conform(pa.table(columns), "made here")


def parts_of_groups(table: pa.Table, split: splits.Split, column: str) -> dict:
    """Returns {group: part}, and fails if a group is in two parts."""
    found: dict = {}
    for value, part in zip(table[column].to_pylist(), split.parts, strict=True):
        assert found.setdefault(value, part) == part
    return found


def targets(count: int, fractions: Sequence[float]) -> list[int]:
    rest = [int(fraction * count + 1e-9) for fraction in fractions[1:]]
    return [count - sum(rest), *rest]


def best_by_trying_all(counts: np.ndarray, fractions: Sequence[float]) -> float | None:
    """Returns the least objective of all allowed assignments; None if none exists."""
    groups, classes = counts.shape
    made = [p for p in (0, 2, 1) if fractions[p] > 0]
    totals = counts.sum(axis=0)
    wanted = np.array([targets(n, fractions) for n in totals])
    best = None
    for parts in itertools.product(made, repeat=groups):
        held = np.zeros((classes, 3), int)
        many = np.zeros((classes, 3), int)
        for group, part in enumerate(parts):
            held[:, part] += counts[group]
            many[:, part] += counts[group] > 0
        number = (counts > 0).sum(axis=0)
        lacking = any(
            many[c, part] == 0
            for c in range(classes)
            for part in made[: min(number[c], len(made))]
        )
        off = np.abs(held / totals[:, None] - np.array(fractions)).max()
        if lacking or off > 0.05 + 1e-9:
            continue
        deviation = np.abs(held - wanted) / np.maximum(wanted, 1)
        objective = deviation[:, made].sum()
        best = objective if best is None else min(best, objective)
    return best


def check_against_all(counts: np.ndarray, fractions: Sequence[float]) -> bool:
    """Compares the split with the best assignment; returns whether one is allowed."""
    table = table_of(counts.tolist())
    expected = best_by_trying_all(counts, fractions)
    classes = CLASSES[: counts.shape[1]]
    if expected is None:
        with pytest.raises(splits.ImpossibleSplit, match="best possible alone|within"):
            splits.make(table, splits.Scheme("hemilineage", fractions, classes=classes))
        return False
    split = splits.make(table, splits.Scheme("hemilineage", fractions, classes=classes))
    assert split.objective == pytest.approx(expected, abs=1e-9)
    assert split.optimal and split.bound == split.objective and not split.stopped
    parts = parts_of_groups(table, split, "hemilineage")
    for index in range(len(classes)):
        held = dict.fromkeys(synapses.PARTS, 0)
        for group, part in parts.items():
            held[part] += int(counts[int(group[1:]), index])
        assert list(held.values()) == split.counts[index].tolist()
    return True


@pytest.mark.long
def test_small_cases_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    possible = 0
    for number in range(60):
        shape = (int(rng.integers(3, 9)), int(rng.integers(1, 3)))
        counts = rng.integers(0, 12, shape)
        counts[: len(counts) // 2] *= int(rng.integers(1, 5))
        if (counts.sum(axis=0) == 0).any() or (counts.sum(axis=1) == 0).any():
            continue
        fractions = [FRACTIONS, (0.5, 0.25, 0.25), (0.8, 0.2, 0.0)][number % 3]
        possible += check_against_all(counts, fractions)
    assert 10 < possible < 55


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
        min_size=3,
        max_size=7,
    )
)
def test_brute_force_with_three_classes(drawn: list[tuple[int, int, int]]) -> None:
    counts = np.array(drawn)
    counts = counts[counts.sum(axis=1) > 0]
    if len(counts) >= 3 and (counts.sum(axis=0) > 0).all():
        check_against_all(counts, (0.5, 0.25, 0.25))


def neurons(sizes: dict[str, list[int]], cell_types: bool = False) -> pa.Table:
    rows = []
    for name, of_class in sizes.items():
        for size in of_class:
            neuron = {"neuron_id": len(rows) + 1, "neurotransmitter": name}
            rows += [neuron] * size
    facts = pa.Table.from_pylist(rows)
    columns = {name: np.zeros(len(rows)) for name in synapses.POSITION}
    columns |= {"synapse_id": np.arange(len(rows)), "neuron_id": facts["neuron_id"]}
    columns |= {"neurotransmitter": facts["neurotransmitter"]}
    if cell_types:
        types = [f"T{n % 11}" for n in facts["neuron_id"].to_pylist()]
        columns |= {"cell_type": types}
    return synapses.conform(pa.table(columns), "made here")


def sizes(seed: int, count: int) -> list[int]:
    return (
        np.random.default_rng(seed).lognormal(3, 0.8, count).astype(int) + 1
    ).tolist()


@pytest.mark.long
def test_answer_depends_on_seed_and_not_on_row_order() -> None:
    table = neurons({"gaba": sizes(0, 40), "dopamine": sizes(1, 30)})
    split = splits.make(table, splits.Scheme("neuron"))
    assert split.objective == 0 and split.optimal
    order = np.random.default_rng(5).permutation(len(table))
    shuffled = splits.make(table.take(order), splits.Scheme("neuron"))
    assert shuffled.parts.tolist() == split.parts[order].tolist()
    again = splits.make(table, splits.Scheme("neuron"))
    assert again.parts.tolist() == split.parts.tolist()
    other = splits.make(table, splits.Scheme("neuron", seed=1))
    assert other.objective == 0 and other.parts.tolist() != split.parts.tolist()


def test_rows_that_take_no_part() -> None:
    table = neurons({"gaba": sizes(0, 30), "dopamine": sizes(1, 30)})
    known = table["neurotransmitter"].to_pylist()
    known[5], known[6] = None, "dopamine+gaba"
    ids = table["neuron_id"].to_pylist()
    ids[7] = None
    table = table.set_column(5, "neurotransmitter", [known])
    table = table.set_column(4, "neuron_id", [ids])
    split = splits.make(table, splits.Scheme("neuron", classes=["gaba"]))
    assert set(split.parts[[5, 6, 7]]) == {None}
    assert split.classes == ("gaba",)
    for label, part in zip(known, split.parts, strict=True):
        assert part is None or label == "gaba"
    assert sum(part is not None for part in split.parts) == split.counts.sum()


def test_impossible_classes_are_named_with_what_can_be_reached() -> None:
    # 90 of the 100 octopamine synapses belong to one neuron.
    table = neurons({"gaba": sizes(0, 40), "octopamine": [90, 5, 5]})
    with pytest.raises(splits.ImpossibleSplit) as error:
        splits.make(table, splits.Scheme("neuron"))
    said = str(error.value)
    assert "octopamine" in said and "gaba" not in said
    assert "0.90/0.05/0.05" in said and "--per_synapse_fallback" in said


def test_fall_back_keeps_three_disjoint_parts() -> None:
    """In the original (ingest.py), the validation set overwrote the test set."""
    table = neurons({"gaba": sizes(0, 40), "octopamine": [90, 5, 5]})
    split = splits.make(table, splits.Scheme("neuron", per_synapse_fallback=True))
    assert split.per_synapse == ("octopamine",)
    label = np.array(table["neurotransmitter"])
    counts = {
        p: int((split.parts[label == "octopamine"] == p).sum()) for p in synapses.PARTS
    }
    assert counts == {"train": 64, "validation": 16, "test": 20}
    of_gaba = dataclasses.replace(split, parts=split.parts[label == "gaba"])
    parts_of_groups(table.filter(label == "gaba"), of_gaba, "neuron_id")
    assert split.counts[0].tolist() == split.targets[0].tolist()
    order = np.random.default_rng(0).permutation(len(table))
    again = splits.make(
        table.take(order), splits.Scheme("neuron", per_synapse_fallback=True)
    )
    assert again.parts.tolist() == split.parts[order].tolist()


def test_hold_out() -> None:
    table = neurons({"gaba": sizes(0, 40)})
    ids = table["synapse_id"].to_numpy()[::9]
    held = np.isin(table["synapse_id"], ids)
    split = splits.make(table, splits.Scheme("neuron", hold_out=ids))
    assert set(split.parts[held]) == {None} and None not in set(split.parts[~held])
    inside = splits.make(
        table, splits.Scheme("neuron", hold_out=ids, hold_out_part="train")
    )
    assert set(inside.parts[held]) == {"train"}
    assert inside.parts[~held].tolist() == split.parts[~held].tolist()
    with pytest.raises(UserError, match="none of its synapses"):
        splits.make(table, splits.Scheme("neuron", hold_out=np.array([-1])))


@pytest.mark.parametrize("fractions", [(0.8, 0.2, 0.0), (1.0, 0.0, 0.0)])
def test_parts_of_fraction_zero_are_not_made(fractions: tuple[float, ...]) -> None:
    split = splits.make(
        neurons({"gaba": sizes(0, 40)}), splits.Scheme("neuron", fractions)
    )
    made = {p for p, f in zip(synapses.PARTS, fractions, strict=True) if f}
    assert set(split.parts) == made and split.objective == 0


def test_few_groups_go_to_train_then_test() -> None:
    two = splits.make(
        neurons({"gaba": [80, 20]}), splits.Scheme("neuron", (0.78, 0.02, 0.2))
    )
    assert set(two.parts) == {"train", "test"}
    one = splits.make(
        neurons({"gaba": [80]}), splits.Scheme("neuron", (0.96, 0.02, 0.02))
    )
    assert set(one.parts) == {"train"}


def test_balance_of_neurons() -> None:
    table = neurons({"gaba": sizes(0, 50), "dopamine": sizes(1, 25)})
    split = splits.make(table, splits.Scheme("neuron", balance="neurons"))
    assert split.counts.tolist() == [[32, 8, 10], [16, 4, 5]]
    assert split.objective == 0


@pytest.mark.long
def test_cell_types() -> None:
    table = neurons({"gaba": sizes(0, 60), "dopamine": sizes(1, 60)}, cell_types=True)
    own = splits.make(table, splits.Scheme("cell_type", (0.5, 0.25, 0.25)))
    parts_of_groups(table, own, "cell_type")
    shared = splits.make(table, splits.Scheme("neuron", shared_cell_types=True))
    found: dict[str, set] = {}
    for name, part in zip(table["cell_type"].to_pylist(), shared.parts, strict=True):
        found.setdefault(name, set()).add(part)
    assert all("train" in parts for parts in found.values())
    with pytest.raises(UserError, match="--shared_cell_types"):
        splits.make(table, splits.Scheme("cell_type", shared_cell_types=True))


def test_neurons_without_a_type_stay_whole_in_a_split_by_type() -> None:
    table = neurons({"gaba": sizes(0, 60)}, cell_types=True)
    types = [t if t != "T3" else None for t in table["cell_type"].to_pylist()]
    table = table.set_column(8, "cell_type", [pa.array(types, pa.string())])
    split = splits.make(table, splits.Scheme("cell_type", (0.5, 0.25, 0.25)))
    parts_of_groups(table, split, "neuron_id")
    assert None not in set(split.parts)


@pytest.mark.long
def test_published_hemilineages() -> None:
    """The published neurons, with invented synapses, are split with all six classes."""
    folder = shared_data("fafb_v3")
    skeletons = json.loads((folder / "skeletons_v3.json").read_text())
    rng = np.random.default_rng(0)
    rows = []
    for key, skeleton in skeletons.items():
        known = "+".join(skeleton["nt_known"] or [])
        size = int(np.clip(rng.lognormal(3.7, 1.1), 1, 2000))
        lineage = str(skeleton["hemi_lineage_id"])
        rows.append((int(key), known or None, lineage, size))
    repeat = np.repeat(np.arange(len(rows)), [row[3] for row in rows])
    columns = {name: np.zeros(len(repeat)) for name in synapses.POSITION}
    columns |= {"synapse_id": np.arange(len(repeat))}
    names = ("neuron_id", "neurotransmitter", "hemilineage")
    for at, name in enumerate(names):
        columns[name] = pa.array([row[at] for row in rows]).take(pa.array(repeat))
    table = synapses.conform(pa.table(columns), "made here")
    split = splits.make(table, splits.Scheme("neuron", per_synapse_fallback=True))
    parts = {row[0]: set() for row in rows}
    for neuron, label, part in zip(
        table["neuron_id"].to_pylist(),
        table["neurotransmitter"].to_pylist(),
        split.parts,
        strict=True,
    ):
        if label in split.per_synapse:
            continue
        parts[neuron].add(part)
        assert (part is None) == (label is None or "+" in label)
    assert all(len(found) <= 1 for found in parts.values())
    share = split.counts / split.counts.sum(axis=1, keepdims=True)
    assert np.abs(share - FRACTIONS).max() <= 0.05 + 1e-9
    common = [split.classes.index(n) for n in ("gaba", "acetylcholine", "dopamine")]
    assert np.abs(share[common] - FRACTIONS).max() < 0.001


@pytest.mark.long
def test_male_vnc() -> None:
    folder = shared_data("malevnc_tbars")
    paths = [folder / f"{n}.csv.gz" for n in ("acetylcholine", "gaba", "glutamate")]
    table = importing.read(paths, dialects.DIALECTS["malevnc"]).table
    split = splits.make(table, splits.Scheme("neuron"))
    assert split.objective == 0 and split.optimal
    share = split.counts / split.counts.sum(axis=1, keepdims=True)
    assert np.abs(share - FRACTIONS).max() < 0.001
    # Many splits are equally good. The chosen split also divides the neurons by the
    # wanted fractions.
    parts = parts_of_groups(table, split, "neuron_id")
    for part, fraction in zip(synapses.PARTS, FRACTIONS, strict=True):
        share = list(parts.values()).count(part) / len(parts)
        assert abs(share - fraction) < 0.04


@pytest.mark.long
def test_shared_cell_types_equal_brute_force() -> None:
    rng = np.random.default_rng(2)
    possible = 0
    for _ in range(25):
        many = rng.integers(1, 9, int(rng.integers(4, 8))).tolist()
        types = rng.integers(0, 3, len(many)).tolist()
        table = neurons({"gaba": many})
        of_row = np.repeat([f"T{t}" for t in types], many)
        at = table.column_names.index("cell_type")
        table = table.set_column(at, "cell_type", [pa.array(of_row)])
        wanted = targets(sum(many), FRACTIONS)
        best = None
        for parts in itertools.product(range(3), repeat=len(many)):
            known = {t for t, part in zip(types, parts, strict=True) if part == 0}
            held = np.bincount(parts, many, minlength=3)
            off = np.abs(held / sum(many) - FRACTIONS).max()
            if known < set(types) or set(parts) != {0, 1, 2} or off > 0.05 + 1e-9:
                continue
            objective = (np.abs(held - wanted) / np.maximum(wanted, 1)).sum()
            best = objective if best is None else min(best, objective)
        if best is None:
            with pytest.raises(splits.ImpossibleSplit):
                splits.make(table, splits.Scheme("neuron", shared_cell_types=True))
            continue
        split = splits.make(table, splits.Scheme("neuron", shared_cell_types=True))
        assert split.objective == pytest.approx(best, abs=1e-9) and split.optimal
        possible += 1
    assert possible > 5
