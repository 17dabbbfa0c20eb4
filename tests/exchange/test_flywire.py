# SPDX-License-Identifier: Apache-2.0
import gzip
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from synister_jax.base.errors import UserError
from tests.helpers import prediction_tables
from tests.helpers.prediction_tables import (
    CALLS,
    NEURON,
    NEURONS,
    SIX,
    columns_of,
    export_to,
    probabilities,
    read_csv,
)


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
    # The weights of the second neuron would sum to zero, so each becomes 1.
    weights = [8, 0, 4, 99, 0] + [1, 1, 1, 1] + [1]
    assert made["cleft_score"].to_pylist() == weights
    assert made["cleft_scores"].equals(made["cleft_score"])
    for name in SIX:
        np.testing.assert_array_equal(made[name], probabilities(table, name))
    assert len(notes) == 1
    assert notes[0].endswith(
        f"above 0: 1; each of their synapses gets the weight 1: {NEURON + 1}"
    )


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
    assert notes == [
        "the predictions have no cleft scores: every synapse gets the weight 1"
    ]


@pytest.mark.parametrize("score", [-0.5, np.inf, -np.inf])
def test_weights_that_are_none_are_refused(
    tmp_path: pathlib.Path, score: float
) -> None:
    scores = pa.array([1.0] * 9 + [score], pa.float32())
    table = prediction_tables.make(NEURONS, CALLS, cleft_score=scores)
    with pytest.raises(UserError, match=f"cleft_score is {score} in a row"):
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
    # The gzip header has no time, so equal tables give equal files.
    assert content[:2] == b"\x1f\x8b" and content[4:8] == bytes(4)


def test_codex_without_a_class(tmp_path: pathlib.Path) -> None:
    calls = ["gaba", "acetylcholine", None]
    neurons = [NEURON, NEURON, NEURON + 1]
    table = prediction_tables.make(neurons, calls, ("gaba", "acetylcholine"))
    output, _ = export_to(tmp_path, "codex", table)
    known, unknown = read_csv(output / "neurons.csv.gz")
    assert float(known["oct_avg"]) == 0
    assert unknown["oct_avg"] == ""
