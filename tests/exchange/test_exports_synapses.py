# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from synister_jax.base.errors import UserError
from synister_jax.exchange import published
from synister_jax.export import Options
from synister_jax.tables import predictions
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
    options = Options((40, 4, 4), confusion(tmp_path))
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
    options = Options((40, 4, 4), confusion(tmp_path, classes))
    output, _ = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    np.testing.assert_array_equal(
        made["nt_unknown_prob"].to_numpy(), probabilities(table, "neither")
    )
    assert "nt_neither_prob" not in made.column_names
    assert made["split"].null_count == 60  # of a table without splits
    bodies = feather.read_table(output / "body-neurotransmitters.feather")
    assert bodies["predicted_nt"].to_pylist() == ["unknown"]


def test_rows_without_a_point_are_kept_apart(tmp_path: pathlib.Path) -> None:
    z_nm = np.arange(10) * 40.0
    z_nm[2] = np.nan
    z_nm[8] = 40.0 * 2**21
    table = prediction_tables.make(NEURONS, CALLS, z_nm=z_nm)
    options = Options((40, 4, 4), confusion(tmp_path))
    output, notes = export_to(tmp_path, "flyem", table, options)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    assert made["z"].to_pylist() == [0, 1, 3, 4, 5, 6, 7, 9]
    left_out = predictions.load(output / "left-out.feather")
    # As text, in which NaN is like NaN.
    assert str(left_out.to_pydict()) == str(table.take([2, 8]).to_pydict())
    assert len(notes) == 1 and "21 bits of voxels): 2; they are in" in notes[0]
    # Bodies count all rows, wherever they are.
    bodies = feather.read_table(output / "body-neurotransmitters.feather")
    assert sum(bodies["total_nt_predictions"].to_pylist()) == 8

    good = prediction_tables.make(NEURONS, CALLS)
    (tmp_path / "good").mkdir()
    output, notes = export_to(tmp_path / "good", "flyem", good, options)
    assert notes == []
    assert not (output / "left-out.feather").exists()


def test_voxels_are_rounded_half_to_even(tmp_path: pathlib.Path) -> None:
    """Of odd sizes too; whatever the volume's offset is."""
    z_nm = [19.0, 20.0, 60.0, 61.0, 100.0, 139.0]  # of 40: .475, .5, 1.5, 1.525, 2.5
    y_nm = [3.0, 3.5, 4.0, 10.5, 24.5, 25.0]  # of 7: below, at and above .5
    table = prediction_tables.make(
        [NEURON] * 6, ["gaba"] * 6, z_nm=z_nm, y_nm=y_nm, x_nm=[0.0, 1, 2, 3, 4, 5]
    )
    options = Options((40, 7, 3), predict=3)
    output, _ = export_to(tmp_path, "synister", table, options)
    made = feather.read_table(output / "synapses.feather")
    assert made["z"].to_pylist() == [0, 0, 2, 2, 2, 3]
    assert made["y"].to_pylist() == [0, 0, 1, 2, 4, 4]
    assert made["x"].to_pylist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "classes", [("gaba", "unknown"), ("gaba", "neither", "unknown")]
)
def test_unknown_and_neither_are_read_back(
    tmp_path: pathlib.Path, classes: tuple[str, ...]
) -> None:
    table = prediction_tables.make([NEURON] * 3, ["gaba", *classes[-2:]], classes)
    output, _ = export_to(tmp_path, "synister", table, Options((40, 4, 4), predict=8))
    for name in ("predictions.csv", "synapses.feather"):
        source = published.open(output / name, (40.0, 4.0, 4.0))
        assert source.classes == classes
        found = pa.concat_tables(source.tables())
        for of in classes:
            np.testing.assert_array_equal(found[of], probabilities(table, of))


def test_shared_points_are_told(tmp_path: pathlib.Path) -> None:
    same = {name: np.array([0.0] * 2 + [8.0] * 3 + [16.0] * 5) for name in ("x_nm",)}
    same |= {"y_nm": np.zeros(10), "z_nm": np.zeros(10)}
    table = prediction_tables.make(NEURONS, CALLS, **same)
    _, notes = export_to(tmp_path, "neuprint", table, VOXEL)
    assert len(notes) == 1 and notes[0].startswith("points with several rows: 3;")


