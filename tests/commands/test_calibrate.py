# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.evaluation import calibration
from synister_jax.network import calibrating, saved_calibration
from synister_jax.tables import predictions
from tests.helpers import commands
from tests.helpers.small_data import CLASSES

IDENTITY = {"step": 7, "split": "skeleton", "crops": "c0ffee"}


def write_evaluation(
    run: pathlib.Path, part: str, n: int = 400, **changed: Any
) -> None:
    """Writes what `evaluate` writes for a part of the split.

    The network is too confident: its logits are twice as large as they should be.
    """
    identity = IDENTITY | {"part": part, "classes": list(CLASSES)} | changed
    rng = np.random.default_rng(len(part))
    logits = rng.normal(0, 2, (n, 3))
    edges = np.exp(logits).cumsum(axis=1)
    truth = (rng.random((n, 1)) * edges[:, 2:] > edges[:, :2]).sum(axis=1)
    probabilities = np.exp(2 * logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[1] = np.nan
    labels = [CLASSES[i] for i in truth]
    labels[2:5] = [None, "gaba+dopamine", "histamine"]
    columns: dict[str, object] = {"synapse_id": np.arange(n)}
    columns |= {name: np.zeros(n) for name in ("z_nm", "y_nm", "x_nm")}
    columns |= {"neuron_id": np.arange(n), "neurotransmitter": labels[:n]}
    for name in ("hemilineage", "brain_region", "cell_type"):
        columns[name] = pa.nulls(n, pa.string())
    about = {"workdir": "run"} | {n: identity[n] for n in ("step", "part", "split")}
    if "parameters_sha256" in changed:
        about["parameters_sha256"] = identity.pop("parameters_sha256")
    table = predictions.build(
        pa.table(columns), probabilities, ["ok"] * n, identity["classes"], about
    )
    name = f"step-{identity['step']}"
    folder = files.make_folder(run / "evaluation" / part / name)
    files.write_feather(folder / "predictions.feather", table)
    files.write_json(folder / "metrics.json", identity)


def write_run(folder: pathlib.Path) -> pathlib.Path:
    """Makes a folder with the files of a run that calibration needs."""
    files.make_folder(folder)
    config = {"classes": list(CLASSES), "crops_sha256": IDENTITY["crops"]}
    files.write_json(folder / "config.json", config)
    write_evaluation(folder, "validation")
    return folder


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def _fitted_once(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = write_run(tmp_path_factory.mktemp("fitted") / "run")
    calibrating.fit(folder, 7, 0.9)
    return folder


@pytest.fixture
def fitted_run(tmp_path: pathlib.Path, _fitted_once: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(_fitted_once, tmp_path / "fitted")


def test_the_file_says_what_was_fitted(fitted_run: pathlib.Path) -> None:
    fitted = json.loads((fitted_run / "calibration" / "step-7.json").read_text())
    assert {name: fitted[name] for name in IDENTITY} == IDENTITY
    assert fitted["part"] == "validation" and fitted["classes"] == list(CLASSES)
    # Rows without a prediction, or without exactly one known class, do not count.
    assert fitted["rows"] == 396
    assert fitted["temperature"] == pytest.approx(2, rel=0.2)
    assert fitted["after"]["loss"] < fitted["before"]["loss"]
    assert fitted["after"]["ece"] < fitted["before"]["ece"]
    assert fitted["precision_target"] == 0.9 <= fitted["precision"]
    assert 0.3 < fitted["coverage"] < 1 and len(fitted["curve"]) == 200
    # The numbers are computed again from the table.
    folder = fitted_run / "evaluation" / "validation" / "step-7"
    table = predictions.load(folder / "predictions.feather")
    values = calibration.apply(predictions.probabilities(table), fitted["temperature"])
    labels = np.array(table["neurotransmitter"].to_pylist())
    counts = np.isin(labels, CLASSES) & ~np.isnan(values[:, 0])
    right = np.array(CLASSES)[values.argmax(axis=1)] == labels
    kept = counts & (values.max(axis=1) >= fitted["abstain_below"])
    assert fitted["coverage"] == pytest.approx(kept.sum() / counts.sum())
    assert fitted["precision"] == pytest.approx(right[kept].mean())
    more = counts & (values.max(axis=1) >= fitted["abstain_below"] - 0.01)
    assert right[more].mean() < 0.9 < right[kept].mean()
    assert sum(c["kept"] for c in fitted["by_class"].values()) == kept.sum()
    assert list(fitted["by_class"]) == list(CLASSES)


@pytest.mark.long
def test_again_gives_the_same_bytes_and_test_is_never_opened(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files.make_folder(run / "evaluation" / "test" / "step-7")
    for name in ("metrics.json", "predictions.feather"):
        (folder / name).write_text("not to be read")
    calibrating.fit(run, 7, 0.95)
    said = capsys.readouterr().out
    assert said.startswith("step 7, 396 synapses of validation: temperature ")
    assert len(said.splitlines()) == 1 and "ECE " in said and "→" in said
    written = {p.name: p.read_bytes() for p in (run / "calibration").iterdir()}
    assert set(written) == {"step-7.json", "reliability-step-7.png"}
    assert written["reliability-step-7.png"].startswith(b"\x89PNG")
    calibrating.fit(run, 7, 0.95)
    assert {p.name: p.read_bytes() for p in (run / "calibration").iterdir()} == written


@pytest.mark.long
def test_check_measures_and_fits_nothing(run: pathlib.Path) -> None:
    with pytest.raises(UserError, match="calibrate --workdir=.* --steps=7 first"):
        calibrating.check(run, 7, "test")
    fitted = calibrating.fit(run, 7, 0.9)
    before = (run / "calibration" / "step-7.json").read_bytes()
    with pytest.raises(UserError, match="evaluate .*--part=test --steps=7 first"):
        calibrating.check(run, 7, "test")
    write_evaluation(run, "test", n=300)
    checked = calibrating.check(run, 7, "test")
    path = run / "calibration" / "check-test-step-7.json"
    assert json.loads(path.read_text()) == checked
    assert path.with_suffix(".png").exists()
    assert (run / "calibration" / "step-7.json").read_bytes() == before
    assert checked["part"] == "test" and checked["rows"] == 296
    for name in ("temperature", "abstain_below", "precision_target"):
        assert checked[name] == fitted[name]
    assert checked["precision"] != fitted["precision"]
    assert checked["after"]["ece"] < checked["before"]["ece"]
    assert checked["precision"] == pytest.approx(0.9, abs=0.06)


@pytest.mark.long
def test_no_threshold_is_precise_enough(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "evaluation/validation/step-7/predictions.feather"
    table = predictions.load(path)
    place = table.column_names.index("neurotransmitter")
    called = [CLASSES[(i + 1) % 3] for i in predictions.called(table)]  # all are wrong
    wrong = table.set_column(place, "neurotransmitter", pa.array(called))
    files.write_feather(path, wrong)
    fitted = calibrating.fit(run, 7, 0.95)
    for name in ("abstain_below", "coverage", "precision", "by_class"):
        assert fitted[name] is None
    said = capsys.readouterr().out
    assert "at no confidence is a share of 0.95 right; the highest share is 0.0" in said
    assert ", of the 1 synapses" in said
    assert "the temperature is at its bound, 20" in said
    write_evaluation(run, "test")
    checked = calibrating.check(run, 7, "test")
    assert checked["abstain_below"] is None and checked["precision"] is None


@pytest.mark.parametrize(
    "changed", [{"crops": "other"}, {"split": "lobes"}, {"classes": list("abc")}]
)
def test_a_check_of_other_crops_is_refused(
    fitted_run: pathlib.Path, changed: dict[str, Any]
) -> None:
    write_evaluation(fitted_run, "test", **changed)
    [(name, value)] = changed.items()
    if name == "classes":  # no label is one of these classes
        expected = "no labelled synapse"
    else:
        expected = f"fitted with {name} .*, but test was evaluated with {value}"
    with pytest.raises(UserError, match=expected):
        calibrating.check(fitted_run, 7, "test")


def test_mistakes_in_what_was_evaluated(run: pathlib.Path) -> None:
    folder = run / "evaluation" / "validation" / "step-7"
    with pytest.raises(UserError, match="evaluate .*--part=validation --steps=8 first"):
        calibrating.fit(run, 8, 0.9)
    # The files of test lie in the folder of validation, or those of step 7 in step 8.
    write_evaluation(run, "test")
    for name in ("metrics.json", "predictions.feather"):
        kept = (folder / name).read_bytes()
        shutil.copy(run / "evaluation/test/step-7" / name, folder)
        with pytest.raises(
            UserError, match=f"{name} belongs to part test, not to valid"
        ):
            calibrating.fit(run, 7, 0.9)
        (folder / name).write_bytes(kept)
    shutil.copytree(folder, folder.with_name("step-8"))
    with pytest.raises(UserError, match="belongs to step 7, not to 8"):
        calibrating.fit(run, 8, 0.9)
    write_evaluation(run, "validation", n=5)
    table = predictions.load(folder / "predictions.feather")
    files.write_feather(folder / "predictions.feather", table.slice(1))
    with pytest.raises(UserError, match="no labelled synapse with a prediction"):
        calibrating.fit(run, 7, 0.9)
    (folder / "metrics.json").unlink()  # as if evaluate was killed
    with pytest.raises(UserError, match="metrics.json is not there; run python -m"):
        calibrating.fit(run, 7, 0.9)
    assert not (run / "calibration").exists()


def test_what_predict_takes(run: pathlib.Path, fitted_run: pathlib.Path) -> None:
    with pytest.raises(UserError, match="calibrate --workdir=.* --steps=7 first"):
        saved_calibration.load([(str(run), 7)], 1)
    members = [(str(fitted_run), 7)]
    fitted = saved_calibration.load(members, 1)
    assert fitted == files.read_json(saved_calibration.path_of(fitted_run, 7))
    # The fit has no checksum of the parameters, so that any parameters are accepted.
    saved_calibration.require_parameters(fitted, "any")
    known = fitted | {"parameters_sha256": "these"}
    saved_calibration.require_parameters(known, "these")
    with pytest.raises(UserError, match="parameters that the checkpoint no longer has"):
        saved_calibration.require_parameters(known, "those")
    for several, views in ((members * 2, 1), (members, 8)):
        with pytest.raises(UserError, match="for one network and one view"):
            saved_calibration.load(several, views)


def test_parameters_are_kept_where_they_are_known(run: pathlib.Path) -> None:
    write_evaluation(run, "validation", parameters_sha256="abc")
    assert calibrating.fit(run, 7, 0.9)["parameters_sha256"] == "abc"
    write_evaluation(run, "test", parameters_sha256="abd")
    with pytest.raises(UserError, match="parameters_sha256 abc, but test was .* abd"):
        calibrating.check(run, 7, "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"crops": "other"}, "with crops other, but the checkpoint has c0ffee"),
        ({"step": 6}, "with step 6, but the checkpoint has 7"),
        ({"part": "test"}, "with part test, but the checkpoint has validation"),
        ({"classes": list(CLASSES[::-1])}, "was fitted with classes"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    fitted_run: pathlib.Path, changed: dict[str, Any], message: str
) -> None:
    fitted = saved_calibration.read(fitted_run, 7)
    path = saved_calibration.path_of(fitted_run, 7)
    files.write_json(path, fitted | changed)
    with pytest.raises(UserError, match=message) as caught:
        saved_calibration.load([(str(fitted_run), 7)], 1)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_no_calibration(run: pathlib.Path) -> None:
    path = saved_calibration.path_of(run, 7)
    files.make_folder(path.parent)
    for text, message in (("[]", "not a file that calibrate"), ("{", "not valid JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            saved_calibration.load([(str(run), 7)], 1)


@pytest.mark.parametrize("temperature", [-1, 0, float("nan"), None, "0.9", 21])
def test_temperatures_that_are_not_possible(
    run: pathlib.Path, fitted_run: pathlib.Path, temperature: object
) -> None:
    [fitted] = (fitted_run / "calibration").glob("step-*.json")
    content = files.read_json(fitted) | {"temperature": temperature}
    path = saved_calibration.path_of(run, content["step"])
    files.make_folder(path.parent)
    files.write_json(path, content)
    with pytest.raises(UserError, match="a temperature of .* is not possible; run"):
        saved_calibration.read(run, content["step"])


@pytest.mark.long
def test_imported_weights_have_no_crops_to_compare(run: pathlib.Path) -> None:
    config = {"classes": list(CLASSES), "crops_sha256": ""}
    files.write_json(run / "config.json", config)
    fitted = calibrating.fit(run, 7, 0.9)
    assert saved_calibration.load([(str(run), 7)], 1)["crops"] == fitted["crops"]


def test_command(short_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(short_run, tmp_path / "run")
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    write_evaluation(folder, "validation", step=20)
    command = ["-m", "synister_jax.calibrate", f"--workdir={folder}"]
    command.append("--precision=0.9")
    done = commands.run(*command)
    assert done.returncode == 0, done.stderr
    assert "step 20, 396 synapses of validation" in done.stdout  # the latest
    assert saved_calibration.read(folder, 20)["precision_target"] == 0.9
    command.append("--check=test")
    refused = commands.run(*command)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert "--precision means nothing with --check" in refused.stderr
