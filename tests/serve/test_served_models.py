# SPDX-License-Identifier: Apache-2.0
"""Tests of models.toml, and of the messages about its errors."""

import pathlib

import pytest

from synister_jax.base.errors import UserError
from synister_jax.serve import served_models
from tests.helpers import serving


def test_paths_are_relative_to_the_file(tmp_path: pathlib.Path) -> None:
    serving.write_models(tmp_path, synapses="table.feather", step=40)
    model = served_models.load(tmp_path)["small"]
    assert model.workdir == tmp_path / "run"
    assert model.volume == str(tmp_path / "raw.n5")
    assert model.synapses == str(tmp_path / "table.feather")
    assert (model.step, model.calibrated, model.sources) == ("40", False, ("none",))
    assert model.finds_neurons("none")
    network = served_models.network(model)
    assert network.classes == serving.CLASSES
    assert network.crop_shape_zyx == (4, 16, 16)
    serving.write_models(tmp_path, volume="precomputed://gs://bucket/em")
    model = served_models.load(tmp_path)["small"]
    assert model.volume == "precomputed://gs://bucket/em"
    assert (model.step, model.synapses) == ("best", None)
    assert not model.finds_neurons("none") and model.finds_neurons("hemibrain")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workdir": "nowhere"}, "no config.json"),
        ({"step": "last"}, 'a number or "best"'),
        ({"step": True}, "wrong type"),
        ({"step": -1}, 'a number or "best"'),
        ({"sources": []}, "at least one"),
        ({"sources": ["none", "none"]}, "each once"),
        ({"sources": ["moon"]}, "'moon' is not known"),
        ({"sources": ["hemibrain"], "synapses": "t.feather"}, "remove synapses"),
        ({"volum": "x"}, "volum is not known"),
        ({"title": 3}, "wrong type"),
    ],
)
def test_mistakes_are_named(
    tmp_path: pathlib.Path, settings: dict[str, object], says: str
) -> None:
    serving.write_models(tmp_path, **settings)
    with pytest.raises(UserError, match=r"models.toml: \[small\]") as error:
        served_models.load(tmp_path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[Small]\nvolume='x'", "[a.b]\nc=1", "small = 3", "[", "\xff\xfe"]
)
def test_files_that_name_no_model(tmp_path: pathlib.Path, text: str) -> None:
    with pytest.raises(UserError, match="for example"):
        served_models.load(tmp_path)
    (tmp_path / "models.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="models.toml"):
        served_models.load(tmp_path)


def test_a_run_whose_configuration_is_damaged(tmp_path: pathlib.Path) -> None:
    serving.write_models(tmp_path)
    model = served_models.load(tmp_path)["small"]
    for text in ("[]", "{}", "{"):
        (tmp_path / "run" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            served_models.network(model)
