# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import sql
from synister_jax.base.errors import UserError
from synister_jax.evaluation import vote_tallies
from synister_jax.tables import predictions
from synister_jax.tables.synapses import GROUP_COLUMNS
from tests.helpers.prediction_tables import drawn, table_of
from tests.helpers.small_data import CLASSES


def pieces(table: pa.Table, rows: int) -> list[pa.Table]:
    return [table.slice(first, rows) for first in range(0, max(len(table), 1), rows)]


@pytest.mark.parametrize("by", GROUP_COLUMNS)
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_sums_are_those_of_a_plain_loop(by: str, rows: int) -> None:
    table = drawn(500)
    tally = vote_tallies.count(pieces(table, rows), CLASSES, by)
    values = predictions.probabilities(table).astype(np.float64)
    called = predictions.called(table)
    lines = table.to_pylist()
    names = {line[GROUP_COLUMNS[by]] for line in lines} - {None}
    assert tally.groups[GROUP_COLUMNS[by]].to_pylist() == sorted(names)
    for place, group in enumerate(tally.groups.to_pylist()):
        own = [
            i
            for i, line in enumerate(lines)
            if line[GROUP_COLUMNS[by]] == group[GROUP_COLUMNS[by]]
        ]
        seen = [i for i in own if called[i] >= 0]
        assert (group["synapses"], group["predicted"]) == (len(own), len(seen))
        neurons = {lines[i]["neuron_id"] for i in own} - {None}
        assert group["neurons"] == len(neurons)
        only = ["neurotransmitter", *(["cell_type"] if by == "neuron" else [])]
        for name in only:
            known = {lines[i][name] for i in own} - {None}
            assert group[name] == (known.pop() if len(known) == 1 else None)
        for label in range(len(CLASSES)):
            votes = [i for i in seen if called[i] == label]
            assert tally.counts[place, label] == len(votes)
            top = sum(values[i].max() for i in votes)
            assert tally.top[place, label] == pytest.approx(top)
            mean = np.mean([values[i, label] for i in seen])
            assert tally.mean[place, label] == pytest.approx(mean)
            weights = [lines[i]["cleft_score"] or 0.0 for i in seen]
            weighted = np.average([values[i, label] for i in seen], weights=weights)
            assert tally.weighted[place, label] == pytest.approx(weighted)


def test_float_sums_are_the_same_bytes_every_time(tmp_path: pathlib.Path) -> None:
    table = drawn(60_000, neurons=3_000)
    first, second = (
        vote_tallies.count(pieces(table, 4096), CLASSES, "neuron", tmp_path)
        for _ in range(2)
    )
    assert first.groups.equals(second.groups)
    for name in ("mean", "top", "weighted"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.tobytes() == b.tobytes()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_more_groups_than_fit_in_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "MEMORY", "60MB")
    table = drawn(150_000, neurons=100_000)
    tally = vote_tallies.count(pieces(table, 8192), CLASSES, "neuron", tmp_path)
    assert tally.groups["synapses"].to_numpy().sum() == len(
        table["neuron_id"].drop_null()
    )
    monkeypatch.undo()
    whole = vote_tallies.count([table], CLASSES, "neuron")
    assert whole.groups.equals(tally.groups)
    np.testing.assert_array_equal(whole.counts, tally.counts)
    np.testing.assert_allclose(whole.mean, tally.mean)


def test_rows_that_are_not_sure_do_not_vote() -> None:
    table = table_of(
        [[0.9, 0.05, 0.05], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1]],
        {"neuron_id": [1, 1, 1]},
    )
    tally = vote_tallies.count([table], CLASSES, "neuron", min_probability=0.8)
    assert tally.counts.tolist() == [[1, 1, 0]]  # 0.8 itself is enough
    assert tally.groups["synapses"].to_pylist() == [3]
    assert tally.predicted.tolist() == [2]
    np.testing.assert_allclose(tally.mean, [[0.5, 0.425, 0.075]])


def test_nothing_predicted_nothing_weighed_no_groups() -> None:
    nothing = [[np.nan] * 3] * 2
    table = table_of(
        [*nothing, [1, 0, 0]], {"neuron_id": [1, 1, 2], "cleft_score": [5, 5, 0]}
    )
    tally = vote_tallies.count([table], CLASSES, "neuron")
    assert np.isnan(tally.mean[0]).all() and tally.predicted.tolist() == [0, 1]
    assert np.isnan(tally.weighted).all()  # 1: no prediction; 2: no weight
    assert vote_tallies.count([table], CLASSES, "hemilineage").groups.num_rows == 0
    empty = vote_tallies.count([table.slice(0, 0)], CLASSES, "neuron")
    assert empty.counts.shape == (0, 3)
    without = vote_tallies.count([table.drop_columns("cleft_score")], CLASSES, "neuron")
    assert without.weighted is None


def test_a_negative_weight_is_refused() -> None:
    table = table_of([[1, 0, 0]], {"neuron_id": [1], "cleft_score": [-1]})
    with pytest.raises(UserError, match="cleft_score is -1.0 in a row"):
        vote_tallies.count([table], CLASSES, "neuron")


@pytest.mark.parametrize("by", GROUP_COLUMNS)
def test_only_what_is_needed_is_read(by: str) -> None:
    table = drawn(50)
    names = vote_tallies.columns_needed(table.column_names, CLASSES, by)
    assert "x_nm" not in names and "synapse_id" not in names
    few = vote_tallies.count([table.select(names)], CLASSES, by)
    assert few.groups.equals(vote_tallies.count([table], CLASSES, by).groups)


def test_calls_of_neurons_within_hemilineages() -> None:
    gaba, ach = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    table = table_of(
        [gaba, gaba, ach, ach, ach, gaba, [np.nan] * 3, gaba],
        {
            "neuron_id": [1, 1, 1, 2, 3, 3, 4, 5],
            "hemilineage": ["B", "B", "B", "B", "A", "A", "B", None],
        },
    )
    neurons = vote_tallies.count([table], CLASSES, "neuron")
    names, counts = vote_tallies.calls_of_neurons(neurons, "hemilineage")
    assert names.to_pylist() == ["A", "B"]
    # Neuron 3 has a tie, which gaba wins. Neuron 4 has no prediction.
    assert counts.tolist() == [[1, 0, 0], [1, 1, 0]]
    _, large = vote_tallies.calls_of_neurons(neurons, "hemilineage", least=3)
    assert large.tolist() == [[0, 0, 0], [1, 0, 0]]
    names, counts = vote_tallies.calls_of_neurons(neurons, "cell_type")
    assert len(names) == len(counts) == 0
