# SPDX-License-Identifier: Apache-2.0
r"""Compares the accuracy of our trainer with a simple PyTorch loop on equal batches.

    python -m benchmarks.accuracy_against_torch --folder=FOLDER \
        --config=configs/demo.py --shards=demo/shards --seed=0 --seed=1 --seed=2

For each seed, `synister_jax.train` trains a network. A PyTorch loop trains another
network, with the initial weights, loss, Adam and schedule of PyTorch. The loop gets the
same crops in the same order as our trainer. Then both networks are measured on the test
part after their last step. The deviations are standard deviations of the sample.
"""

import contextlib
import shutil
import statistics
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from benchmarks import command_line
from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import metrics
from synister_jax.network import input_scaling, sharding
from synister_jax.training import (
    augment,
    checkpoint_evaluation,
    input_pipeline,
    shards,
    training_run,
    validation,
)

_SHARDS = flags.DEFINE_string(
    "shards", None, "Train with the crops of this folder of shards.", required=True
)
_SEEDS = flags.DEFINE_multi_integer(
    "seed",
    [0, 1, 2],
    "Draw the initial weights and the batches from this seed. Repeat the flag to train "
    "with several seeds.",
    lower_bound=0,
)

# The PyTorch loop does not have these options. Each must have the value that turns the
# option off.
_OFF = {"init_from": None, "class_weights": (), "accumulate_steps": 1}
_OFF |= {"compute_dtype": "float32", "early_stop_evals": 0, "warmup_steps": 0}
_OFF |= {"weight_decay": 0, "clip_norm": 0, "ema_decay": 0}
_OFF |= {"label_smoothing": 0, "focal_gamma": 0}
_NUMBERS = ("accuracy", "mean_class_accuracy")


def main() -> None:
    command_line.require("torch")
    config = command_line.CONFIG.value
    config.shards = _SHARDS.value
    for name, off in _OFF.items():
        if config[name] != off:
            raise UserError(f"config.{name} = {config[name]}: use {off!r}")
    if config.model.network != "vgg3d":
        raise UserError(f"config.model.network = {config.model.network}: use vgg3d")
    training_run.check(config)
    opened = input_pipeline.open_shards(config)
    part = validation.SplitPart.of(opened, config.split, "test")
    found: dict[str, list[dict]] = {"ours": [], "plain_loop": []}
    with contextlib.redirect_stdout(sys.stderr):
        for seed in _SEEDS.value:
            config.seed = seed
            for name, measure in (("ours", _of_ours), ("plain_loop", _of_torch)):
                measured = measure(config, opened, part)
                found[name].append({key: measured[key] for key in _NUMBERS})
                print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    report: dict[str, Any] = {"seeds": _SEEDS.value, "steps": config.num_train_steps}
    report |= {"part": part.name, "synapses": len(part.rows)}
    report["crops_sha256"] = opened.sha256(config.split)
    report |= {name: _summary(results) for name, results in found.items()}
    command_line.print_report("accuracy", "share", report, config)


def _summary(results: list[dict]) -> dict[str, dict]:
    """Returns the values of each number by seed, their mean and their deviation."""
    numbers = {}
    for key in _NUMBERS:
        values = [result[key] for result in results]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        numbers[key] = {"mean": statistics.fmean(values), "deviation": deviation}
        numbers[key]["by_seed"] = values
    return numbers


def _of_ours(
    config: ml_collections.ConfigDict, opened: shards.Shards, part: validation.SplitPart
) -> dict:
    """Trains with our trainer, and returns the numbers of its last checkpoint."""
    workdir = command_line.folder() / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    training_run.train(config.copy_and_resolve_references(), workdir)
    [entry] = checkpoint_evaluation.evaluate(workdir, part.name)["checkpoints"]
    return {key: entry[f"synapse_{key}"] for key in _NUMBERS}


def _of_torch(
    config: ml_collections.ConfigDict, opened: shards.Shards, part: validation.SplitPart
) -> dict:
    """Trains with the PyTorch loop, and returns the same numbers at its end."""
    import torch

    from tests.helpers import torch_networks

    def to_torch(crops: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(crops))[:, None]

    torch.manual_seed(config.seed)
    network = torch_networks.Vgg3D.of(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    schedule = None
    if config.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, config.num_train_steps
        )
    loss_of = torch.nn.CrossEntropyLoss()
    examples = input_pipeline.TrainBatches.of(opened, config)
    settings = augment.AugmentSettings.of(config)
    augmented = jax.jit(lambda crops, keys: augment.augment(crops, keys, settings))
    total = config.num_train_steps * config.batch_size
    progress = Progress("torch", total, "crops")
    for step in range(config.num_train_steps):
        batch = examples.read(examples.rows(step))
        keys = augment.batch_keys(config.seed, step, config.batch_size)
        crops = to_torch(augmented(batch["crop"], keys))
        loss = loss_of(network(crops), torch.from_numpy(batch["label"]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step % config.log_every_steps == 0:
            progress.note = f"step {step}, loss {loss.item():.3f}"
        progress.add(config.batch_size)
    network.eval()

    @torch.no_grad()
    def classify_batch(records: jax.Array) -> np.ndarray:
        crops = to_torch(input_scaling.centre(records, config.crop_shape_zyx))
        return torch.softmax(network(crops), dim=1).numpy()

    mesh = sharding.make_mesh(jax.devices()[:1])
    table = part.predict(classify_batch, config.batch_size, mesh, {})
    return metrics.measure(table)["synapses"]


if __name__ == "__main__":
    command.run(main)