def test_fafbseg(tmp_path: pathlib.Path) -> None:
    scores = [8.0, 0.0, 4.0, 99.0, None] + [0.0, 0.0, None, 0.0] + [1.0]
    table = prediction_tables.make(
        NEURONS,
        CALLS,
        cleft_score=pa.array(scores, pa.float32()),
        connection_score=pa.array(range(10), pa.float32()),
        post_neuron_id=pa.array([NEURON + 5] * 9 + [None], pa.int64()),
    )
    output, notes = export_to(tmp_path, "fafbseg", table)
    made = feather.read_table(output / "synapses.feather")
    names = ("gaba", "acetylcholine", "glutamate", "octopamine", "serotonin")
    assert columns_of(made) == {
        **dict.fromkeys(("id", "offset", "pre", "post"), "int64"),
        **dict.fromkeys(("pre_x", "pre_y", "pre_z"), "double"),
        **dict.fromkeys(("scores", "cleft_score", "cleft_scores"), "float"),
        **dict.fromkeys((*names, "dopamine"), "float"),
    }
    assert made["id"].to_pylist() == table["synapse_id"].to_pylist()
    assert made["offset"].equals(made["id"])
    assert made["pre"].to_pylist() == [*NEURONS[:-1], 0]
    assert made["post"].to_pylist() == [NEURON + 5] * 9 + [0]
    assert made["pre_z"].equals(table["z_nm"])
    # The second neuron's weights would sum to zero.
    weights = [8, 0, 4, 99, 0] + [1, 1, 1, 1] + [1]
    assert made["cleft_score"].to_pylist() == weights
    assert made["cleft_scores"].equals(made["cleft_score"])
    for name in SIX:
        np.testing.assert_array_equal(made[name], probabilities(table, name))
    assert len(notes) == 1
    assert notes[0].endswith(f"above 0: 1; their synapses weigh 1 each: {NEURON + 1}")


def test_fafbseg_without_scores_or_some_classes(tmp_path: pathlib.Path) -> None:
    classes = ("dopamine", "gaba", "acetylcholine")
    table = prediction_tables.make([NEURON] * 3, ["gaba", None, "dopamine"], classes)
    output, notes = export_to(tmp_path, "fafbseg", table)
    made = feather.read_table(output / "synapses.feather")
    assert "post" not in made.column_names
    assert made["cleft_score"].to_pylist() == [1, 1, 1]
    assert np.isnan(made["scores"].to_numpy()).all()
    np.testing.assert_array_equal(made["serotonin"], [0, np.nan, 0])
    np.testing.assert_array_equal(made["gaba"], probabilities(table, "gaba"))
    assert notes == ["there are no cleft scores: every synapse weighs 1"]


@pytest.mark.parametrize("score", [-0.5, np.inf, -np.inf])
def test_weights_that_are_none_are_refused(
    tmp_path: pathlib.Path, score: float
) -> None:
    scores = pa.array([1.0] * 9 + [score], pa.float32())
    table = prediction_tables.make(NEURONS, CALLS, cleft_score=scores)
    with pytest.raises(UserError, match=f"cleft_score is {score} somewhere"):
        export_to(tmp_path, "fafbseg", table)


def test_a_weight_of_nan_is_unknown(tmp_path: pathlib.Path) -> None:
    scores = pa.array([1.0] * 9 + [np.nan], pa.float32())
    table = prediction_tables.make([NEURON] * 10, CALLS, cleft_score=scores)
    output, _ = export_to(tmp_path, "fafbseg", table)
    made = feather.read_table(output / "synapses.feather")
    assert made["cleft_score"].to_pylist() == [1] * 9 + [0]


