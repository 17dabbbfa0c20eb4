# SPDX-License-Identifier: Apache-2.0
import functools
import json
import pathlib
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pyarrow as pa
import pytest
from pyarrow import feather
from tensorboard.compat.proto import event_pb2

import synister_jax
from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.network import checkpoint, model, sharding
from synister_jax.training import (
    augment,
    checkpoint_evaluation,
    input_pipeline,
    loss_and_optimizer,
    metrics_log,
    train_step,
    training_run,
)
from tests.helpers import runs
from tests.helpers.small_data import CLASSES, tiny_config, write_shards


@pytest.fixture
def config(shards_folder: pathlib.Path) -> ml_collections.ConfigDict:
    config = tiny_config()
    config.shards = str(shards_folder)
    return config


@pytest.fixture(scope="module")
def full(
    tmp_path_factory: pytest.TempPathFactory,
    volume_path: pathlib.Path,
    synapse_table: pa.Table,
) -> ml_collections.ConfigDict:
    """A configuration with every option on, and shards with a large enough margin."""
    config = runs.everything_on()
    folder = tmp_path_factory.mktemp("full") / "shards"
    margin = augment.AugmentSettings.of(config).margin_vx_zyx
    write_shards(folder, volume_path, synapse_table, margin)
    config.shards = str(folder)
    return config


@pytest.mark.long
def test_resume_is_bitwise(
    tmp_path: pathlib.Path, full: ml_collections.ConfigDict
) -> None:
    """A run of 7 steps equals a run that ends after 3 steps and is resumed for 4.

    Every option is on, and a line of the log covers 2 steps.
    """
    config = full.copy_and_resolve_references()
    config.schedule = "constant"  # a falling rate depends on the number of steps
    config.log_every_steps = 2
    config.num_train_steps = 7
    training_run.train(config, tmp_path / "whole")
    config.num_train_steps = 3
    training_run.train(config, tmp_path / "halves")
    config.num_train_steps = 7
    training_run.train(config, tmp_path / "halves")
    assert checkpoint.steps(tmp_path / "halves") == [3, 6, 7]
    whole = runs.saved_state(tmp_path / "whole", 7, config)
    runs.assert_same_state(whole, runs.saved_state(tmp_path / "halves", 7, config))
    assert whole[".step"] == 7
    lines = {name: metrics_log.read(tmp_path / name) for name in ("whole", "halves")}
    assert lines["whole"] == lines["halves"]
    assert [x["step"] for x in lines["whole"] if "train/loss" in x] == [2, 4, 6]
    assert [x["step"] for x in lines["whole"] if "validation/loss" in x] == [3, 6]
    # The average of the parameters, which is evaluated, lags behind the parameters.
    lag = (
        whole[".ema['params']['dense0']['kernel']"]
        - whole[".params['dense0']['kernel']"]
    )
    assert np.abs(lag).max() > 0


@pytest.mark.long
def test_killed_and_resumed_is_bitwise(
    tmp_path: pathlib.Path, full: ml_collections.ConfigDict
) -> None:
    """After kill -9 between checkpoints, the same command continues the run exactly.

    The command has one device, as most users have. Convolutions then use the CPU's
    library.
    """
    config = full.copy_and_resolve_references()
    config.num_train_steps = 40
    config.checkpoint_every_steps = 5
    config.keep_latest = 20
    config.eval_every_steps = 20
    whole = runs.start(runs.command(tmp_path, config, tmp_path / "whole"), devices=1)
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    command = runs.command(tmp_path, config, tmp_path / "killed")
    process = runs.start(command, devices=1)
    while not (tmp_path / "killed" / "checkpoints" / "10").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    died_at = checkpoint.steps(tmp_path / "killed")[-1]
    assert 10 <= died_at < 40
    again = runs.start(command, devices=1)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert f"step {died_at} of 40" in output
    for step in (died_at, 40):
        whole = runs.saved_state(tmp_path / "whole", step, config)
        runs.assert_same_state(
            whole, runs.saved_state(tmp_path / "killed", step, config)
        )
    assert metrics_log.read(tmp_path / "whole") == metrics_log.read(tmp_path / "killed")


