# SPDX-License-Identifier: Apache-2.0
"""Measures the training examples per second of our input and of a gunpowder pipeline.

    .venv-bench/bin/python -m benchmarks.bench_input --folder=FOLDER --texture=URI

There are three sides:

- `ours_host` is `TrainBatches.stream`. Grain's threads read and decode the records of
  shards (crop and margin, uint8), and the batch is copied to the device.
- In `ours_with_augmentation` the device also augments the records, as in a training
  step. If the device is the CPU, the same cores read and augment. The time to cut the
  shards does not count.
- `gunpowder` is gunpowder 1.4.4 with the nodes that the original trains with. Their
  order is that of the original, and their numbers come from the same config. The
  batches stay in the memory of the host. A node of the original gets the synapses from
  MongoDB. Here the synapses are in memory.

The volume is N5 (gzip, chunks of 16×128×128). It repeats the `--texture`, or smooth
noise. The synapses are at random positions, where no crop needs padding. The files of
volume and shards are in the cache of the operating system.

Each side runs in a process of its own. In a turn, the side starts again, gives some
batches that do not count, and then gives batches for `--seconds`. The consumer always
waits for the next batch, so there is no stock of ready samples. `batches` in the report
describes a batch of each side.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

from benchmarks import command_line, made_inputs, side_by_side
from synister_jax.base import command, files
from synister_jax.em import volumes
from synister_jax.network import input_scaling, sharding
from synister_jax.tables import synapses
from synister_jax.training import augment, input_pipeline, shards

_TEXTURE = command_line.define_texture()
_SECONDS = flags.DEFINE_float(
    "seconds", 8.0, "Measure at least this many seconds in a turn.", lower_bound=0.1
)

_OURS = ("ours_host", "ours_with_augmentation")
_SYNAPSES = 300  # in all classes together
_WORKERS = len(os.sched_getaffinity(0))  # processes of gunpowder's PreCache
_PRECACHE_SAMPLES = 40
_WARM_UP_BATCHES = 4  # as many as Grain prepares in advance

Batches = Iterator[tuple[Any, Any]]  # the crops and the labels [batch] of a side


def main() -> None:
    config, side = command_line.CONFIG.value, command_line.SIDE.value
    command_line.require("gunpowder")
    if side == "gunpowder":
        _serve(lambda: _gunpowder_batches(config), config, np.asarray)
    elif side:
        _serve_ours(config, augments=side == "ours_with_augmentation")
    else:
        _compare(config)


def _compare(config: ml_collections.ConfigDict) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for JSON only
        made = _make(command_line.folder(), config)
    sys.argv.append(f"--config.shards={made.folder}")  # for the children
    child_of = {name: name for name in (*_OURS, "gunpowder")}
    report: dict[str, Any] = {}
    for allocator in side_by_side.ALLOCATORS:
        found = side_by_side.compare_children(
            child_of, command_line.ROUNDS.value, allocator, ("batches",)
        )
        for name, batch in found["batches"].items():
            shape = [config.batch_size, *config.crop_shape_zyx]
            if batch["shape"] != shape or not -1 <= batch["min"] < batch["max"] <= 1:
                raise RuntimeError(f"{name} must give {shape} in [-1, 1]: {batch}")
        rates = _to_gunpowder(found["rounds"])
        report |= rates if allocator == "default" else {"allocator_huge": rates}
    report |= {"batches": found["batches"], "seconds_of_a_turn": _SECONDS.value}
    report |= {"gunpowder_workers": _WORKERS, "synapses": _SYNAPSES}
    report["texture"] = _TEXTURE.value or "noise"
    command_line.print_report("input", "examples/s", report, config)


def _to_gunpowder(rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the medians, the rounds, and the ratios of our sides to gunpowder."""
    found = {name: side_by_side.summary(rounds, name) for name in _OURS}
    return {"rates": side_by_side.medians(rounds), "rounds": rounds} | {
        f"{what}_to_gunpowder": {n: of[what]["gunpowder"] for n, of in found.items()}
        for what in ("ratio", "ratio_range")
    }


def _serve(
    start: Callable[[], contextlib.AbstractContextManager[Batches]],
    config: ml_collections.ConfigDict,
    crops_of: Callable[[Any], np.ndarray],
) -> None:
    """Answers requests in the child process of one side.

    Args:
      start: starts the side, which stops at the end of the context.
      config: the config that all sides share.
      crops_of: converts the crops of a batch to inputs of the network.
    """

    def turn() -> float:
        with start() as batches:
            pending = next(batches)
            for count in itertools.count(-_WARM_UP_BATCHES):
                if count == 0:
                    began = time.perf_counter()
                # As in training, the next batch is prepared while the device works.
                pending, before = next(batches), pending
                jax.block_until_ready(before)
                if count > 0 and time.perf_counter() - began >= _SECONDS.value:
                    break
            seconds = time.perf_counter() - began
            jax.block_until_ready(pending)
        return (count + 1) * config.batch_size / seconds

    def describe() -> dict[str, Any]:
        with start() as batches:
            crops, labels = next(batches)
            crops = crops_of(crops)
        numbers = {"min": crops.min(), "max": crops.max(), "mean": crops.mean()}
        numbers["standard_deviation"] = crops.std()
        found = {name: float(value) for name, value in numbers.items()}
        return found | {"shape": crops.shape, "labels": np.unique(labels).tolist()}

    side_by_side.serve({command_line.SIDE.value: turn, "batches": describe})


