# SPDX-License-Identifier: Apache-2.0
"""Checks each rule on groups that are small enough to compute by hand."""

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base.errors import UserError
from synister_jax.evaluation import group_calls, vote_tallies, voting_rules
from synister_jax.evaluation.confusions import Confusion
from tests.helpers.prediction_tables import table_of
from tests.helpers.small_data import CLASSES

# The classes are gaba, acetylcholine and dopamine. Each row is a true class.
CONFUSION = Confusion("test", CLASSES, np.array([[8.0, 2, 0], [1, 9, 0], [0, 5, 5]]))


def tally_of(
    probabilities: list[list[float]], by: str = "neuron", **columns: list
) -> vote_tallies.Tally:
    columns = {"neuron_id": [1] * len(probabilities)} | columns
    return vote_tallies.count([table_of(probabilities, columns)], CLASSES, by)


def called(tally: vote_tallies.Tally, rule: str) -> dict:
    [row] = group_calls.call(tally, rule, CONFUSION).to_pylist()
    assert row["rule"] == rule
    return row


GABA, ACH, DA = [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.0, 0.2, 0.8]


def test_majority_takes_the_first_of_equal_classes() -> None:
    row = called(tally_of([DA, ACH]), "majority")
    assert row["predicted_neurotransmitter"] == "acetylcholine"
    assert (row["score"], row["margin"], row["entropy"]) == (0.5, 0.0, 1.0)
    row = called(tally_of([DA, ACH, DA]), "majority")
    assert row["predicted_neurotransmitter"] == "dopamine"
    assert row["score"] == pytest.approx(2 / 3)
    assert row["margin"] == pytest.approx(1 / 3)
    assert [row[f"count_{name}"] for name in CLASSES] == [0, 1, 2]


def test_mean_probability() -> None:
    row = called(tally_of([GABA, GABA, DA]), "mean_probability")
    assert row["predicted_neurotransmitter"] == "gaba"
    assert row["score"] == row["mean_gaba_prob"] == pytest.approx(0.4)
    assert row["margin"] == pytest.approx(0.4 - 1 / 3)
    p = np.array([1.2, 0.8, 1.0]) / 3
    assert row["entropy"] == pytest.approx(-(p * np.log2(p)).sum())


def test_cleft_scores_weigh() -> None:
    tally = tally_of([GABA, GABA, DA], cleft_score=[1, 1, 8])
    row = called(tally, "cleft_weighted")
    assert row["predicted_neurotransmitter"] == "dopamine"
    assert row["score"] == pytest.approx((0.1 + 0.1 + 6.4) / 10)
    assert row["mean_gaba_prob"] == pytest.approx(0.4)  # still the plain mean


def test_weights_that_sum_to_zero_give_no_call() -> None:
    row = called(tally_of([GABA, DA], cleft_score=[0, None]), "cleft_weighted")
    for name in ("predicted_neurotransmitter", "score", "margin", "entropy"):
        assert row[name] is None
    assert row["predicted"] == 2
    with pytest.raises(UserError, match="needs the column cleft_score"):
        called(tally_of([GABA]), "cleft_weighted")


def test_flyem_confidence_and_thresholds() -> None:
    """The confidence is (30 · P(ach called ach) + 20 · P(ach called gaba)) / 50."""
    row = called(tally_of([ACH] * 30 + [GABA] * 20), "flyem")
    assert row["predicted_neurotransmitter"] == "acetylcholine"
    assert row["score"] == pytest.approx((30 * 0.9 + 20 * 0.1) / 50)
    assert row["margin"] == pytest.approx(0.2)
    few = called(tally_of([ACH] * 30 + [GABA] * 19), "flyem")
    assert few["predicted_neurotransmitter"] == "unclear" and few["score"] > 0.5
    # Dopamine is called dopamine only half the time, so the confidence of
    # (27·0.5 + 25·0) / 52 is too low.
    unsure = called(tally_of([DA] * 27 + [GABA] * 25), "flyem")
    assert unsure["predicted_neurotransmitter"] == "unclear"
    assert unsure["score"] == pytest.approx(27 * 0.5 / 52)


