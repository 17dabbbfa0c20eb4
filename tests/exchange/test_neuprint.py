# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.exchange.export_files import ExportOptions
from tests.helpers import prediction_tables
from tests.helpers.prediction_tables import (
    CALLS,
    NEURON,
    NEURONS,
    SIX,
    VOXEL,
    confusion,
    export_to,
    probabilities,
    read_csv,
)


def test_neuprint_as_the_optic_lobe(tmp_path: pathlib.Path) -> None:
    classes = ("gaba", "neither")
    calls = ["gaba"] * 99 + ["neither"] * 20 + [None]
    types = pa.array(["T"] * 120)
    table = prediction_tables.make([NEURON] * 120, calls, classes, cell_type=types)
    options = ExportOptions((40, 4, 4), confusion(tmp_path, classes))
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


def test_neuprint_as_the_male_vnc(tmp_path: pathlib.Path) -> None:
    table = prediction_tables.make(NEURONS, CALLS)
    output, _ = export_to(tmp_path, "neuprint", table, VOXEL)
    first, second = read_csv(output / "Neuprint_Neurons.csv")
    assert first["predictedNt:string"] == "gaba"
    assert first["predictedNtProb:float"] == first["ntGabaProb:float"]
    assert second["predictedNt:string"] == "serotonin"
    assert len(first) == 4 + len(SIX)