def run_steps(
    config: ml_collections.ConfigDict,
    devices: int,
    head_devices: int = 1,
    steps: int = 4,
) -> tuple[list[float], train_step.TrainState]:
    """Returns the losses and the state after some steps of plain gradient descent.

    Adam's first steps are the signs of the gradients, which rounding can change. Plain
    gradient descent shows whether the gradients agree.
    """
    tx = optax.sgd(0.05)
    mesh = sharding.make_mesh(jax.devices()[:devices], head_devices)
    examples = input_pipeline.TrainBatches.of(
        input_pipeline.open_shards(config), config
    )
    stream = examples.stream(0, sharding.batch(mesh))
    key = jax.random.key(0)
    abstract = sharding.abstract_state(
        jax.eval_shape(lambda key: train_step.create_state(key, config, tx), key), mesh
    )
    placed = sharding.shardings(abstract)
    init = jax.jit(
        lambda key: train_step.create_state(key, config, tx), out_shardings=placed
    )
    network = model.from_config(config, sharding.head_input(mesh))
    step = jax.jit(
        functools.partial(train_step.train_step, config, network, tx),
        out_shardings=(placed, None),
    )
    state, losses = init(key), []
    for _ in range(steps):
        state, numbers = step(state, next(stream))
        losses.append(float(numbers["loss"]))
    stream.close()
    return losses, state


@pytest.fixture(scope="module")
def on_one_device(
    full: ml_collections.ConfigDict,
) -> tuple[list[float], train_step.TrainState]:
    return run_steps(full, 1)


@pytest.mark.long
@pytest.mark.parametrize("head_devices", [1, 2])
def test_one_device_equals_four(
    full: ml_collections.ConfigDict,
    on_one_device: tuple[list[float], train_step.TrainState],
    head_devices: int,
) -> None:
    """Losses, parameters, averages and batch statistics agree after four steps."""
    on_four = run_steps(full, 4, head_devices)
    kernel = on_four[1].params["dense0"]["kernel"]
    assert len(kernel.sharding.device_set) == 4
    columns = kernel.addressable_shards[0].data.shape[1]
    assert columns == kernel.shape[1] // head_devices
    one, four = (
        jax.tree.leaves_with_path((losses, s.params, s.batch_stats, s.ema))
        for losses, s in (on_one_device, on_four)
    )
    for (path, a), (_, b) in zip(one, four, strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6, err_msg=name)
    variances = jax.tree.leaves(on_four[1].batch_stats)
    assert all(np.abs(np.asarray(v) - 1).max() > 1e-3 for v in variances)


@pytest.mark.long
def test_accumulated_gradients_are_the_mean_over_the_parts(
    full: ml_collections.ConfigDict,
) -> None:
    """A step descends by the mean of the gradients of the parts' own forward passes."""
    config = full.copy_and_resolve_references()
    config.accumulate_steps = 3
    config.model.dropout = 0.0
    config.ema_decay = 0.0
    losses, state = run_steps(config, 1, steps=1)
    network = model.from_config(config)
    first = train_step.create_state(jax.random.key(0), config, optax.sgd(0.05))
    examples = input_pipeline.TrainBatches.of(
        input_pipeline.open_shards(config), config
    )
    batch = examples.read(examples.rows(0))
    keys = augment.batch_keys(config.seed, 0, config.batch_size)
    settings = augment.AugmentSettings.of(config)
    crops = jax.jit(lambda r, k: augment.augment(r, k, settings))(batch["crop"], keys)

    def loss(
        params: dict, stats: dict, crops: jax.Array, labels: np.ndarray
    ) -> tuple[jax.Array, dict]:
        logits, updated = network.apply(
            {"params": params, "batch_stats": stats},
            crops,
            train=True,
            mutable=["batch_stats"],
        )
        value = loss_and_optimizer.losses(logits, labels, config).mean()
        return value, updated["batch_stats"]

    grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    stats, grads, values = first.batch_stats, [], []
    for part in range(3):
        of_part = crops[part::3], batch["label"][part::3]
        (value, stats), grad = grad_fn(first.params, stats, *of_part)
        grads.append(grad)
        values.append(float(value))
    np.testing.assert_allclose(losses[0], np.mean(values), rtol=1e-5)
    expected = jax.tree.map(lambda p, *g: p - 0.05 * sum(g) / 3, first.params, *grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (state.params, state.batch_stats),
        (expected, stats),
    )