def test_flyem_ties_go_by_the_name() -> None:
    row = called(tally_of([GABA] * 30 + [ACH] * 30), "flyem")
    assert row["score"] == pytest.approx((0.9 + 0.1) / 2)  # of acetylcholine
    assert called(tally_of([GABA, ACH]), "majority")["score"] == 0.5


@pytest.mark.parametrize(
    ("synapses", "neurons", "call"),
    [(99, 2, "unclear"), (100, 2, "gaba"), (50, 1, "gaba"), (49, 1, "unclear")],
)
def test_flyem_types_of_several_cells_need_more(
    synapses: int, neurons: int, call: str
) -> None:
    tally = tally_of(
        [GABA] * synapses,
        by="cell_type",
        cell_type=["T"] * synapses,
        neuron_id=[n % neurons for n in range(synapses)],
    )
    assert called(tally, "flyem")["predicted_neurotransmitter"] == call


def test_conf_nt_asks_what_a_call_is_worth() -> None:
    """The score weighs each call with P(true | called).

    Of 16 synapses that are called acetylcholine, 9 are acetylcholine and 5 are
    dopamine. All synapses that are called dopamine are dopamine.
    """
    row = called(tally_of([ACH, ACH, DA]), "conf_nt")
    worth = {
        "gaba": 2 * 2 / 16 / 3,
        "acetylcholine": 2 * 9 / 16 / 3,
        "dopamine": (2 * 5 / 16 + 1) / 3,
    }
    assert row["predicted_neurotransmitter"] == "dopamine"
    assert row["score"] == pytest.approx(worth["dopamine"])
    assert row["margin"] == pytest.approx(worth["dopamine"] - worth["acetylcholine"])
    assert called(tally_of([ACH, ACH, DA]), "majority")["score"] == pytest.approx(2 / 3)


def test_banc_adds_the_highest_probabilities() -> None:
    unsure = [0.34, 0.33, 0.33]
    row = called(tally_of([unsure, unsure, DA]), "banc")
    assert row["predicted_neurotransmitter"] == "dopamine"
    assert row["score"] == pytest.approx(0.8 / (0.8 + 0.68), rel=1e-6)


@pytest.mark.parametrize("rule", voting_rules.RULES)
def test_nothing_predicted_is_no_class(rule: str) -> None:
    nothing = [[np.nan] * 3] * 60
    row = called(tally_of(nothing, cleft_score=[1] * 60), rule)
    for name in ("predicted_neurotransmitter", "score", "margin", "entropy"):
        assert row[name] is None
    assert (row["synapses"], row["predicted"]) == (60, 0)


@pytest.mark.parametrize("rule", voting_rules.RULES)
def test_one_synapse_and_no_group(rule: str) -> None:
    tally = tally_of([ACH], cleft_score=[3])
    call = called(tally, rule)["predicted_neurotransmitter"]
    assert call == ("unclear" if rule == "flyem" else "acetylcholine")
    table = table_of([ACH], {"neuron_id": [None], "cleft_score": [3]})
    nobody = vote_tallies.count([table], CLASSES, "neuron")
    assert len(group_calls.call(nobody, rule, CONFUSION)) == 0


@pytest.mark.parametrize("rule", ["flyem", "conf_nt"])
def test_rules_that_need_a_confusion_say_so(rule: str) -> None:
    with pytest.raises(UserError, match=f"the rule {rule} needs the network's conf"):
        group_calls.call(tally_of([GABA]), rule)
    other = Confusion("c.csv", ("gaba", "acetylcholine", "histamine"), np.eye(3))
    with pytest.raises(UserError, match="c.csv has the classes gaba, .* but the"):
        group_calls.call(tally_of([GABA]), rule, other)


@pytest.mark.parametrize("rule", ["flyem", "conf_nt"])
def test_the_order_of_the_confusions_classes_does_not_matter(rule: str) -> None:
    order = [2, 0, 1]
    turned = Confusion(
        "turned",
        tuple(CLASSES[i] for i in order),
        CONFUSION.counts[np.ix_(order, order)],
    )
    tally = tally_of([ACH] * 30 + [DA] * 25)
    a, b = (group_calls.call(tally, rule, c) for c in (CONFUSION, turned))
    assert a.equals(b)


