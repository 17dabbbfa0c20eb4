# SPDX-License-Identifier: Apache-2.0
import pathlib

import numpy as np
from pyarrow import feather

from synister_jax.exchange.export_files import ExportOptions
from tests.helpers import prediction_tables
from tests.helpers.prediction_tables import (
    CALLS,
    NEURONS,
    SIX,
    columns_of,
    export_to,
    probabilities,
    read_csv,
)


def test_synister(tmp_path: pathlib.Path) -> None:
    x_nm = np.arange(10) * 12.0
    x_nm[[0, 1]] = np.nan, 4.0 * 2**32
    table = prediction_tables.make(NEURONS, CALLS, x_nm=x_nm)
    output, _ = export_to(
        tmp_path, "synister", table, ExportOptions((40, 4, 4), predict=8)
    )
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