@pytest.mark.long
def test_bfloat16_trains_with_float32_state(
    full: ml_collections.ConfigDict,
    on_one_device: tuple[list[float], train_step.TrainState],
) -> None:
    config = full.copy_and_resolve_references()
    config.compute_dtype = "bfloat16"
    half, state = run_steps(config, 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {
        jnp.dtype("float32")
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(state.batch_stats)} == {
        jnp.dtype("float32")
    }
    whole, _ = on_one_device
    np.testing.assert_allclose(half, whole, rtol=0.05)
    assert half != whole


def test_it_learns(tmp_path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    config.num_train_steps = 60
    config.eval_every_steps = 60
    config.checkpoint_every_steps = 60
    training_run.train(config, tmp_path)
    lines = metrics_log.read(tmp_path)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    [last] = [line for line in lines if "validation/loss" in line]
    assert last["validation/synapse_mean_class_accuracy"] > 0.8  # chance is 0.33


def read_events(folder: pathlib.Path) -> dict[tuple[str, int], float | str]:
    """Returns the content of TensorBoard files by name and step.

    A record of TFRecord is a length and its checksum, then the data and their checksum.
    """
    scalars = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            [length] = struct.unpack_from("<Q", content)
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                is_picture = value.HasField("image")
                scalars[value.tag, event.step] = (
                    "picture" if is_picture else value.simple_value
                )
            content = content[16 + length :]
    return scalars


@pytest.mark.long
def test_a_run_leaves_what_others_need(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    training_run.train(config, tmp_path)
    loaded = checkpoint.load_config(tmp_path)
    assert tuple(loaded.classes) == CLASSES and loaded.seed == 0
    logged = read_events(tmp_path / "events")
    for line in metrics_log.read(tmp_path):
        for name, value in line.items():
            if name != "step":
                assert logged[name, line["step"]] == pytest.approx(value, rel=1e-6)
    about = json.loads(
        (tmp_path / "checkpoints" / "6" / "_CHECKPOINT_METADATA").read_text()
    )["custom_metadata"]
    assert about["classes"] == list(CLASSES)
    assert about["crop_shape_zyx"] == [4, 16, 16]
    assert about["crops_sha256"] == loaded.crops_sha256 != ""
    assert about["code"].startswith(synister_jax.__version__)
    assert about["config"]["learning_rate"] == 1e-2
    pictures = {path.name for path in (tmp_path / "snapshots").iterdir()}
    assert "augmented-00000000.png" in pictures
    assert "validation_confusion-00000006.png" in pictures
    assert logged["validation_confusion", 6] == logged["augmented", 0] == "picture"


@pytest.mark.long
def test_other_config_in_the_same_folder_is_refused(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    training_run.train(config, tmp_path)
    config.num_train_steps = 7  # a longer training is fine
    training_run.train(config, tmp_path)
    config.learning_rate = 1e-3
    with pytest.raises(
        UserError, match="learning_rate = 0.01, but this command has 0.001"
    ):
        training_run.train(config, tmp_path)
    config.learning_rate = 1e-2
    config.num_train_steps = 5
    with pytest.raises(UserError, match="at step 7 already"):
        training_run.train(config, tmp_path)


@pytest.mark.long
def test_other_crops_in_the_same_folder_are_refused(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.num_train_steps = 3
    training_run.train(config, tmp_path / "run")
    moved = shutil.copytree(config.shards, tmp_path / "moved")
    config.shards = str(moved)  # the same data in another folder is fine
    training_run.train(config, tmp_path / "run")
    index = feather.read_table(moved / "index.feather")
    parts = index["split_skeleton"].to_pylist()
    parts = ["train" if part == "test" else part for part in parts]
    place = index.column_names.index("split_skeleton")
    changed = index.set_column(place, "split_skeleton", [parts])
    files.write_feather(moved / "index.feather", changed)
    with pytest.raises(UserError, match="a run with crops_sha256 = "):
        training_run.train(config, tmp_path / "run")


@pytest.mark.long
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
    training_run.train(config, tmp_path / "run")
    checkpoint_evaluation.evaluate(tmp_path / "run", "test")
    [last] = [
        x
        for x in metrics_log.read(tmp_path / "run")
        if x["step"] == 6 and "validation/loss" in x
    ]
    assert "validation/synapse_accuracy" in last
    assert "validation/neuron_accuracy" not in last


@pytest.mark.long
def test_mistakes_stop_at_the_start(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    config.log_every_steps = 0
    with pytest.raises(UserError, match="config.log_every_steps is 0"):
        training_run.train(config, tmp_path)
    config.log_every_steps = 1
    config.batch_size = 10
    with pytest.raises(UserError, match="batch size 10 is not divisible by 4"):
        training_run.train(config, tmp_path)
    config.batch_size = 12
    config.split = "hemilineage"
    with pytest.raises(UserError, match="no split 'hemilineage'"):
        training_run.train(config, tmp_path)
    config.split = "skeleton"
    config.crop_shape_zyx = (4, 32, 32)
    with pytest.raises(UserError, match="do not fit the config"):
        training_run.train(config, tmp_path)
    config.shards = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="are not there"):
        training_run.train(config, tmp_path)
    assert list(tmp_path.iterdir()) == []  # no run was started
