# SPDX-License-Identifier: Apache-2.0
"""The two pseudo-classes of the original: extra rows for a table of synapses.

`neither` is a random location in the volume. `unknown` is a synapse that was moved away
from its place. The original draws both while it trains (train_pipeline.py, gp.py). Here
they are a finite number of rows, which are cut, split and evaluated like all others.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes
from synister_jax.tables import synapses

NEITHER, UNKNOWN = "neither", "unknown"
# From sample_radii in gp.py of the original: whole nm, without the upper bound.
_RADIUS_NM = (2_000, 4_000)


def with_extra_classes(
    table: pa.Table,
    volume: volumes.Volume,
    *,
    record_shape_zyx: Sequence[int],
    classes: Sequence[str],
    split: str,
    neither_crops: int,
    unknown_per_class: int,
    seed: int,
) -> pa.Table:
    """Returns the table with the rows of `neither` and then of `unknown` at its end.

    The crops of the new rows, with their context, lie completely in the volume.
    Otherwise the black outside would give these classes away. A new row has a position,
    a class, parts, and one of the ids -1, -2, …; every other column is null. The rows
    depend on the options, the seed, the box of the volume and, for `unknown`, on the
    labelled synapses of `split`. They do not depend on the order of the table or on
    other splits.

    Args:
      table: the synapse table.
      volume: the volume.
      record_shape_zyx: the voxels of a crop with its context.
      classes: the classes of the network. `unknown` is made from their transmitters.
      split: the split whose train part `unknown_per_class` refers to.
      neither_crops: the number of random locations. Every voxel is equally likely. In
        each split, the parts get the same fractions of them as of the synapses that
        have one of `classes`.
      unknown_per_class: move at most this many train synapses of each transmitter, by
        2,000 to 3,999 nm in a random direction. Of the other parts the same fraction is
        moved, rounded up. A moved synapse keeps the parts of its parent. A synapse
        that comes too close to the border of the volume is left out.
      seed: the seed of the draws.

    Raises:
      UserError: the classes and the options do not fit, the table has negative ids, or
        there is no synapse from which `unknown` can be made.
    """
    _check(table, classes, neither_crops, unknown_per_class)
    if not neither_crops and not unknown_per_class:
        return table
    lowest = np.asarray(record_shape_zyx) // 2
    room = np.asarray(volume.shape_zyx) - record_shape_zyx + 1
    if (room < 1).any():
        raise UserError(
            f"volume {volume.uri} has {tuple(volume.shape_zyx)} voxels, but a crop "
            f"with its margin has {tuple(record_shape_zyx)}: random or moved crops do "
            "not fit; use a larger volume"
        )
    nowhere, parts = _random_locations(
        table, volume, lowest, room, classes, neither_crops, seed
    )
    moved, parents = _moved_synapses(table, classes, split, unknown_per_class, seed)
    starts = crops.starts_vx_zyx(moved, record_shape_zyx, volume)
    is_inside = ((starts >= 0) & (starts < room)).all(axis=1)
    if len(moved) and not is_inside.any():
        raise UserError(
            f"all {len(moved):,} synapses that were moved to make examples of "
            f"{UNKNOWN!r} are too close to the border of volume {volume.uri} or "
            "outside; set config.unknown_per_class to 0"
        )
    moved, parents = moved[is_inside], parents[is_inside]
    positions = np.concatenate([nowhere, moved])
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "synapse_id": -1 - np.arange(len(positions), dtype=np.int64),
        "neurotransmitter": [NEITHER] * len(nowhere) + [UNKNOWN] * len(moved),
    }
    columns |= dict(zip(synapses.POSITION, positions.T, strict=True))
    for name in synapses.split_columns(table):
        inherited = table[name].take(pa.array(parents))
        columns[name] = parts[name] + inherited.to_pylist()
    rows = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(positions), field.type)
        for field in table.schema
    ]
    return pa.concat_tables([table, pa.table(rows, schema=table.schema)])


def _check(
    table: pa.Table, classes: Sequence[str], neither_crops: int, unknown_per_class: int
) -> None:
    if NEITHER in classes[:-1]:
        raise UserError(
            f"config.classes: {NEITHER!r} must be the last of {', '.join(classes)}"
        )
    options = {
        NEITHER: ("config.neither_crops", neither_crops),
        UNKNOWN: ("config.unknown_per_class", unknown_per_class),
    }
    for name, (option, count) in options.items():
        if count < 0:
            raise UserError(f"{option} is {count}; give 0 or more")
        if count and name not in classes:
            raise UserError(
                f"{option} is {count:,}, but {name!r} is not one of config.classes "
                f"({', '.join(classes)}); add it there, or set {option} to 0"
            )
        has_rows = (synapses.labels(table, [name]) >= 0).any()
        if name in classes and not count and not has_rows:
            raise UserError(
                f"config.classes names {name!r}, but the synapse table has no row of "
                f"this class and {option} is 0; set {option} above 0, or remove the "
                "class"
            )
        negative = table["synapse_id"].to_numpy() < 0
        if count and negative.any():
            raise UserError(
                f"{option} is {count:,}: the rows that it adds get negative ids, but "
                f"row {negative.argmax()} of the synapse table already has a negative "
                f"id; give the synapses other ids, or set {option} to 0"
            )


def _random_locations(
    table: pa.Table,
    volume: volumes.Volume,
    lowest: np.ndarray,
    room: np.ndarray,
    classes: Sequence[str],
    count: int,
    seed: int,
) -> tuple[np.ndarray, dict[str, list[str | None]]]:
    """Returns positions [count, 3] in nm, and their parts in each split column."""
    rng = np.random.default_rng((seed, 0))
    voxels = lowest + rng.integers(0, room, (count, 3))
    positions = volume.offset_nm_zyx + voxels * np.asarray(volume.voxel_size_nm_zyx)
    has_class = synapses.labels(table, classes) >= 0
    parts = {}
    for column in synapses.split_columns(table):
        part = synapses.index_in(table[column], synapses.PARTS)[has_class]
        ends = np.cumsum(np.bincount(part[part >= 0], minlength=len(synapses.PARTS)))
        # Sort the synapses by part: location i takes the part of the synapse at the
        # fraction (i + ½)/count. So the fractions are exact, and no draw depends on
        # another column. All locations are equally random, so any may be in any part.
        place = (2 * np.arange(count) + 1) * ends[-1]
        chosen = np.searchsorted(ends * 2 * count, place, side="right")
        parts[column] = [*np.array([*synapses.PARTS, None], object)[chosen]]
    return positions, parts


def _moved_synapses(
    table: pa.Table, classes: Sequence[str], split: str, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions [n, 3] in nm, and the rows [n] of the synapses before."""
    if not per_class:
        return np.zeros((0, 3)), np.zeros(0, np.int64)
    rng = np.random.default_rng((seed, 1))
    transmitters = [name for name in classes if name not in (NEITHER, UNKNOWN)]
    order = np.argsort(table["synapse_id"].to_numpy())
    label = synapses.labels(table, transmitters)[order]
    in_part = [synapses.in_part(table, split, part)[order] for part in synapses.PARTS]
    chosen = [np.zeros(0, np.int64)]
    for number in range(len(transmitters)):
        of_part = [order[is_in & (label == number)] for is_in in in_part]
        in_train = len(of_part[synapses.PARTS.index("train")])
        moved = min(per_class, in_train)
        for rows in of_part if in_train else ():
            share = -(-moved * len(rows) // in_train)  # rounded up
            chosen.append(rng.choice(rows, share, replace=False))
    parents = np.concatenate(chosen)
    if not len(parents):
        raise UserError(
            f"config.unknown_per_class is {per_class:,}, but no synapse in the train "
            f"part of split {split!r} has one of config.classes; set it to 0, or give "
            "another config.split"
        )
    # The direction of a Gaussian vector is uniform.
    direction = rng.standard_normal((len(parents), 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    radius_nm = rng.integers(*_RADIUS_NM, (len(parents), 1))
    positions = synapses.positions_nm_zyx(table)[parents] + radius_nm * direction
    return positions, parents
