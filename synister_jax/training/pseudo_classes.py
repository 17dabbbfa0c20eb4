# SPDX-License-Identifier: Apache-2.0
"""The original's two pseudo-classes: rows beside the synapses of a table.

`neither` is a random location in the volume, `unknown` a synapse moved away from its
place. The original draws both while it trains (train_pipeline.py, gp.py); here they
are a finite number of rows, cut and split and evaluated like all others.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.em import crops, volumes
from synister_jax.tables import synapses

NEITHER, UNKNOWN = "neither", "unknown"
# gp.py, sample_radii: whole nm, the upper bound excluded.
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
    """The table, then the rows of `neither`, then those of `unknown`.

    Their crops lie in the volume whole, context included: else its black outside would
    give these classes away. The rows have a position, a class, parts and the ids -1,
    -2, …; all that a table says otherwise of a synapse is null. Their ids, positions
    and classes depend on the options, the seed, the volume's box and, for `unknown`,
    on the labelled synapses of `split`; neither on the order of the rows nor on other
    splits.

    Args:
      table: synapse table.
      classes: of the network, whose transmitters `unknown` is made from.
      split: the one whose train part `unknown_per_class` is about.
      record_shape_zyx: voxels of a crop with its context.
      neither_crops: so many, centred on any voxel alike. In each split the parts share
        them as they share the synapses that have one of `classes`.
      unknown_per_class: most train synapses of a transmitter to move, in a random
        direction by 2,000 to 3,999 nm; of the other parts the same fraction, rounded
        up. A moved synapse keeps every part of its parent; one that was moved too near
        the volume's border is left out.

    Raises:
      UserError: classes and options that do not fit, negative ids in the table, or no
        synapse to make `unknown` from.
    """
    _check(table, classes, neither_crops, unknown_per_class)
    if not neither_crops and not unknown_per_class:
        return table
    lowest = np.asarray(record_shape_zyx) // 2
    room = np.asarray(volume.shape_zyx) - record_shape_zyx + 1
    if (room < 1).any():
        raise UserError(
            f"volume {volume.uri} has {tuple(volume.shape_zyx)} voxels, a crop with "
            f"its context {tuple(record_shape_zyx)}: no place for random or moved crops"
        )
    nowhere, parts = _random_locations(
        table, volume, lowest, room, classes, neither_crops, seed
    )
    moved, parents = _moved_synapses(table, classes, split, unknown_per_class, seed)
    starts = crops.starts_vx_zyx(moved, record_shape_zyx, volume)
    is_inside = ((starts >= 0) & (starts < room)).all(axis=1)
    if len(moved) and not is_inside.any():
        raise UserError(
            f"all {len(moved):,} synapses moved for {UNKNOWN!r} lie at the border of "
            f"volume {volume.uri} or beyond; set config.unknown_per_class to 0"
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
                f"it and {option} is 0; set {option}, or remove the class"
            )
        negative = table["synapse_id"].to_numpy() < 0
        if count and negative.any():
            raise UserError(
                f"{option} is {count:,}: its rows need negative ids, but row "
                f"{negative.argmax()} of the synapse table has one; give the synapses "
                f"other ids, or set {option} to 0"
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
    """Positions [count, 3] in nm, and their parts in each column of a split."""
    rng = np.random.default_rng((seed, 0))
    voxels = lowest + rng.integers(0, room, (count, 3))
    positions = volume.offset_nm_zyx + voxels * np.asarray(volume.voxel_size_nm_zyx)
    has_class = synapses.labels(table, classes) >= 0
    parts = {}
    for column in synapses.split_columns(table):
        part = synapses.index_in(table[column], synapses.PARTS)[has_class]
        ends = np.cumsum(np.bincount(part[part >= 0], minlength=len(synapses.PARTS)))
        # Location i takes the part at the fraction (i + ½)/count of all synapses in
        # order of part: exact shares, and no draw that another column could shift. The
        # locations are drawn alike, so that it does not matter which are in a part.
        place = (2 * np.arange(count) + 1) * ends[-1]
        chosen = np.searchsorted(ends * 2 * count, place, side="right")
        parts[column] = [*np.array([*synapses.PARTS, None], object)[chosen]]
    return positions, parts


def _moved_synapses(
    table: pa.Table, classes: Sequence[str], split: str, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n, 3] in nm, and the rows [n] of the synapses that were there."""
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
    # Gaussians point in every direction alike.
    direction = rng.standard_normal((len(parents), 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    radius_nm = rng.integers(*_RADIUS_NM, (len(parents), 1))
    positions = synapses.positions_nm_zyx(table)[parents] + radius_nm * direction
    return positions, parents
