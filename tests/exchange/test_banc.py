# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from synister_jax.tables import predictions
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
    # Multiples of 1/64 are exact in float16.
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
