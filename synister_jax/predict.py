# SPDX-License-Identifier: Apache-2.0
"""Predicts every synapse of a table in a volume.

    python -m synister_jax.predict --workdir=RUN --synapses=TABLE --volume=URI \
        --output=DIR

Writes DIR/predictions.feather, a row for every row of the table in its order, and
DIR/predictions.json. The work is cut into units of neighbouring synapses; a finished
unit is DIR/parts/part-<unit>.feather and is not done again: kill the command at any
moment and rerun it.
"""

import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from absl import flags
from pyarrow import feather

import synister_jax
from synister_jax import (
    checkpoint,
    command,
    files,
    inference,
    mongo_uri,
    predictions,
    sharding,
    spaces,
    synapses,
    volumes,
)
from synister_jax.command import Progress, UserError

# A unit is written, and lost by a kill, as a whole: some minutes on a CPU.
UNIT_ROWS = 4096
_IDENTITY = ("synapse_id", *synapses.POSITION)


def predict(
    classifier: inference.Classifier,
    table: pa.Table,
    volume: volumes.Volume,
    output: pathlib.Path,
    unit_rows: int = UNIT_ROWS,
    retry_missing: bool = False,
    about: dict[str, Any] | None = None,
) -> pa.Table:
    """Predicts each row of `table` (loaded with `allow_bad_positions`).

    The result has a row for every input row, in order. Its status is `ok`;
    `partly_outside` (the part of the crop outside the volume is 0, as in training);
    `outside` (no voxel of the crop is inside), `missing_data` (a chunk is missing) or
    `bad_position` (coordinates missing or not finite), without probabilities.

    Args:
      retry_missing: do finished units again that have rows with `missing_data`.
      about: provenance for predictions.json and the schema's metadata.

    Raises:
      UserError: the folder holds predictions of other arguments.
    """
    output = files.make_folder(output)
    shape = tuple(classifier.config.crop_shape_zyx)
    starts, status = _crops(table, shape, volume)
    rows = np.flatnonzero(np.isin(status, (volumes.OK, volumes.PARTLY_OUTSIDE)))
    rows = rows[volumes.chunk_order(starts[rows], shape, volume)]
    units = np.array_split(rows, max(1, math.ceil(len(rows) / unit_rows)))
    plan = {
        "rows": len(table),
        "units": len(units),
        "batch_size": classifier.batch_size,
        "synapses_sha256": files.sha256_of_columns(table, _IDENTITY),
        "parameters_sha256": _sha256_of_leaves(classifier.variables),
        "classes": list(classifier.classes),
        "crop_shape_zyx": list(shape),
        "volume": volume.uri,
        "volume_shape_zyx": list(volume.shape_zyx),
        "voxel_size_nm_zyx": list(volume.voxel_size_nm_zyx),
        "offset_nm_zyx": list(volume.offset_nm_zyx),
    }
    files.keep_plan(output / "plan.json", plan)

    parts_folder = files.make_folder(output / "parts")
    paths = [
        parts_folder / f"part-{i:05d}-of-{len(units):05d}.feather"
        for i in range(len(units))
    ]
    if retry_missing:
        for path in paths:
            if path.exists() and not _read_part(path)["whole"].to_numpy().all():
                path.unlink()
    done = sum(len(u) for u, p in zip(units, paths, strict=True) if p.exists())
    progress = Progress("predict", len(rows), "synapses", done=done)
    for unit, path in zip(units, paths, strict=True):
        if not path.exists():
            part = _predict_unit(
                classifier, volume, unit, starts[unit], shape, progress
            )
            files.write_feather(path, part)
    parts = dict(zip(paths, units, strict=True))
    return _merge(table, status, parts, classifier, output, plan, about or {})


def _crops(
    table: pa.Table, shape_zyx: Sequence[int], volume: volumes.Volume
) -> tuple[np.ndarray, np.ndarray]:
    """Crop starts [n, 3] int64, and statuses [n] as far as positions tell them."""
    positions = synapses.positions_nm_zyx(table)
    # Beyond this a voxel index does not fit int64; no volume reaches 9,000 km.
    bad = ~(np.abs(positions) < 2.0**53).all(axis=1)
    positions[bad] = 0
    starts = volumes.crop_starts_vx_zyx(positions, shape_zyx, volume)
    status = volumes.border_status(starts, shape_zyx, volume)
    status[bad] = predictions.BAD_POSITION
    return starts, status


