# SPDX-License-Identifier: Apache-2.0
import json
import pathlib

import numpy as np
import pytest

from synister_jax.base.errors import UserError
from synister_jax.evaluation import confusions

CSV = "true,gaba,acetylcholine\ngaba,8,2\nacetylcholine,0,0\n"


def test_of_a_csv_file_and_of_metrics(tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.csv").write_text(CSV)
    found = confusions.load(tmp_path / "c.csv")
    assert found.classes == ("gaba", "acetylcholine")
    np.testing.assert_array_equal(found.by_row(), [[0.8, 0.2], [np.nan, np.nan]])
    np.testing.assert_array_equal(found.by_column(), [[1, 1], [0, 0]])
    metrics = {
        "classes": ["a", "b"],
        "synapses": {"confusion": [[1, 2], [3, 4]]},
        "neurons": {"confusion": [[5, 6], [7, 8]]},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    for level, first in (("synapses", 1), ("neurons", 5)):
        assert confusions.load(tmp_path / "metrics.json", level).counts[0, 0] == first


def test_classes_in_another_order(tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.csv").write_text(CSV)
    found = confusions.load(tmp_path / "c.csv").for_classes(["acetylcholine", "gaba"])
    np.testing.assert_array_equal(found.counts, [[0, 0], [2, 8]])
    with pytest.raises(UserError, match="has the classes acetylcholine, gaba, but the"):
        found.for_classes(["gaba", "glutamate"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names 0 classes"),
        ("true,gaba\ngaba,1\n", "names 1 classes"),
        (
            CSV.replace("acetylcholine,0,0", "gaba,0,0"),
            "the rows must name the classes",
        ),
        (CSV.replace("8", "-8"), "must be finite and from 0 up"),
        (CSV.replace("8", "nan"), "must be finite and from 0 up"),
        (CSV.replace("8", "0").replace("2", "0"), "one must be above 0"),
        (CSV.replace("8", "many"), "a number in every cell"),
        (CSV.replace("8,2", "8"), "a number in every cell"),
        (CSV.replace("acetylcholine", "gaba"), "each once"),
    ],
)
def test_mistakes_in_a_csv_file(tmp_path: pathlib.Path, text: str, why: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=f"c.csv.*{why}"):
        confusions.load(tmp_path / "c.csv")


def test_no_such_file_no_such_level(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot read .*none.csv"):
        confusions.load(tmp_path / "none.csv")
    with pytest.raises(UserError, match="none.json does not exist"):
        confusions.load(tmp_path / "none.json")
    (tmp_path / "metrics.json").write_text('{"classes": ["a", "b"]}')
    with pytest.raises(UserError, match="has no confusion of neurons"):
        confusions.load(tmp_path / "metrics.json", "neurons")


def test_a_folder_of_one_step(tmp_path: pathlib.Path) -> None:
    metrics = {"classes": ["a", "b"], "synapses": {"confusion": [[1, 2], [3, 4]]}}
    with pytest.raises(UserError, match="one evaluated step, but has none"):
        confusions.load(tmp_path)
    for step in (10, 20):
        (tmp_path / f"step-{step}").mkdir()
        path = tmp_path / f"step-{step}" / "metrics.json"
        path.write_text(json.dumps(metrics))
        if step == 10:
            assert confusions.load(tmp_path).name == str(path)
    with pytest.raises(UserError, match="has step-10, step-20; give the metrics.json"):
        confusions.load(tmp_path)
