# SPDX-License-Identifier: Apache-2.0
import gzip
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax import aggregate
from synister_jax.evaluation import calls
from synister_jax.export import Options
from synister_jax.tables.predictions import Predictions
from tests.helpers import prediction_tables
from tests.helpers.prediction_tables import (
    CALLS,
    NEURON,
    NEURONS,
    SIX,
    VOXEL,
    columns_of,
    confusion,
    export_to,
    probabilities,
    read_csv,
)


def test_flyem_bodies(tmp_path: pathlib.Path) -> None:
    sizes = {NEURON: 60, NEURON + 1: 60, NEURON + 2: 49, NEURON + 3: 55, NEURON + 4: 3}
    types = {NEURON: "T", NEURON + 1: "T", NEURON + 3: "U"}
    neurons = [neuron for neuron, n in sizes.items() for _ in range(n)]
    calls: list[str | None] = ["gaba"] * 40 + ["glutamate"] * 20  # NEURON
    calls += ["gaba"] * 25 + ["glutamate"] * 35  # of the same type
    calls += ["gaba"] * 49  # too few
    calls += ["dopamine"] * 55  # one neuron of its type
    calls += [None] * 3
    table = prediction_tables.make(
        neurons,
        calls,
        cell_type=pa.array([types.get(n) for n in neurons]),
        neurotransmitter=pa.array(
            ["glutamate" if n == NEURON + 2 else None for n in neurons]
        ),
    )
    options = Options((40, 4, 4), confusion(tmp_path))
    output, _ = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "body-neurotransmitters.feather")
    assert columns_of(made) == {
        "body": "int64",
        "cell_type": "string",
        "total_nt_predictions": "int32",
        "predicted_nt_confidence": "double",
        "predicted_nt": "string",
        "ground_truth": "string",
        "celltype_total_nt_predictions": "int32",
        "celltype_predicted_nt": "string",
        "celltype_predicted_nt_confidence": "double",
        "consensus_nt": "string",
    }
    assert made["body"].to_pylist() == list(sizes)
    assert made["total_nt_predictions"].to_pylist() == [60, 60, 49, 55, 0]
    # P(called | gaba) is 1 for gaba; of others .9 when right and .1 for gaba.
    expected = [40 / 60, (35 * 0.9 + 25 * 0.1) / 60, 1, 0.9, 0]
    confidence = made["predicted_nt_confidence"].to_numpy()
    np.testing.assert_allclose(confidence, expected, rtol=1e-12)
    called = ["gaba", "glutamate", "unclear", "dopamine", "unclear"]
    assert made["predicted_nt"].to_pylist() == called
    in_types = made["celltype_predicted_nt"].to_pylist()
    assert in_types == ["gaba", "gaba", None, "dopamine", None]
    totals = made["celltype_total_nt_predictions"].to_pylist()
    assert totals == [120, 120, 0, 55, 0]
    consensus = ["gaba", "gaba", "glutamate", "unclear", None]
    assert made["consensus_nt"].to_pylist() == consensus
    assert made["ground_truth"].to_pylist() == [None, None, "glutamate", None, None]
    rows = read_csv(output / "neurotransmitter-confusion.csv")
    assert list(rows[0]) == ["ground_truth", *SIX]
    assert [float(row["gaba"]) for row in rows] == [1, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert float(rows[1]["acetylcholine"]) == 0.9


def test_flyem_truth(tmp_path: pathlib.Path) -> None:
    """By neuron: its type, its call, its known transmitter, truth and consensus."""
    neurons: list[tuple[str | None, str, str | None, str | None, str | None]] = [
        # Of one type, whose only known transmitter is the other neuron's as well.
        ("T", "gaba", None, "dopamine", "dopamine"),
        ("T", "gaba", "dopamine", "dopamine", "dopamine"),
        # Two known ones in a type: each neuron has its own.
        ("U", "gaba", "gaba", "gaba", "gaba"),
        ("U", "gaba", "glutamate", "glutamate", "glutamate"),
        # Several of one neuron are none.
        ("V", "glutamate", "gaba+octopamine", None, "glutamate"),
        (None, "glutamate", "gaba+octopamine", None, None),
        # These three need an experiment.
        ("W", "serotonin", None, None, "unclear"),
        ("X", "octopamine", None, None, "unclear"),
        ("Y", "dopamine", None, None, "unclear"),
        ("Z", "serotonin", "serotonin", "serotonin", "serotonin"),
    ]
    of_row = np.repeat(np.arange(len(neurons)), 60)
    types, calls, known, truth, consensus = zip(*neurons, strict=True)
    table = prediction_tables.make(
        [NEURON + int(n) for n in of_row],
        [calls[n] for n in of_row],
        cell_type=pa.array([types[n] for n in of_row]),
        neurotransmitter=pa.array([known[n] for n in of_row]),
    )
    options = Options((40, 4, 4), confusion(tmp_path))
    output, _ = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "body-neurotransmitters.feather")
    assert made["ground_truth"].to_pylist() == list(truth)
    assert made["consensus_nt"].to_pylist() == list(consensus)