def _predict_unit(
    classifier: inference.Classifier,
    volume: volumes.Volume,
    rows: np.ndarray,
    starts_vx_zyx: np.ndarray,
    shape_zyx: Sequence[int],
    progress: Progress,
) -> pa.Table:
    """{row, whole, <class>…} of one unit; a function of its arguments alone."""
    results, whole = [], []
    crops = volumes.read_crops(volume, starts_vx_zyx, shape_zyx)
    for batch in _batched(crops, classifier.batch_size):
        results.append(classifier(np.stack([crop for crop, _ in batch])))
        whole.extend(is_whole for _, is_whole in batch)
        progress.add(len(batch))
    probabilities = np.zeros((0, len(classifier.classes)), np.float32)
    probabilities = np.concatenate([probabilities, *results])
    columns = {"row": rows, "whole": np.asarray(whole, bool)}
    for index, name in enumerate(classifier.classes):
        columns[name] = probabilities[:, index]
    return pa.table(columns)


def _batched(
    crops: Iterator[tuple[np.ndarray, bool]], size: int
) -> Iterator[list[tuple[np.ndarray, bool]]]:
    batch = []
    for crop in crops:
        batch.append(crop)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_part(path: pathlib.Path) -> pa.Table:
    try:
        return feather.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; delete it and rerun") from None


def _merge(
    table: pa.Table,
    status: np.ndarray,
    parts: dict[pathlib.Path, np.ndarray],
    classifier: inference.Classifier,
    output: pathlib.Path,
    plan: dict[str, Any],
    about: dict[str, Any],
) -> pa.Table:
    status = status.copy()
    probabilities = np.full((len(table), len(classifier.classes)), np.nan, np.float32)
    for path, unit in parts.items():
        part = _read_part(path)
        rows, whole = part["row"].to_numpy(), part["whole"].to_numpy()
        if not np.array_equal(rows, unit):
            raise UserError(f"{path} is not the part of its unit; delete it and rerun")
        values = [part[name].to_numpy() for name in classifier.classes]
        probabilities[rows[whole]] = np.stack(values, axis=1)[whole]
        status[rows[~whole]] = volumes.MISSING_DATA
    about = about | {"step": classifier.step, "volume": plan["volume"]}
    result = predictions.build(table, probabilities, status, classifier.classes, about)
    names, counts = np.unique(status.astype(str), return_counts=True)
    record = (
        plan
        | about
        | {
            "status": dict(zip(names.tolist(), counts.tolist(), strict=True)),
            "config": json.loads(classifier.config.to_json_best_effort()),
            "written_by": f"synister_jax {synister_jax.__version__}",
        }
    )
    files.write_feather(output / "predictions.feather", result)
    files.write_json(output / "predictions.json", record)
    return result


def _sha256_of_leaves(variables: inference.Variables) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(variables):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def main() -> None:
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    step = flags.DEFINE_string("step", None, "Checkpoint: a number or `best`.")
    table = flags.DEFINE_string("synapses", None, "Synapse table.")
    volume = flags.DEFINE_string("volume", None, "Volume.")
    voxel_size = flags.DEFINE_list(
        "voxel_size_nm_zyx",
        None,
        "The volume's, where it is meant to differ from the network's.",
    )
    output = flags.DEFINE_string("output", None, "Folder of predictions.")
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    unit_rows = flags.DEFINE_integer(
        "unit_rows", UNIT_ROWS, "Synapses of a work unit.", lower_bound=1
    )
    retry_missing = flags.DEFINE_bool(
        "retry_missing", False, "Do finished units with missing data again."
    )
    flags.mark_flags_as_required(["workdir", "synapses", "volume", "output"])

    def run() -> None:
        run_folder = pathlib.Path(workdir.value)
        texts = None if step.value is None else [step.value]
        if texts == ["all"]:
            raise UserError("--step=all: give one checkpoint, a number or `best`")
        [chosen] = checkpoint.parse_steps(run_folder, texts) or [None]
        classifier = inference.Classifier(
            run_folder, chosen, batch_size.value, sharding.make_mesh()
        )
        size = classifier.config.voxel_size_nm_zyx
        if voxel_size.value is not None:
            size = command.three_numbers("voxel_size_nm_zyx", voxel_size.value, True)
        rows = synapses.load(table.value, allow_bad_positions=True)
        opened = volumes.open(volume.value, size)
        # A warning only: every row is answered, those outside too.
        if doubt := spaces.doubt(synapses.positions_nm_zyx(rows), opened):
            print(f"warning: {doubt}", file=sys.stderr)
        result = predict(
            classifier,
            rows,
            opened,
            pathlib.Path(output.value),
            unit_rows.value,
            retry_missing.value,
            {"workdir": workdir.value, "synapses": mongo_uri.redact(table.value)},
        )
        names, counts = np.unique(result["status"].to_pylist(), return_counts=True)
        shown = ", ".join(f"{n:,} {s}" for s, n in zip(names, counts, strict=True))
        print(f"{output.value}/predictions.feather: {len(result):,} rows: {shown}")

    command.run(run)


if __name__ == "__main__":
    main()
