# SPDX-License-Identifier: Apache-2.0
"""Does our trainer reach the accuracy of a plain PyTorch loop on the same batches?

    python benchmarks/accuracy_against_torch.py --config=configs/demo.py \
        --shards=demo/shards --seeds=0,1,2 > accuracy.json

For each seed: synister_jax.train into a temporary folder; and PyTorch's own network,
initial weights, loss, Adam and schedule on the very crops that our step would get, in
the same order. Then both last states on all of `--part`. Progress goes to stderr, one
line of JSON to stdout; deviations are of the sample.
"""

import contextlib
import json
import pathlib
import statistics
import sys
import tempfile

import jax
import ml_collections
import numpy as np
import torch
import torch_networks
from absl import flags
from ml_collections import config_flags

from synister_jax import evaluate, train
from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import measurement
from synister_jax.network import sharding
from synister_jax.training import augment, data, shards

_CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", lock_config=True)
_SHARDS = flags.DEFINE_string("shards", None, "Folder of shards.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of weights and batches.")
_PART = flags.DEFINE_enum(
    "part", "test", ["train", "validation", "test"], "What is evaluated."
)

# What the loop below does not do, and its value when nobody does it.
_OFF = {
    "init_from": None,
    "warmup_steps": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "ema_decay": 0,
    "label_smoothing": 0,
    "focal_gamma": 0,
    "class_weights": (),
    "accumulate_steps": 1,
    "early_stop_evals": 0,
    "compute_dtype": "float32",
}
_NUMBERS = ("accuracy", "mean_class_accuracy")


def main() -> None:
    config = _CONFIG.value
    config.shards = _SHARDS.value
    for name, off in _OFF.items():
        if config[name] != off:
            raise UserError(f"config.{name} = {config[name]}: compared is only {off!r}")
    if config.model.network != "vgg3d":
        raise UserError(f"config.model.network = {config.model.network}: only vgg3d")
    if not _SEEDS.value or not all(seed.isdecimal() for seed in _SEEDS.value):
        raise UserError(f"--seeds={','.join(_SEEDS.value)}: give whole numbers from 0")
    train.check(config)
    opened = data.open_shards(config)
    part = evaluate.Part.of(opened, config.split, _PART.value)

    found: dict[str, list[dict]] = {"ours": [], "torch": []}
    with contextlib.redirect_stdout(sys.stderr):
        for seed in map(int, _SEEDS.value):
            config.seed = seed
            for name, measure in (("ours", of_ours), ("torch", of_torch)):
                measured = measure(config, opened, part)
                found[name].append({key: measured[key] for key in _NUMBERS})
                print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    report = {
        "seeds": [int(seed) for seed in _SEEDS.value],
        "steps": config.num_train_steps,
        "batch_size": config.batch_size,
        "part": part.name,
        "synapses": len(part.rows),
        "crops_sha256": opened.sha256(config.split),
    }
    report |= {name: summary(results) for name, results in found.items()}
    report["ours_minus_torch"] = {
        key: report["ours"][key]["mean"] - report["torch"][key]["mean"]
        for key in _NUMBERS
    }
    report["versions"] = {"jax": jax.__version__, "torch": torch.__version__}
    report["device"] = jax.devices()[0].device_kind
    print(json.dumps(report))


def summary(results: list[dict]) -> dict[str, dict]:
    """Of each number the values by seed, their mean and their deviation."""
    numbers = {}
    for key in _NUMBERS:
        values = [result[key] for result in results]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        mean = statistics.fmean(values)
        numbers[key] = {"by_seed": values, "mean": mean, "deviation": deviation}
    return numbers


def of_ours(
    config: ml_collections.ConfigDict, opened: shards.Shards, part: evaluate.Part
) -> dict:
    """The numbers per synapse of our trainer's last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        train.train(config.copy_and_resolve_references(), workdir)
        [entry] = evaluate.evaluate(workdir, part.name)["checkpoints"]
    return {key: entry[f"synapse_{key}"] for key in _NUMBERS}


def of_torch(
    config: ml_collections.ConfigDict, opened: shards.Shards, part: evaluate.Part
) -> dict:
    """The same numbers of the plain loop's network after its last step."""
    torch.manual_seed(config.seed)
    network = torch_networks.Vgg3D.of(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    schedule = None
    if config.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, config.num_train_steps
        )
    loss_of = torch.nn.CrossEntropyLoss()
    examples = data.TrainBatches.of(opened, config)
    settings = augment.Settings.of(config)
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
        crops = to_torch(augment.centre(records, config.crop_shape_zyx))
        return torch.softmax(network(crops), dim=1).numpy()

    mesh = sharding.make_mesh(jax.devices()[:1])
    table = part.predict(classify_batch, config.batch_size, mesh, {})
    return measurement.measure(table)["synapses"]


def to_torch(crops: jax.Array) -> torch.Tensor:
    """[batch, z, y, x] → [batch, 1, z, y, x]."""
    return torch.from_numpy(np.array(crops))[:, None]


if __name__ == "__main__":
    command.run(main)
