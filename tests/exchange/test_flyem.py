# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from synister_jax.evaluation import group_calls
from synister_jax.exchange import published
from synister_jax.exchange.export_files import ExportOptions
from synister_jax.tables import predictions
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


def test_flyem_synapses(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make(
        NEURONS,
        CALLS,
        brain_region=pa.array(["MB", "AL"] * 4 + [None, "AL"]),
        split_skeleton=pa.array(["train", "test", "validation", None, "test"] * 2),
        cleft_score=pa.array(np.arange(10) / 16, pa.float32()),
    )
    options = ExportOptions((40, 4, 4), confusion(tmp_path))
    output, notes = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    category = "dictionary<values=string, indices=int32, ordered=0>"
    assert columns_of(made) == {
        "point_id": "uint64",
        **dict.fromkeys("xyz", "int32"),
        "conf": "float",
        "sv": "int64",
        "body": "int64",
        "roi": category,
        **{f"nt_{name}_prob": "float" for name in SIX},
        "split": category,
    }
    index = np.arange(10)
    assert made["point_id"].to_pylist() == [
        i << 42 | 2 * i << 21 | 3 * i for i in index
    ]
    assert made["z"].to_pylist() == index.tolist()
    assert made["x"].to_pylist() == (3 * index).tolist()
    assert made["body"].to_pylist() == [*NEURONS[:-1], 0]
    assert made["roi"].to_pylist() == ["MB", "AL"] * 4 + ["<unspecified>", "AL"]
    assert made["split"].to_pylist() == table["split_skeleton"].to_pylist()
    assert made["conf"].to_pylist() == table["cleft_score"].to_pylist()
    for name in SIX:
        given = probabilities(table, name)
        np.testing.assert_array_equal(made[f"nt_{name}_prob"].to_numpy(), given)
    assert made["sv"].null_count == 10
    assert notes == []
    assert predictions.about(made)["volume"] == "raw.n5"


def test_flyem_calls_neither_unknown(tmp_path: pathlib.Path) -> None:
    classes = ("gaba", "neither")
    table = prediction_tables.make([NEURON] * 60, ["neither"] * 60, classes)
    options = ExportOptions((40, 4, 4), confusion(tmp_path, classes))
    output, _ = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    np.testing.assert_array_equal(
        made["nt_unknown_prob"].to_numpy(), probabilities(table, "neither")
    )
    assert "nt_neither_prob" not in made.column_names
    assert made["split"].null_count == 60  # the table has no splits
    bodies = feather.read_table(output / "body-neurotransmitters.feather")
    assert bodies["predicted_nt"].to_pylist() == ["unknown"]


def test_rows_without_a_point_are_kept_apart(tmp_path: pathlib.Path) -> None:
    z_nm = np.arange(10) * 40.0
    z_nm[2] = np.nan
    z_nm[8] = 40.0 * 2**21
    table = prediction_tables.make(NEURONS, CALLS, z_nm=z_nm)
    options = ExportOptions((40, 4, 4), confusion(tmp_path))
    output, notes = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    assert made["z"].to_pylist() == [0, 1, 3, 4, 5, 6, 7, 9]
    left_out = predictions.load(output / "left-out.feather")
    # The tables are compared as text, because NaN equals NaN in text.
    assert str(left_out.to_pydict()) == str(table.take([2, 8]).to_pydict())
    assert len(notes) == 1 and "beyond 21 bits): 2; these rows are in" in notes[0]
    # The table of bodies also counts the rows that were left out.
    bodies = feather.read_table(output / "body-neurotransmitters.feather")
    assert sum(bodies["total_nt_predictions"].to_pylist()) == 8

    good = prediction_tables.make(NEURONS, CALLS)
    (tmp_path / "good").mkdir()
    output, notes = export_to(tmp_path / "good", "flyem", good, options)
    assert notes == []
    assert not (output / "left-out.feather").exists()


def test_voxels_are_rounded_half_to_even(tmp_path: pathlib.Path) -> None:
    """Odd voxel sizes are rounded too. The offset of the volume plays no role."""
    # In voxels of 40 nm: 0.475, 0.5, 1.5, 1.525, 2.5, 3.475.
    z_nm = [19.0, 20.0, 60.0, 61.0, 100.0, 139.0]
    # In voxels of 7 nm, the fractions are below, at and above 0.5.
    y_nm = [3.0, 3.5, 4.0, 10.5, 24.5, 25.0]
    table = prediction_tables.make(
        [NEURON] * 6, ["gaba"] * 6, z_nm=z_nm, y_nm=y_nm, x_nm=[0.0, 1, 2, 3, 4, 5]
    )
    options = ExportOptions((40, 7, 3), predict=3)
    output, _ = export_to(tmp_path, "synister", table, options)
    made = feather.read_table(output / "synapses.feather")
    assert made["z"].to_pylist() == [0, 0, 2, 2, 2, 3]
    assert made["y"].to_pylist() == [0, 0, 1, 2, 4, 4]
    assert made["x"].to_pylist() == [0, 0, 1, 1, 1, 2]


def test_shared_points_are_told(tmp_path: pathlib.Path) -> None:
    same = {name: np.array([0.0] * 2 + [8.0] * 3 + [16.0] * 5) for name in ("x_nm",)}
    same |= {"y_nm": np.zeros(10), "z_nm": np.zeros(10)}
    table = prediction_tables.make(NEURONS, CALLS, **same)
    _, notes = export_to(tmp_path, "neuprint", table, VOXEL)
    assert len(notes) == 1 and notes[0].startswith("points with several rows: 3;")


def test_splits_to_choose_from(tmp_path: pathlib.Path) -> None:
    parts = {f"split_{name}": pa.array(["train", "test"]) for name in "ab"}
    table = prediction_tables.make([NEURON] * 2, ["gaba"] * 2, **parts)
    options = ExportOptions((40, 4, 4), confusion(tmp_path))
    with pytest.raises(UserError, match=r"splits \(a, b\): .* with --split"):
        export_to(tmp_path, "flyem", table, options)
    wrong = ExportOptions((40, 4, 4), options.confusion, "c")
    with pytest.raises(UserError, match="--split=c: .* its splits are: a, b"):
        export_to(tmp_path, "flyem", table, wrong)
    chosen = ExportOptions((40, 4, 4), options.confusion, "b")
    output, _ = export_to(tmp_path, "flyem", table, chosen)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    assert made["split"].to_pylist() == ["train", "test"]


def test_flyem_bodies(tmp_path: pathlib.Path) -> None:
    sizes = {NEURON: 60, NEURON + 1: 60, NEURON + 2: 49, NEURON + 3: 55, NEURON + 4: 3}
    types = {NEURON: "T", NEURON + 1: "T", NEURON + 3: "U"}
    neurons = [neuron for neuron, n in sizes.items() for _ in range(n)]
    calls: list[str | None] = ["gaba"] * 40 + ["glutamate"] * 20  # NEURON
    calls += ["gaba"] * 25 + ["glutamate"] * 35  # NEURON + 1, of the same type
    calls += ["gaba"] * 49  # too few synapses
    calls += ["dopamine"] * 55  # the only neuron of its type
    calls += [None] * 3
    table = prediction_tables.make(
        neurons,
        calls,
        cell_type=pa.array([types.get(n) for n in neurons]),
        neurotransmitter=pa.array(
            ["glutamate" if n == NEURON + 2 else None for n in neurons]
        ),
    )
    options = ExportOptions((40, 4, 4), confusion(tmp_path))
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
    # All gaba synapses are called gaba. Of every other class, 0.9 are called right and
    # 0.1 are called gaba.
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
    """Each line is one neuron: type, call, known transmitter, truth, consensus."""
    neurons: list[tuple[str | None, str, str | None, str | None, str | None]] = [
        # Two neurons of one type. The known transmitter of the second neuron counts for
        # both neurons.
        ("T", "gaba", None, "dopamine", "dopamine"),
        ("T", "gaba", "dopamine", "dopamine", "dopamine"),
        # The type has two known transmitters, so each neuron keeps its own.
        ("U", "gaba", "gaba", "gaba", "gaba"),
        ("U", "gaba", "glutamate", "glutamate", "glutamate"),
        # Several known transmitters of one neuron count as none.
        ("V", "glutamate", "gaba+octopamine", None, "glutamate"),
        (None, "glutamate", "gaba+octopamine", None, None),
        # The consensus accepts these three transmitters only from an experiment.
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
    options = ExportOptions((40, 4, 4), confusion(tmp_path))
    output, _ = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "body-neurotransmitters.feather")
    assert made["ground_truth"].to_pylist() == list(truth)
    assert made["consensus_nt"].to_pylist() == list(consensus)


def test_the_truth_of_the_type_comes_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test replaces both truths, because they rarely differ.

    They differ only if not all synapses of a neuron name the same cell type.
    """
    neuron = prediction_tables.make([NEURON] * 60, ["gaba"] * 60)
    by = group_calls.of

    def known(source: Predictions, what: str, *others: object) -> pa.Table:
        found = by(source, what, *others)
        name = {"neuron": "glutamate", "cell_type": "dopamine"}[what]
        column = pa.array([name] * len(found))
        place = found.column_names.index("neurotransmitter")
        return found.set_column(place, "neurotransmitter", column)

    monkeypatch.setattr(group_calls, "of", known)
    typed = neuron.set_column(
        neuron.column_names.index("cell_type"), "cell_type", pa.array(["T"] * 60)
    )
    options = ExportOptions((40, 4, 4), confusion(tmp_path))
    for folder, table, expected in (
        ("1", neuron, "glutamate"),
        ("2", typed, "dopamine"),
    ):
        (tmp_path / folder).mkdir()
        output, _ = export_to(tmp_path / folder, "flyem", table, options)
        made = feather.read_table(output / "body-neurotransmitters.feather")
        assert made["ground_truth"].to_pylist() == [expected]
        assert made["consensus_nt"].to_pylist() == [expected]


@pytest.mark.parametrize(
    "classes", [("gaba", "unknown"), ("gaba", "neither", "unknown")]
)
def test_unknown_and_neither_are_read_back(
    tmp_path: pathlib.Path, classes: tuple[str, ...]
) -> None:
    table = prediction_tables.make([NEURON] * 3, ["gaba", *classes[-2:]], classes)
    output, _ = export_to(
        tmp_path, "synister", table, ExportOptions((40, 4, 4), predict=8)
    )
    for name in ("predictions.csv", "synapses.feather"):
        source = published.open(output / name, (40.0, 4.0, 4.0))
        assert source.classes == classes
        found = pa.concat_tables(source.tables())
        for of in classes:
            np.testing.assert_array_equal(found[of], probabilities(table, of))
