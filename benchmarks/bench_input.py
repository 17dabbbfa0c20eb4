# SPDX-License-Identifier: Apache-2.0
"""Training samples a second: shards through Grain, and a gunpowder pipeline.

    make bench-env
    .venv-bench/bin/python benchmarks/bench_input.py --folder=FOLDER [--texture=URI]

`ours_host` is `TrainBatches.stream`: records of shards (crop and margin, uint8) read
and decoded by Grain's threads, until the batch lies on the device. In
`ours_with_augmentation` the device augments them too, by the jitted function and with
the keys of a training step; where the device is the CPU, on the cores that read.

`gunpowder` is gunpowder 1.4.4 with the nodes that the original trains with, in its
order and with the numbers of the same config. For each transmitter: voxels of the N5
and points of the synapses, Normalize, endless padding, RandomLocation around a synapse
(points asked for in the central eighth of the crop). Of these RandomProvider takes one;
then ElasticAugment, SimpleAugment, IntensityAugment, IntensityScaleShift, PreCache (40
samples; `--workers`, one a core), Stack. The original has its synapses from MongoDB in
a node of its own; here they come from files, and the label from RandomProvider: both
are held in memory. Its batches end in the host's memory, ours on the device.

Volume (N5, gzip, chunks of 16×128×128; `--texture` tiled, or smooth noise), synapses
(uniformly random, so that nothing is padded) and shards are made in the folder, stay
there, and lie in the system's cache: no disk is measured. Cutting the shards, once for
all epochs, is not in the rates.

Each side is a process of its own that is idle until its turn: Grain's iterator is
closed after a turn, gunpowder's pipeline torn down and its workers ended. A turn starts
it anew, takes some batches that do not count, then counts batches for `--seconds`; with
the consumer always waiting, no stock of ready samples is built up before. All of it
once with glibc's usual allocator, and once with one that keeps its memory. `batches`
describes what the sides gave, scaled to [-1, 1], the crops of `ours_host` from the
records' middle. Prints one line of JSON.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import random_inputs
import side_by_side
import textures
from absl import flags
from ml_collections import config_flags

from synister_jax.base import command, files
from synister_jax.em import volumes
from synister_jax.network import sharding
from synister_jax.tables import synapses
from synister_jax.training import augment, cutting, data, shards

_FOLDER = flags.DEFINE_string("folder", None, "Where it all is made.", required=True)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_TEXTURE = flags.DEFINE_string("texture", None, "Volume to tile; without it, noise.")
_SHAPE = flags.DEFINE_list(
    "volume_shape_zyx", ["64", "2048", "2048"], "Voxels of the volume."
)
_SYNAPSES = flags.DEFINE_integer("synapses", 300, "Of all classes.", lower_bound=1)
_WORKERS = flags.DEFINE_integer(
    "workers",
    len(os.sched_getaffinity(0)),
    "Processes of gunpowder's PreCache.",
    lower_bound=1,
)
_SECONDS = flags.DEFINE_float("seconds", 8.0, "Of a turn at least.", lower_bound=0.1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_SIDES = ("ours_host", "ours_with_augmentation", "gunpowder")
_SIDE = flags.DEFINE_enum("side", None, _SIDES, "What a child of this script is.")

_PRECACHE_SAMPLES = 40
_WARM_UP_BATCHES = 4  # as many as Grain has ready
_DESCRIBED_BATCHES = 2

# One batch of a side: crops, and labels [batch].
Take = Callable[[], tuple[Any, Any]]


def main() -> None:
    config = _CONFIG.value
    if _SIDE.value == "gunpowder":
        _serve(lambda: _gunpowder_batches(config), config, np.asarray)
    elif _SIDE.value:
        _serve_ours(config, augments=_SIDE.value == "ours_with_augmentation")
    else:
        _compare(config)


def _compare(config: ml_collections.ConfigDict) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # progress; stdout is for JSON
        made = _make(files.make_folder(_FOLDER.value), config)
    missing = importlib.util.find_spec("gunpowder") is None
    if missing:
        print("gunpowder is not installed: not run", file=sys.stderr)
    names = _SIDES[:2] if missing else _SIDES
    timed, batches = {}, {}
    for allocator, environment in side_by_side.ALLOCATORS.items():
        with contextlib.ExitStack() as stack:
            sides = {}
            for name in names:
                started = side_by_side.own_command(
                    f"--side={name}", f"--config.shards={made.folder}"
                )
                child = side_by_side.Child(started, environment)
                sides[name] = stack.enter_context(child)
                batches[name] = sides[name].ask("describe")
                _check(name, batches[name], config)
            print(f"allocator: {allocator}", file=sys.stderr, flush=True)
            rounds = {name: side.round for name, side in sides.items()}
            timed[allocator] = side_by_side.alternate(rounds, _ROUNDS.value)
    report = {
        "benchmark": "input",
        **_summary(timed["default"]),
        "allocator_huge": _summary(timed["huge"]),
        "gunpowder_was": "not run: not installed" if missing else "run",
        "batches": batches,
        "seconds_of_a_turn": _SECONDS.value,
        "gunpowder_workers": _WORKERS.value,
        "grain_read_threads": data._READ.num_threads,
        "batch_size": config.batch_size,
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "record_shape_zyx": made.record_shape_zyx,
        "synapses": _SYNAPSES.value,
        "shards_mib": sum(s["bytes"] for s in made.manifest["shards"]) / 2**20,
        "volume_shape_zyx": made.manifest["volume_shape_zyx"],
        "texture": _TEXTURE.value or "noise",
    }
    # What the sides compute with.
    ours = ("synister_jax", "jax", "jaxlib", "grain", "array_record", "numpy")
    theirs = ("gunpowder", "zarr", "numcodecs", "augment-nd", "scipy")
    print(json.dumps(report | side_by_side.about(*ours, *theirs)))


def _summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, rounds, and what each side of ours is to gunpowder."""
    found = {name: side_by_side.summary(rates, name) for name in _SIDES[:2]}
    medians = found["ours_host"]
    return {
        "rates": medians["rates"],
        "rounds": medians["rounds"],
    } | {
        f"{what}_to_gunpowder": {
            name: of[what].get("gunpowder") for name, of in found.items()
        }
        for what in ("ratio", "ratio_range")
    }


