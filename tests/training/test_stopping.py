# SPDX-License-Identifier: Apache-2.0
"""Runs that stop early or fail: the tests start the real command or call `train`."""

import pathlib
import resource
import shutil
import signal
import time

import ml_collections
import numpy as np
import pytest

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint
from synister_jax.training import input_pipeline, metrics_log, stopping, training_run
from tests.helpers import runs
from tests.helpers.small_data import tiny_config

pytestmark = pytest.mark.long


@pytest.fixture
def config(shards_folder: pathlib.Path) -> ml_collections.ConfigDict:
    config = tiny_config()
    config.shards = str(shards_folder)
    return config


def wait_for(path: pathlib.Path, process: object) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def test_sigterm_saves_and_ends_well(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 100_000
    config.checkpoint_every_steps = 10_000
    config.eval_every_steps = 10_000
    process = runs.start(runs.command(tmp_path, config, tmp_path / "run"))
    while len(metrics_log.read(tmp_path / "run")) < 20:  # lines in the log
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    [step] = checkpoint.steps(tmp_path / "run")
    assert step >= 20
    assert f"SIGTERM: saved at step {step}; the same command continues" in output
    config.num_train_steps = step + 1  # the run continues
    training_run.train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [step, step + 1]
    logged = [line["step"] for line in metrics_log.read(tmp_path / "run")]
    assert logged == list(range(1, step + 2))


def test_divergence_stops_with_its_step_and_batch(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    """No checkpoint has values that are not finite, so a rerun stops at the same step.

    How often the log is written makes no difference.
    """
    config.checkpoint_every_steps = 1
    config.learning_rate = 1e30
    messages = []
    for every in (5, 1):
        config.log_every_steps = every
        with pytest.raises(UserError, match="after step [01] made the loss") as e:
            training_run.train(config, tmp_path)
        messages.append(str(e.value))
    assert messages[0] == messages[1]
    for step in checkpoint.steps(tmp_path):
        for name, values in runs.saved_state(tmp_path, step, config).items():
            assert np.isfinite(values).all(), name
    [path] = (tmp_path / "nonfinite").iterdir()
    step = int(path.stem.removeprefix("after-step-"))
    assert f"after step {step} made" in messages[0] and str(path) in messages[0]
    examples = input_pipeline.TrainBatches.of(
        input_pipeline.open_shards(config), config
    )
    batch = examples.read(examples.rows(step))
    with np.load(path) as kept:
        np.testing.assert_array_equal(kept["crop"], batch["crop"])
        np.testing.assert_array_equal(kept["label"], batch["label"])
        ids = examples.shards.index["synapse_id"].to_numpy()
        np.testing.assert_array_equal(kept["synapse_id"], ids[examples.rows(step)])
        assert kept["augmented"].shape == (12, 4, 16, 16)


def test_early_stop_keeps_the_best(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 200
    config.eval_every_steps = 2
    config.checkpoint_every_steps = 200
    config.keep_latest = 1
    config.early_stop_evals = 3
    training_run.train(config, tmp_path)
    lines = [x for x in metrics_log.read(tmp_path) if checkpoint.BEST_BY in x]
    history = [line[checkpoint.BEST_BY] for line in lines]
    stopped_at = lines[-1]["step"]
    assert stopped_at < 200  # after 200 steps, the accuracy would stay at 1
    counted = [stopping.Patience(3, [*enumerate(h)]) for h in (history, history[:-1])]
    assert [each.is_over for each in counted] == [True, False]
    kept = checkpoint.steps(tmp_path)
    best = checkpoint.best_step(tmp_path)
    assert set(kept) == {best, stopped_at}
    assert history[best // 2 - 1] == max(history)
    before = metrics_log.read(tmp_path)
    training_run.train(config, tmp_path)  # does nothing
    assert metrics_log.read(tmp_path) == before


def test_patience_is_counted_in_evaluations() -> None:
    def is_over(evaluations: int, values: list[float]) -> bool:
        return stopping.Patience(evaluations, [*enumerate(values)]).is_over

    assert not is_over(2, [])
    assert not is_over(2, [0.1, 0.3, 0.2])
    assert is_over(2, [0.1, 0.3, 0.2, 0.3])  # an equal value is not better
    assert not is_over(2, [0.1, 0.3, 0.2, 0.4])
    assert not is_over(0, [0.5, 0.4, 0.3])  # 0 means no limit


def test_sigterm_before_a_validation_leaves_it_to_the_next_start(
    tmp_path: pathlib.Path,
    config: ml_collections.ConfigDict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The state is saved at once after SIGTERM; the next start does the validation."""
    training_run.train(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(stopping.StopRequest, "reached", lambda self, step: step == 3)
        training_run.train(config, tmp_path / "stopped")
    lines = metrics_log.read(tmp_path / "stopped")
    assert [line["step"] for line in lines] == [1, 2, 3]
    training_run.train(config, tmp_path / "stopped")
    assert metrics_log.read(tmp_path / "stopped") == metrics_log.read(
        tmp_path / "whole"
    )
    states = [
        runs.saved_state(tmp_path / name, 6, config) for name in ("whole", "stopped")
    ]
    runs.assert_same_state(*states)


@pytest.mark.slow
def test_two_starts_in_one_folder(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 100_000
    config.checkpoint_every_steps = 5
    config.eval_every_steps = 100_000
    command = runs.command(tmp_path, config, tmp_path / "run")
    first = runs.start(command)
    wait_for(tmp_path / "run" / "checkpoints" / "5", first)
    second = runs.start(command)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 1 and "another process is at work in" in output
    first.kill()  # this frees the folder
    first.communicate()
    config.num_train_steps = checkpoint.steps(tmp_path / "run")[-1] + 1
    third = runs.start(runs.command(tmp_path, config, tmp_path / "run"))
    output, _ = third.communicate(timeout=300)
    assert third.returncode == 0, output
    alone = runs.start([*command, "--processes=2", "--process_index=0"])
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 1 and "need --coordinator" in output


def test_a_start_that_failed_can_be_mended(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere has no checkpoint"):
        training_run.train(config, tmp_path / "run")
    config.init_from = None
    training_run.train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [3, 6]


def test_milestones_and_latest_are_kept(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 12
    config.eval_every_steps = 100
    config.checkpoint_every_steps = 1
    config.keep_latest = 2
    config.keep_every_steps = 5
    training_run.train(config, tmp_path)
    assert checkpoint.steps(tmp_path) == [5, 10, 11, 12]
    with pytest.raises(UserError, match="run evaluate --part=validation"):
        checkpoint.best_step(tmp_path)


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    """A limit on the size of files acts like a full disk."""
    config.model.dense_features = 256  # a checkpoint of about 3 MB
    config.num_train_steps = 3
    training_run.train(config, tmp_path / "run")
    config.num_train_steps = 6
    command = runs.command(tmp_path, config, tmp_path / "run")
    limit = 200_000
    script = (
        "import resource, sys, runpy\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = {command[2:]!r}\n"
        "runpy.run_module('synister_jax.train', run_name='__main__')\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    process = runs.start([command[0], "-c", script])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "cannot write a checkpoint to" in output.splitlines()[-1]
    assert checkpoint.steps(tmp_path / "run") == [3]
    training_run.train(config, tmp_path / "run")  # without the limit
    assert checkpoint.steps(tmp_path / "run") == [3, 6]


@pytest.mark.slow
def test_vanished_shards_stop_the_run(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    folder = shutil.copytree(config.shards, tmp_path / "shards")
    config.shards = str(folder)
    config.num_train_steps = 100_000
    config.checkpoint_every_steps = 5
    config.eval_every_steps = 100_000
    process = runs.start(runs.command(tmp_path, config, tmp_path / "run"))
    wait_for(tmp_path / "run" / "checkpoints" / "5", process)
    for path in folder.glob("*.array_record"):
        with path.open("rb+") as file:  # like lost data
            file.truncate(16)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "cannot read a batch from shards" in output
    last = checkpoint.steps(tmp_path / "run")[-1]
    state = runs.saved_state(tmp_path / "run", last, config)
    assert state[".step"] == last
    again = runs.start(runs.command(tmp_path, config, tmp_path / "run"))
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 1 and "the manifest says" in output


def test_workdir_that_cannot_be_written(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    (tmp_path / "file").write_text("")
    process = runs.start(runs.command(tmp_path, config, tmp_path / "file" / "run"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "cannot write to" in output and "Traceback" not in output


def test_fine_tuning_starts_from_the_other_run(
    tmp_path: pathlib.Path,
    config: ml_collections.ConfigDict,
    capfd: pytest.CaptureFixture,
) -> None:
    training_run.train(config, tmp_path / "first")
    first = runs.saved_state(tmp_path / "first", 6, config)
    config.init_from = str(tmp_path / "first")
    config.learning_rate = 1e-9  # practically no training
    config.num_train_steps = 1
    training_run.train(config, tmp_path / "same")
    same = runs.saved_state(tmp_path / "same", 1, config)
    for name, values in first.items():
        if name.startswith(".params"):
            np.testing.assert_allclose(same[name], values, atol=1e-7, err_msg=name)
    assert "weights of" in capfd.readouterr().out

    config.classes = ("gaba", "dopamine")
    index = files.read_json(pathlib.Path(config.shards) / "manifest.json")
    shards_folder = shutil.copytree(config.shards, tmp_path / "shards")
    files.write_json(
        shards_folder / "manifest.json", index | {"classes": list(config.classes)}
    )
    config.shards = str(shards_folder)
    training_run.train(config, tmp_path / "other")
    assert "new: params.logits" in capfd.readouterr().out
    other = runs.saved_state(tmp_path / "other", 1, config)
    kernel = ".params['dense1']['kernel']"
    np.testing.assert_allclose(other[kernel], first[kernel], atol=1e-7)
    assert other[".params['logits']['kernel']"].shape == (16, 2)

    config.model.features = 4
    with pytest.raises(UserError, match="of another architecture"):
        training_run.train(config, tmp_path / "wider")