def _serve_ours(config: ml_collections.ConfigDict, augments: bool) -> None:
    examples = input_pipeline.TrainBatches.of(
        input_pipeline.open_shards(config), config
    )
    placed = sharding.batch(sharding.make_mesh())
    settings = augment.AugmentSettings.of(config)

    @jax.jit
    def augmented(records: jax.Array, step: np.int32) -> jax.Array:
        keys = augment.batch_keys(config.seed, step, config.batch_size)
        return augment.augment(records, keys, settings)

    @contextlib.contextmanager
    def start() -> Iterator[Batches]:
        with contextlib.closing(examples.stream(0, placed)) as stream:
            batches = ((batch["crop"], batch["label"]) for batch in stream)
            if augments:
                batches = (
                    (augmented(crops, np.int32(step)), labels)
                    for step, (crops, labels) in enumerate(batches)
                )
            yield batches

    def middle(records: jax.Array) -> np.ndarray:
        return np.asarray(input_scaling.centre(records, config.crop_shape_zyx))

    _serve(start, config, np.asarray if augments else middle)


@contextlib.contextmanager
def _gunpowder_batches(config: ml_collections.ConfigDict) -> Iterator[Batches]:
    import gunpowder as gp  # only this side needs gunpowder

    augmentation = augment.AugmentSettings.of(config)
    made = input_pipeline.open_shards(config)
    volume = pathlib.Path(made.manifest["volume"])
    voxel_size = gp.Coordinate(config.voxel_size_nm_zyx)
    crop = gp.Coordinate(config.crop_shape_zyx) * voxel_size
    shape = gp.Coordinate(made.manifest["volume_shape_zyx"]) * voxel_size
    paths = _write_points(made)
    raw, label = gp.ArrayKey("RAW"), gp.ArrayKey("LABEL")
    points = gp.GraphKey("SYNAPSES")
    of_voxels = {raw: gp.ArraySpec(interpolatable=True)}
    of_points = gp.GraphSpec(roi=gp.Roi((0, 0, 0), shape))

    def of_class(name: str) -> gp.Pipeline:
        voxels = gp.ZarrSource(str(volume.parent), {raw: volume.name}, of_voxels)
        located = gp.CsvPointsSource(str(paths[name]), points, [0, 1, 2], of_points)
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
            control_point_spacing=list(augmentation.elastic_spacing_zyx),
            jitter_sigma=list(augmentation.elastic_sigma_zyx),
            rotation_interval=list(augmentation.rotation),
            prob_slip=augmentation.slip_probability,
            prob_shift=augmentation.shift_probability,
            max_misalign=max(augmentation.max_misalign_yx),
            subsample=augmentation.elastic_subsample,
        )
        + gp.SimpleAugment(
            mirror_only=None if augmentation.mirror else [],
            transpose_only=list(augmentation.transpose_axes),
        )
        + gp.IntensityAugment(
            raw,
            *augmentation.intensity_scale,
            *augmentation.intensity_shift,
            z_section_wise=augmentation.intensity_per_section,
        )
        + gp.IntensityScaleShift(raw, 2, -1)
        + gp.PreCache(cache_size=_PRECACHE_SAMPLES, num_workers=_WORKERS)
        + gp.Stack(config.batch_size)
    )
    request = gp.BatchRequest()
    request.add(raw, crop)
    request.add(points, crop / 8)  # the central eighth of the crop along each axis
    request[label] = gp.ArraySpec(nonspatial=True)

    with gp.build(pipeline):
        batches = iter(lambda: pipeline.request_batch(request), None)
        yield ((batch[raw].data, batch[label].data) for batch in batches)


def _write_points(made: shards.Shards) -> dict[str, pathlib.Path]:
    """Writes a CSV file with the positions of the synapses for each class."""
    positions = synapses.positions_nm_zyx(made.index)
    labels = synapses.labels(made.index, made.classes)
    paths = {}
    for label, name in enumerate(made.classes):
        paths[name] = made.folder.with_name(f"{made.folder.name}-{name}.csv")
        np.savetxt(paths[name], positions[labels == label], "%.0f", delimiter=",")
    return paths


def _make(folder: pathlib.Path, config: ml_collections.ConfigDict) -> shards.Shards:
    """Makes the volume, the synapses and the shards, unless they exist already."""
    voxel_size = config.voxel_size_nm_zyx
    # zarr reads an N5 data set only inside a container.
    container = files.make_folder(folder / "volumes.n5")
    files.write_json(container / "attributes.json", {"n5": "2.0.0"})
    path = made_inputs.tiled_volume(
        container, _TEXTURE.value, made_inputs.LARGE_ZYX, voxel_size
    )
    volume = volumes.open(str(path), voxel_size)
    record = made_inputs.record_shape_zyx(config)
    decides = repr((path.name, config.classes, config.split, record))
    digest = hashlib.sha256(decides.encode()).hexdigest()[:12]
    table = made_inputs.synapses(volume, config, _SYNAPSES)
    place = (folder / f"shards-{digest}").resolve()
    return made_inputs.cut_shards(place, table, volume, config)


if __name__ == "__main__":
    command.run(main)