def _check(name: str, found: dict[str, Any], config: ml_collections.ConfigDict) -> None:
    """Raises where a side does not give what the network takes."""
    shape = [config.batch_size, *config.crop_shape_zyx]
    good = found["shape"] == shape and found["dtype"] == "float32"
    good &= -1 <= found["min"] < found["max"] <= 1
    good &= set(found["labels"]) <= set(range(len(config.classes)))
    if not good:
        raise RuntimeError(f"{name} gives other batches than {shape}: {found}")


# ------------------------------------------------------------------ sides, in children


def _serve(
    start: Callable[[], contextlib.AbstractContextManager[Take]],
    config: ml_collections.ConfigDict,
    crops_of: Callable[[Any], np.ndarray],
) -> None:
    """Answers as the child of one side.

    Args:
      start: starts the side, which stops at the context's end.
      crops_of: makes network inputs of what a batch has.
    """

    def turn() -> float:
        with start() as take:
            pending = take()
            for _ in range(_WARM_UP_BATCHES):
                pending, before = take(), pending
                jax.block_until_ready(before)
            count, began = 0, time.perf_counter()
            now = began
            while now - began < _SECONDS.value:
                # As in training, a batch is prepared while the device has another.
                pending, before = take(), pending
                jax.block_until_ready(before)
                count, now = count + 1, time.perf_counter()
            jax.block_until_ready(pending)
        return count * config.batch_size / (now - began)

    def describe() -> dict[str, Any]:
        with start() as take:
            taken = [take() for _ in range(_DESCRIBED_BATCHES)]
        crops = np.stack([crops_of(crops) for crops, _ in taken])
        labels = np.concatenate([labels for _, labels in taken])
        return {
            "shape": crops.shape[1:],
            "dtype": str(crops.dtype),
            "min": float(crops.min()),
            "max": float(crops.max()),
            "mean": float(crops.mean()),
            "standard_deviation": float(crops.std()),
            "labels": sorted(int(label) for label in set(labels)),
        }

    side_by_side.serve({"round": turn, "describe": describe})


def _serve_ours(config: ml_collections.ConfigDict, augments: bool) -> None:
    examples = data.TrainBatches.of(data.open_shards(config), config)
    placed = sharding.batch(sharding.make_mesh())
    settings = augment.Settings.of(config)

    @jax.jit
    def augmented(records: jax.Array, step: np.int32) -> jax.Array:
        keys = augment.batch_keys(config.seed, step, config.batch_size)
        return augment.augment(records, keys, settings)

    @contextlib.contextmanager
    def start() -> Iterator[Take]:
        with contextlib.closing(examples.stream(0, placed)) as stream:
            yield _taking(stream, augmented if augments else None)

    def middle(records: jax.Array) -> np.ndarray:
        return np.asarray(augment.centre(records, config.crop_shape_zyx))

    _serve(start, config, np.asarray if augments else middle)


def _taking(
    stream: grain.DatasetIterator,
    augmented: Callable[[jax.Array, np.int32], jax.Array] | None,
) -> Take:
    step = 0

    def take() -> tuple[jax.Array, jax.Array]:
        nonlocal step
        batch, crops = next(stream), None
        if augmented:
            crops = augmented(batch["crop"], np.int32(step))
        step += 1
        return batch["crop"] if crops is None else crops, batch["label"]

    return take


