# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import time

import grain
import jax
import ml_collections
import numpy as np
import optax
import pyarrow as pa
import pytest
from conftest import CLASSES, tiny_config
from pyarrow import feather
from tensorboardX.proto import event_pb2

from configs import skeleton
from synister_jax import (
    checkpoint,
    data,
    evaluate,
    files,
    inference,
    metrics,
    model,
    sharding,
    train,
)
from synister_jax.command import UserError

TESTS = pathlib.Path(__file__).parent


@pytest.fixture
def config(shards_folder: pathlib.Path) -> ml_collections.ConfigDict:
    config = tiny_config()
    config.shards = str(shards_folder)
    return config


def saved_state(workdir: pathlib.Path, step: int, config: object) -> dict:
    """All arrays of a checkpoint, by name."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    tx = optax.adam(config.learning_rate)
    abstract = jax.eval_shape(
        lambda key: train.create_state(key, config, tx), jax.random.key(0)
    )
    abstract = sharding.abstract(abstract, sharding.replicated(mesh))
    state = checkpoint.load_variables(workdir, step, abstract, config)
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name, strict=True)


def test_resume_is_bitwise(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    """6 steps = 3 steps, end, 3 steps."""
    train.train(config, tmp_path / "whole")
    config.num_train_steps = 3
    train.train(config, tmp_path / "halves")
    config.num_train_steps = 6
    train.train(config, tmp_path / "halves")
    assert checkpoint.steps(tmp_path / "halves") == [3, 6]
    whole = saved_state(tmp_path / "whole", 6, config)
    assert_same_state(whole, saved_state(tmp_path / "halves", 6, config))
    assert whole[".step"] == 6
    lines = {name: metrics.read(tmp_path / name) for name in ("whole", "halves")}
    assert lines["whole"] == lines["halves"]
    assert [x["step"] for x in lines["whole"] if "train/loss" in x] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert [x["step"] for x in lines["whole"] if "validation/loss" in x] == [3, 6]


def test_killed_and_resumed_is_bitwise(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    """kill -9 of the command between checkpoints; the same command goes on."""
    config.num_train_steps = 40
    config.checkpoint_every_steps = 5
    config.keep_latest = 20
    config.eval_every_steps = 20
    train.train(config, tmp_path / "whole")
    (tmp_path / "config.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from conftest import tiny_config\n"
        "def get_config():\n"
        "    config = tiny_config()\n"
        "    config.num_train_steps = 40\n"
        "    config.checkpoint_every_steps = 5\n"
        "    config.keep_latest = 20\n"
        "    config.eval_every_steps = 20\n"
        "    return config\n"
    )
    command = [sys.executable, "-m", "synister_jax.train"]
    command += [
        f"--config={tmp_path / 'config.py'}",
        f"--workdir={tmp_path / 'killed'}",
    ]
    command += [f"--config.shards={config.shards}"]
    process = subprocess.Popen(command)
    while not (tmp_path / "killed" / "checkpoints" / "10").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    died_at = checkpoint.steps(tmp_path / "killed")[-1]
    assert 10 <= died_at < 40
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"step {died_at} of 40" in finished.stdout
    for step in (died_at, 40):
        whole = saved_state(tmp_path / "whole", step, config)
        assert_same_state(whole, saved_state(tmp_path / "killed", step, config))


def test_one_device_equals_four(config: ml_collections.ConfigDict) -> None:
    """Same losses, parameters and batch statistics after four steps."""
    # Adam's first steps are the signs of gradients, which rounding can turn: a
    # plain descent shows whether the gradients agree.
    tx = optax.sgd(0.05)
    results = []
    for count in (1, 4):
        mesh = sharding.make_mesh(jax.devices()[:count])
        stream = data.train_batches(
            data.open_shards(config), "skeleton", 12, 0, sharding.batch(mesh)
        )
        init = jax.jit(
            lambda key: train.create_state(key, config, tx),
            out_shardings=sharding.replicated(mesh),
        )
        step = jax.jit(lambda state, batch: train.train_step(config, tx, state, batch))
        state, losses = init(jax.random.key(0)), []
        for _ in range(4):
            state, numbers = step(state, next(stream))
            losses.append(float(numbers["loss"]))
        stream.close()
        results.append((losses, state.params, state.batch_stats))
    one, four = map(jax.tree.leaves_with_path, results)
    for (path, a), (_, b) in zip(one, four, strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6, err_msg=name)
    variances = jax.tree.leaves(results[0][2])
    assert all(np.abs(np.asarray(v) - 1).max() > 1e-3 for v in variances)


def test_it_learns(tmp_path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    config.num_train_steps = 60
    config.eval_every_steps = 60
    config.checkpoint_every_steps = 60
    train.train(config, tmp_path)
    lines = metrics.read(tmp_path)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    [last] = [line for line in lines if "validation/loss" in line]
    assert last["validation/synapse_mean_class_accuracy"] > 0.8  # chance is 0.33


def read_events(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    """Scalars of TensorBoard files, by name and step (TFRecord: length, crc, data)."""
    scalars = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            [length] = struct.unpack_from("<Q", content)
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
            content = content[16 + length :]
    return scalars


def test_a_run_leaves_what_others_need(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    train.train(config, tmp_path)
    loaded = checkpoint.load_config(tmp_path)
    assert tuple(loaded.classes) == CLASSES and loaded.seed == 0
    logged = read_events(tmp_path / "events")
    for line in metrics.read(tmp_path):
        for name, value in line.items():
            if name != "step":
                assert logged[name, line["step"]] == pytest.approx(value, rel=1e-6)
    about = json.loads(
        (tmp_path / "checkpoints" / "6" / "_CHECKPOINT_METADATA").read_text()
    )["custom_metadata"]
    assert about["classes"] == list(CLASSES)
    assert about["crop_shape_zyx"] == [4, 16, 16]


def test_other_config_in_the_same_folder_is_refused(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    train.train(config, tmp_path)
    config.num_train_steps = 7  # longer is fine
    train.train(config, tmp_path)
    config.learning_rate = 1e-3
    with pytest.raises(UserError, match="learning_rate = 0.01, now 0.001"):
        train.train(config, tmp_path)
    config.learning_rate = 1e-2
    config.num_train_steps = 5
    with pytest.raises(UserError, match="at step 7 already"):
        train.train(config, tmp_path)


def test_other_crops_in_the_same_folder_are_refused(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 3
    train.train(config, tmp_path / "run")
    moved = shutil.copytree(config.shards, tmp_path / "moved")
    config.shards = str(moved)  # the same data elsewhere is fine
    train.train(config, tmp_path / "run")
    index = feather.read_table(moved / "index.feather")
    parts = index["split_skeleton"].to_pylist()
    parts = ["train" if part == "test" else part for part in parts]
    place = index.column_names.index("split_skeleton")
    changed = index.set_column(place, "split_skeleton", [parts])
    files.write_feather(moved / "index.feather", changed)
    with pytest.raises(UserError, match="a run with crops_sha256 = "):
        train.train(config, tmp_path / "run")


def test_a_table_without_neurons_trains(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    folder = shutil.copytree(config.shards, tmp_path / "shards")
    index = feather.read_table(folder / "index.feather")
    place = index.column_names.index("neuron_id")
    nobody = pa.nulls(len(index), pa.int64())
    index = index.set_column(place, "neuron_id", nobody)
    files.write_feather(folder / "index.feather", index)
    config.shards = str(folder)
    train.train(config, tmp_path / "run")
    evaluate.evaluate(tmp_path / "run", "test")
    [last] = [
        x
        for x in metrics.read(tmp_path / "run")
        if x["step"] == 6 and "validation/loss" in x
    ]
    assert "validation/synapse_accuracy" in last
    assert "validation/neuron_accuracy" not in last


def test_mistakes_stop_at_the_start(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.log_every_steps = 0
    with pytest.raises(UserError, match="config.log_every_steps is 0"):
        train.train(config, tmp_path)
    config.log_every_steps = 1
    config.batch_size = 10
    with pytest.raises(UserError, match="batch size 10 is not divisible by 4"):
        train.train(config, tmp_path)
    config.batch_size = 12
    config.split = "hemilineage"
    with pytest.raises(UserError, match="no split 'hemilineage'"):
        train.train(config, tmp_path)
    config.split = "skeleton"
    config.crop_shape_zyx = (4, 32, 32)
    with pytest.raises(UserError, match="do not fit the config"):
        train.train(config, tmp_path)
    config.shards = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="are not there"):
        train.train(config, tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_divergence_stops_with_the_step(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    """What is ruined is never saved: the same command stops at the same step again."""
    config.checkpoint_every_steps = 1
    config.log_every_steps = 5
    config.learning_rate = 1e30
    for _ in range(2):
        with pytest.raises(UserError, match="no finite parameters, at step [12];"):
            train.train(config, tmp_path)
    for step in checkpoint.steps(tmp_path):
        for name, values in saved_state(tmp_path, step, config).items():
            assert np.isfinite(values).all(), name


@pytest.mark.slow
def test_published_configuration_steps_and_restores(tmp_path: pathlib.Path) -> None:
    """16×160×160, 332 M parameters: one step, saved, restored bitwise, predicted."""
    config = skeleton.get_config()
    config.batch_size = 2
    mesh = sharding.make_mesh(jax.devices()[:1])
    tx = optax.adam(config.learning_rate)
    init = jax.jit(
        lambda key: train.create_state(key, config, tx),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    rng = np.random.default_rng(0)
    batch = {
        "crop": rng.integers(0, 256, (2, 18, 180, 180), dtype=np.uint8),
        "label": np.array([0, 5], np.int32),
    }
    step = jax.jit(
        lambda state, batch: train.train_step(config, tx, state, batch),
        donate_argnums=0,
    )
    state, numbers = step(init(jax.random.key(0)), batch)
    assert 1 < float(numbers["loss"]) < 4  # ln 6 = 1.8

    stream = iter(grain.MapDataset.range(10).to_iter_dataset())
    checkpointer = checkpoint.Checkpointer(tmp_path, config)
    checkpointer.save(1, state, stream)
    checkpointer.close()
    abstract = sharding.abstract(state, sharding.replicated(mesh))
    restored = checkpoint.Checkpointer(tmp_path, config).restore(abstract, stream)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    stream.close()

    checkpoint.save_config(tmp_path, config, "")
    classifier = inference.Classifier(tmp_path, None, 1, mesh)
    probabilities = classifier(batch["crop"][:1, 1:-1, 10:-10, 10:-10])
    assert probabilities.shape == (1, 6)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    assert model.from_config(config).dense_features == 4096