def test_cave(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make(
        NEURONS, CALLS, connection_score=pa.array(range(10), pa.float32())
    )
    output, notes = export_to(tmp_path, "cave", table)
    made = feather.read_table(output / "synapses_nt_v1.feather")
    short = {"gaba": "gaba", "acetylcholine": "ach", "glutamate": "glut"}
    short |= {"octopamine": "oct", "serotonin": "ser", "dopamine": "da"}
    assert columns_of(made) == {
        **dict.fromkeys(("id", "pre_pt_root_id", "post_pt_root_id"), "int64"),
        **dict.fromkeys(("connection_score", "cleft_score"), "float"),
        **dict.fromkeys(short.values(), "float"),
        "valid_nt": "bool",
        **dict.fromkeys(("pre_pt_supervoxel_id", "post_pt_supervoxel_id"), "int64"),
        **dict.fromkeys((f"pre_pt_position_{axis}" for axis in "xyz"), "double"),
        **dict.fromkeys((f"post_pt_position_{axis}" for axis in "xyz"), "double"),
    }
    for name, column in short.items():
        np.testing.assert_array_equal(made[column], probabilities(table, name))
    assert made["valid_nt"].to_pylist() == [call is not None for call in CALLS]
    assert made["pre_pt_root_id"].to_pylist() == [*NEURONS[:-1], 0]
    assert made["post_pt_root_id"].to_pylist() == [0] * 10
    assert made["pre_pt_position_x"].equals(table["x_nm"])
    assert made["post_pt_position_x"].null_count == 10
    assert np.isnan(made["cleft_score"].to_numpy()).all()
    assert notes == []


def test_neuprint_as_the_optic_lobe(tmp_path: pathlib.Path) -> None:
    classes = ("gaba", "neither")
    calls = ["gaba"] * 99 + ["neither"] * 20 + [None]
    types = pa.array(["T"] * 120)
    table = prediction_tables.make([NEURON] * 120, calls, classes, cell_type=types)
    options = Options((40, 4, 4), confusion(tmp_path, classes))
    output, _ = export_to(tmp_path, "neuprint", table, options)
    [row] = read_csv(output / "Neuprint_Neurons.csv")
    mean = np.nanmean(probabilities(table, "neither").astype(np.float64))
    assert float(row.pop("ntUnknownProb:float")) == pytest.approx(mean, rel=1e-12)
    assert float(row.pop("ntGabaProb:float")) == pytest.approx(1 - mean, rel=1e-12)
    confidence = str(99 / 119)
    assert row == {
        ":ID(Body-ID)": str(NEURON),
        "bodyId:long": str(NEURON),
        "totalNtPredictions:int": "119",
        "predictedNtConfidence:float": confidence,
        "predictedNt:string": "gaba",
        "celltypeTotalNtPredictions:int": "119",
        "celltypePredictedNt:string": "gaba",
        "celltypePredictedNtConfidence:float": confidence,
        "consensusNt:string": "gaba",
    }
    rows = read_csv(output / "Neuprint_Synapses.csv")
    assert len(rows) == 120
    assert rows[2] == {
        ":ID(Element-ID)": str(2 << 42 | 4 << 21 | 6),
        "type:string": "pre",
        "confidence:float": "",
        "location:point{srid:9157}": "{x:6, y:4, z:2}",
        "ntGabaProb:float": str(probabilities(table, "gaba")[2]),
        "ntUnknownProb:float": str(probabilities(table, "neither")[2]),
    }
    assert rows[119]["ntGabaProb:float"] == ""


def test_banc(tmp_path: pathlib.Path) -> None:
    types = pa.array(["KC"] * 5 + [None] * 5)
    table = prediction_tables.make(NEURONS, CALLS, cell_type=types)
    output, _ = export_to(tmp_path, "banc", table)
    eight = ["acetylcholine", "dopamine", "gaba", "glutamate", "histamine"]
    eight += ["octopamine", "serotonin", "tyramine"]
    made = parquet.read_table(output / "banc_nt_prediction.parquet")
    assert columns_of(made) == {
        "id": "int64",
        **dict.fromkeys(eight, "halffloat"),
        "predicted_nt": "string",
        "probability": "halffloat",
    }
    # Multiples of 1/64 are the same in 16 bits.
    for name in SIX:
        given = probabilities(table, name).astype(np.float16)
        np.testing.assert_array_equal(made[name].to_numpy(), given)
    np.testing.assert_array_equal(
        made["tyramine"].to_numpy(), [0] * 3 + [np.nan] + [0] * 6
    )
    assert made["predicted_nt"].to_pylist() == CALLS
    values = predictions.probabilities(table).max(axis=1)
    np.testing.assert_array_equal(made["probability"].to_numpy(), values)
    references = read_csv(output / "synapses_nt_prediction.csv")
    assert references[3] == {
        "tag": "",
        "value": "",
        "id_ref": str(table["synapse_id"][3]),
        "valid": "false",
        "valid_ref": "true",
    }
    assert references[0]["tag"] == "gaba" and references[0]["valid"] == "true"
    assert float(references[0]["value"]) == values[0]

    first, second = read_csv(output / "banc_neurotransmitter_prediction.csv")
    ends = ["neurotransmitter_predicted", "neurotransmitter_score", "count"]
    ends += ["supervoxel_id", "position", "cell_type"]
    ends += ["cell_type_neurotransmitter_predicted", "cell_type_neurotransmitter_score"]
    assert list(first) == ["root_id", *eight, *ends]
    assert [first["root_id"], second["root_id"]] == [str(NEURON), str(NEURON + 1)]
    assert [first["gaba"], first["dopamine"], first["tyramine"]] == ["3", "1", "0"]
    assert first["count"] == "4"
    gaba, dopamine = values[[0, 1, 4]].sum(), values[2]
    assert float(first["neurotransmitter_score"]) == pytest.approx(
        gaba / (gaba + dopamine)
    )
    assert first["cell_type_neurotransmitter_predicted"] == "gaba"
    assert second["neurotransmitter_predicted"] == "serotonin"
    assert second["cell_type_neurotransmitter_predicted"] == ""


def test_synister(tmp_path: pathlib.Path) -> None:
    x_nm = np.arange(10) * 12.0
    x_nm[[0, 1]] = np.nan, 4.0 * 2**32
    table = prediction_tables.make(NEURONS, CALLS, x_nm=x_nm)
    output, _ = export_to(tmp_path, "synister", table, Options((40, 4, 4), predict=8))
    rows = read_csv(output / "predictions.csv")
    assert list(rows[0]) == ["position_id", "skid", "x", "y", "z", *SIX]
    assert [row["skid"] for row in rows] == [str(n or -1) for n in NEURONS]
    assert [rows[2][axis] for axis in "xyz"] == ["24", "16", "80"]
    assert rows[0]["x"] == "" and rows[3]["gaba"] == ""
    assert float(rows[1]["gaba"]) == probabilities(table, "gaba")[1]
    made = feather.read_table(output / "synapses.feather")
    assert columns_of(made) == {
        **dict.fromkeys(("id", "body"), "int64"),
        **dict.fromkeys("xyz", "int32"),
        **{f"nts_8.{name}": "float" for name in SIX},
    }
    assert made["x"].to_pylist() == [None, None, *range(6, 30, 3)]
    for name in SIX:
        given = probabilities(table, name)
        np.testing.assert_array_equal(made[f"nts_8.{name}"], given)


def test_splits_to_choose_from(tmp_path: pathlib.Path) -> None:
    parts = {f"split_{name}": pa.array(["train", "test"]) for name in "ab"}
    table = prediction_tables.make([NEURON] * 2, ["gaba"] * 2, **parts)
    options = Options((40, 4, 4), confusion(tmp_path))
    with pytest.raises(UserError, match="which of the splits a, b with --split"):
        export_to(tmp_path, "flyem", table, options)
    wrong = Options((40, 4, 4), options.confusion, "c")
    with pytest.raises(UserError, match="--split=c: .* has a, b"):
        export_to(tmp_path, "flyem", table, wrong)
    chosen = Options((40, 4, 4), options.confusion, "b")
    output, _ = export_to(tmp_path, "flyem", table, chosen)
    made = feather.read_table(output / "tbar-neurotransmitters.feather")
    assert made["split"].to_pylist() == ["train", "test"]