def test_the_truth_of_the_type_comes_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ only where a neuron's synapses name several types, or none."""
    neuron = prediction_tables.make([NEURON] * 60, ["gaba"] * 60)
    by = calls.of_groups

    def known(source: Predictions, what: str, *others: object) -> pa.Table:
        found = by(source, what, *others)
        name = {"neuron": "glutamate", "cell_type": "dopamine"}[what]
        column = pa.array([name] * len(found))
        place = found.column_names.index("neurotransmitter")
        return found.set_column(place, "neurotransmitter", column)

    monkeypatch.setattr(aggregate, "by", known)
    typed = neuron.set_column(
        neuron.column_names.index("cell_type"), "cell_type", pa.array(["T"] * 60)
    )
    options = Options((40, 4, 4), confusion(tmp_path))
    for folder, table, expected in (
        ("1", neuron, "glutamate"),
        ("2", typed, "dopamine"),
    ):
        (tmp_path / folder).mkdir()
        output, _ = export_to(tmp_path / folder, "flyem", table, options)
        made = feather.read_table(output / "body-neurotransmitters.feather")
        assert made["ground_truth"].to_pylist() == [expected]
        assert made["consensus_nt"].to_pylist() == [expected]


def test_codex(tmp_path: pathlib.Path) -> None:
    neurons = [NEURON] * 5 + [NEURON + 1] * 4 + [NEURON + 2]
    table = prediction_tables.make(neurons, [*CALLS[:-1], None])
    output, _ = export_to(tmp_path, "codex", table)
    content = (output / "neurons.csv.gz").read_bytes()
    assert gzip.decompress(content).decode().splitlines()[0] == (
        "root_id,group,nt_type,nt_type_score,"
        "da_avg,ser_avg,gaba_avg,glut_avg,ach_avg,oct_avg"
    )
    first, second, third = read_csv(output / "neurons.csv.gz")
    assert first["root_id"] == str(NEURON)
    assert [r["nt_type"] for r in (first, second, third)] == ["GABA", "SER", ""]
    dopamine = probabilities(table, "dopamine")
    assert float(first["da_avg"]) == np.nanmean(dopamine[:5])
    assert float(second["da_avg"]) == np.mean(dopamine[5:9])
    assert first["nt_type_score"] == first["gaba_avg"]
    assert set(third.values()) == {str(NEURON + 2), ""}
    assert content[:2] == b"\x1f\x8b" and content[4:8] == bytes(4)  # no time


def test_codex_without_a_class(tmp_path: pathlib.Path) -> None:
    calls = ["gaba", "acetylcholine", None]
    neurons = [NEURON, NEURON, NEURON + 1]
    table = prediction_tables.make(neurons, calls, ("gaba", "acetylcholine"))
    output, _ = export_to(tmp_path, "codex", table)
    known, unknown = read_csv(output / "neurons.csv.gz")
    assert float(known["oct_avg"]) == 0
    assert unknown["oct_avg"] == ""


def test_neuprint_as_the_male_vnc(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make(NEURONS, CALLS)
    output, _ = export_to(tmp_path, "neuprint", table, VOXEL)
    first, second = read_csv(output / "Neuprint_Neurons.csv")
    assert first["predictedNt:string"] == "gaba"
    assert first["predictedNtProb:float"] == first["ntGabaProb:float"]
    assert second["predictedNt:string"] == "serotonin"
    assert len(first) == 4 + len(SIX)