def test_a_class_that_was_never_seen_gives_no_confidence() -> None:
    unseen = Confusion("u", CLASSES, np.array([[8.0, 2, 0], [0, 0, 0], [0, 5, 5]]))
    [row] = group_calls.call(tally_of([ACH] * 60), "flyem", unseen).to_pylist()
    assert row["predicted_neurotransmitter"] == "unclear" and row["score"] is None


def test_columns_keep_clear_of_readers_of_probabilities() -> None:
    table = group_calls.call(tally_of([GABA]), "majority")
    assert not [name for name in table.column_names if name.startswith("nt")]
    assert table.schema.field("neuron_id").type == pa.int64()


def test_majority_vote() -> None:
    table = table_of(
        [
            [0.1, 0.8, 0.1],
            [0.7, 0.2, 0.1],
            [0.1, 0.2, 0.7],
            [np.nan] * 3,
            [np.nan] * 3,
            [1, 0, 0],
        ],
        {
            "neurotransmitter": ["gaba", "gaba", "dopamine", "dopamine", None, "gaba"],
            "neuron_id": [720575940612345678, 720575940612345678, 9, 9, 5, None],
        },
    )
    tally = vote_tallies.count([table], CLASSES, "neuron")
    neurons = group_calls.call(tally, "majority").to_pylist()
    assert [n["neuron_id"] for n in neurons] == [5, 9, 720575940612345678]
    unpredicted, nine, big = neurons
    assert unpredicted["predicted_neurotransmitter"] is None
    assert unpredicted["score"] is None and unpredicted["synapses"] == 1
    assert (nine["synapses"], nine["predicted"]) == (2, 1)
    assert nine["predicted_neurotransmitter"] == nine["neurotransmitter"] == "dopamine"
    assert nine["score"] == 1
    assert big["predicted_neurotransmitter"] == "gaba"  # 1 : 1; the first class wins
    assert (big["count_gaba"], big["count_acetylcholine"]) == (1, 1)
    assert big["score"] == 0.5 and big["rule"] == "majority"


def test_a_call_that_was_never_seen_is_worth_nothing() -> None:
    never = Confusion("n", CLASSES, np.array([[9.0, 1, 0], [1, 9, 0], [5, 5, 0]]))
    [row] = group_calls.call(tally_of([DA, DA]), "conf_nt", never).to_pylist()
    assert row["predicted_neurotransmitter"] is row["score"] is None
    [row] = group_calls.call(tally_of([DA, ACH]), "conf_nt", never).to_pylist()
    assert row["predicted_neurotransmitter"] == "acetylcholine"
    assert row["score"] == pytest.approx(9 / 15 / 2)


def test_columns_in_place_of_rows_are_refused() -> None:
    columns = CONFUSION.counts / CONFUSION.counts.sum(axis=0)
    published = Confusion("p.csv", CLASSES, columns)
    with pytest.raises(UserError, match="p.csv: the row of .* rows must be P.called"):
        group_calls.call(tally_of([ACH]), "flyem", published)
    rows = Confusion("r.csv", CLASSES, CONFUSION.by_row())
    tally = tally_of([ACH] * 60)
    assert group_calls.call(tally, "flyem", rows).equals(
        group_calls.call(tally, "flyem", CONFUSION)
    )


def test_flyem_types_are_not_judged_by_confidence() -> None:
    calls = [DA] * 60 + [GABA] * 50
    cells = {"cell_type": ["T"] * 110, "neuron_id": [1, 2] * 55}
    row = called(tally_of(calls, by="cell_type", **cells), "flyem")
    assert row["predicted_neurotransmitter"] == "dopamine" and row["score"] < 0.5
    assert called(tally_of(calls), "flyem")["predicted_neurotransmitter"] == "unclear"


def test_types_without_neurons_are_not_one_neuron() -> None:
    tally = tally_of(
        [GABA] * 60, by="cell_type", cell_type=["T"] * 60, neuron_id=[None] * 60
    )
    assert called(tally, "flyem")["predicted_neurotransmitter"] == "unclear"


def test_one_class_leads_by_all() -> None:
    table = table_of([[1.0], [1.0]], {"neuron_id": [1, 1]}, classes=("gaba",))
    tally = vote_tallies.count([table], ("gaba",), "neuron")
    [row] = group_calls.call(tally, "majority").to_pylist()
    assert (row["score"], row["margin"], row["entropy"]) == (1, 1, 0)