@contextlib.contextmanager
def _gunpowder_batches(config: ml_collections.ConfigDict) -> Iterator[Take]:
    import gunpowder as gp  # in this side's environment

    settings = augment.Settings.of(config)
    made = data.open_shards(config)
    volume = pathlib.Path(made.manifest["volume"])
    voxel_size = gp.Coordinate(config.voxel_size_nm_zyx)
    crop = gp.Coordinate(config.crop_shape_zyx) * voxel_size
    whole = gp.Roi(
        (0, 0, 0), gp.Coordinate(made.manifest["volume_shape_zyx"]) * voxel_size
    )
    paths = _write_points(made)
    raw, label = gp.ArrayKey("RAW"), gp.ArrayKey("LABEL")
    points = gp.GraphKey("SYNAPSES")

    def of_class(name: str) -> gp.Pipeline:
        voxels = gp.ZarrSource(
            str(volume.parent),
            {raw: volume.name},
            {raw: gp.ArraySpec(interpolatable=True)},
        )
        located = gp.CsvPointsSource(
            str(paths[name]), points, [0, 1, 2], gp.GraphSpec(roi=whole)
        )
        return (
            (voxels, located)
            + gp.MergeProvider()
            + gp.Normalize(raw)
            + gp.Pad(raw, None)
            + gp.RandomLocation(ensure_nonempty=points)
        )

    pipeline = (
        tuple(of_class(name) for name in config.classes)
        + gp.RandomProvider(random_provider_key=label)
        + gp.ElasticAugment(
            control_point_spacing=list(settings.elastic_spacing_zyx),
            jitter_sigma=list(settings.elastic_sigma_zyx),
            rotation_interval=list(settings.rotation),
            prob_slip=settings.slip_probability,
            prob_shift=settings.shift_probability,
            max_misalign=max(settings.max_misalign_yx),
            subsample=settings.elastic_subsample,
        )
        + gp.SimpleAugment(
            mirror_only=None if settings.mirror else [],
            transpose_only=list(settings.transpose_axes),
        )
        + gp.IntensityAugment(
            raw,
            *settings.intensity_scale,
            *settings.intensity_shift,
            z_section_wise=settings.intensity_per_section,
        )
        + gp.IntensityScaleShift(raw, 2, -1)
        + gp.PreCache(cache_size=_PRECACHE_SAMPLES, num_workers=_WORKERS.value)
        + gp.Stack(config.batch_size)
    )
    request = gp.BatchRequest()
    request.add(raw, crop)
    request.add(points, crop / 8)
    request[label] = gp.ArraySpec(nonspatial=True)

    with gp.build(pipeline):

        def take() -> tuple[np.ndarray, np.ndarray]:
            batch = pipeline.request_batch(request)
            return batch[raw].data, batch[label].data

        yield take


def _write_points(made: shards.Shards) -> dict[str, pathlib.Path]:
    """By class, a file with the synapses of the shards."""
    positions = synapses.positions_nm_zyx(made.index)
    labels = synapses.labels(made.index, made.classes)
    paths = {}
    for label, name in enumerate(made.classes):
        paths[name] = made.folder.with_name(f"{made.folder.name}-{name}.csv")
        np.savetxt(paths[name], positions[labels == label], "%.0f", delimiter=",")
    return paths


# ----------------------------------------------------------------------- what is made


def _make(folder: pathlib.Path, config: ml_collections.ConfigDict) -> shards.Shards:
    """Volume, synapses and shards, where they are not there."""
    shape, voxel_size = list(map(int, _SHAPE.value)), config.voxel_size_nm_zyx
    margin = augment.Settings.of(config).margin_vx_zyx
    record = random_inputs.record_shape_zyx(config)
    # To zarr an N5 data set is one of a container.
    container = files.make_folder(folder / "volumes.n5")
    files.write_json(container / "attributes.json", {"n5": "2.0.0"})
    texture = textures.load(_TEXTURE.value, shape, (1, 1, 1))
    path = textures.tiled(container, texture, shape, voxel_size)
    decides = (path.name, _SYNAPSES.value, config.classes, config.split, record)
    digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:12]
    volume = volumes.open(str(path), voxel_size)
    return cutting.write(
        (folder / f"shards-{digest}").resolve(),
        random_inputs.training_synapses(volume, config, _SYNAPSES.value),
        volume,
        crop_shape_zyx=config.crop_shape_zyx,
        margin_vx_zyx=margin,
        classes=config.classes,
    )


if __name__ == "__main__":
    command.run(main)
