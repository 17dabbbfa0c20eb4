# SPDX-License-Identifier: Apache-2.0
"""Reads the published prediction tables of many projects as one kind of table.

A file is recognised by its columns. Its name does not matter. The known kinds are:

- tables of synister_jax
- FlyEM: `nt_<class>_prob`, `point_id`, `x`, `y`, `z`, `body`
- hemibrain and FAFB on Zenodo: `nts_<n>.<class>`, `id`, `x`, `y`, `z`, `body`
- FlyWire from CAVE: `gaba`, `ach`, `glut`, `oct`, `ser`, `da`, `id`,
  `pre_pt_position`, `pre_pt_root_id`
- fafbseg: full class names, `id`, `pre`, `pre_x`, …
- BANC: full class names, `id`
- the original synister's answer to a request: full class names, `position_id`, `skid`,
  `x`, `y`, `z`
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError
from synister_jax.tables import columns, file_formats, synapses

# Within each kind, the first name that the file has is used.
_IDS = ("synapse_id", "position_id", "point_id", "id", "connector_id", "offset")
_NEURONS = ("neuron_id", "body", "skid", "pre_pt_root_id", "pre_root_id", "pre")
_ROLES = {
    "id": _IDS,
    "neuron_id": _NEURONS,
    "neurotransmitter": ("neurotransmitter",),
}
_POINT = "pre_pt_position"  # a list (x, y, z)
_POSITIONS = (
    synapses.POSITION,
    ("pre_z", "pre_y", "pre_x"),
    (f"{_POINT}_z", f"{_POINT}_y", f"{_POINT}_x"),
    (_POINT, _POINT, _POINT),
    ("z", "y", "x"),
)
_CLASS_COLUMNS = (r"nts_[^.]*\.(.+)", r"nt_(.+)_prob")
# In FlyEM's files "unknown" means "neither". In all other files "unknown" is a class.
_FLYEM_NEITHER = "nt_unknown_prob"
# The short names of CAVE. The last two are the misspelt names that the default
# translation of flyem-snapshot writes.
_SHORT = {
    "ach": "acetylcholine",
    "glut": "glutamate",
    "oct": "octopamine",
    "ser": "serotonin",
    "da": "dopamine",
    "gluatmate": "glutamate",
    "dopmaine": "dopamine",
}
_NO_NEURON = (0, -1)  # 0 in segmentations, -1 in the CSV of the original synister
_TOLERANCE = 1e-2  # for probabilities rounded to float16 or to few digits


@dataclasses.dataclass(frozen=True)
class Published:
    """A table of predictions of any size, which can be read several times."""

    name: str
    classes: tuple[str, ...]  # full names, in the file's order
    # Our column (id, z_nm, y_nm, x_nm, neuron_id, neurotransmitter, a class) → the
    # file's column. Columns that the file lacks are left out.
    columns: Mapping[str, str]
    in_voxels: bool  # whether the positions in the file are voxels, not nm
    voxel_size_nm_zyx: tuple[float, float, float] | None = None

    @property
    def has_positions(self) -> bool:
        """Whether the table has positions that can be converted to nm."""
        known = not self.in_voxels or self.voxel_size_nm_zyx is not None
        return known and "z_nm" in self.columns

    @property
    def schema(self) -> pa.Schema:
        """The columns of `tables` and their types."""
        return pa.schema(
            [
                ("id", pa.int64()),
                *((name, pa.float64()) for name in synapses.POSITION),
                ("neuron_id", pa.int64()),
                ("neurotransmitter", pa.string()),
                *((name, pa.float32()) for name in self.classes),
            ]
        )

    def tables(self) -> Iterator[pa.Table]:
        """Yields all rows in the order of the file, batch by batch, as `schema`.

        Unknown values are null, and unknown probabilities are NaN. Positions in voxels
        are null if no voxel size is given.

        Raises:
          UserError: The file is damaged. An id is not an integer, or a value is not a
            probability; the message names the row, counted from 0.
        """
        rows = 0
        for batch in _batches(pathlib.Path(self.name), list(self.columns.values())):
            yield self._conform(pa.Table.from_batches([batch]), rows)
            rows += len(batch)

    def _conform(self, table: pa.Table, first_row: int) -> pa.Table:
        made: dict[str, pa.Array] = {}
        for field in self.schema:
            if field.name not in self.columns:
                made[field.name] = pa.nulls(len(table), field.type)
            elif field.name in synapses.POSITION:
                made[field.name] = self._position(table, field.name)
            elif field.name == "neurotransmitter":
                made[field.name] = columns.text(table[self.columns[field.name]])
            elif field.name in self.classes:
                made[field.name] = self._probability(table, field.name, first_row)
            else:
                made[field.name] = self._integers(table, field.name, first_row)
        return pa.table(made, schema=self.schema)

    def _integers(self, table: pa.Table, name: str, first_row: int) -> pa.Array:
        own = self.columns[name]
        values, missing, malformed = columns.integers(table[own])
        if malformed.any():
            row = int(np.flatnonzero(malformed)[0])
            raise UserError(
                f"{self.name}, row {first_row + row}: {own} is "
                f"{table[own][row].as_py()!r}; ids must be integers, because floats "
                "lose the last digits of large ids"
            )
        if name == "neuron_id" and own != "neuron_id":
            missing = missing | np.isin(values, _NO_NEURON)
        return pa.array(values, mask=missing)

    def _position(self, table: pa.Table, name: str) -> pa.Array:
        axis = synapses.POSITION.index(name)
        column = table[self.columns[name]]
        if self.columns[name] == _POINT:
            try:
                column = pc.list_element(column, 2 - axis)
            except pa.ArrowException as error:
                raise UserError(f"{self.name}: column {_POINT}: {error}") from None
        values = columns.numbers(column)
        if not self.has_positions:
            return pa.nulls(len(table), pa.float64())
        if self.in_voxels:
            assert self.voxel_size_nm_zyx is not None  # has_positions
            values = values * self.voxel_size_nm_zyx[axis]
        return pa.array(values, mask=np.isnan(values))

    def _probability(self, table: pa.Table, name: str, first_row: int) -> pa.Array:
        own = self.columns[name]
        kind = table[own].type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise UserError(
                f"{self.name}: column {own} has the type {kind}; probabilities must be "
                "numbers"
            )
        values = columns.numbers(table[own]).astype(np.float32)
        bad = np.flatnonzero((values < -_TOLERANCE) | (values > 1 + _TOLERANCE))
        if len(bad):
            raise UserError(
                f"{self.name}, row {first_row + bad[0]}: {own} is {values[bad[0]]:g}, "
                "which is not a probability; give a table of synapses with a "
                "probability for each class"
            )
        return pa.array(values)


def open(
    path: str | os.PathLike[str],
    voxel_size_nm_zyx: tuple[float, float, float] | None = None,
) -> Published:
    """Opens a published table of predictions, and recognises its columns.

    Args:
      path: a Feather, Parquet, CSV or .csv.gz file, or a folder of Parquet files.
      voxel_size_nm_zyx: the voxel size in nm, for files with positions in voxels. These
        are files with the columns x, y and z but without `position_id`. The positions
        of all other files are in nm.

    Raises:
      UserError: The file does not exist or is damaged. The file is not a table of
        predictions; the message lists the columns that were found and recognised. Two
        columns have the same name or belong to the same class.
    """
    path = pathlib.Path(path)
    schema = _schema(path)
    names = schema.names
    if len(set(names)) < len(names):
        raise UserError(
            f"{path} has several columns with the same name: {', '.join(names)}; "
            "rename or remove the repeated columns"
        )
    found: dict[str, str] = {}
    for ours, known in _ROLES.items():
        if there := [name for name in known if name in names]:
            found[ours] = there[0]
    position = next(
        (p for p in _POSITIONS if set(p) <= set(names) and _usable(schema, p)), ()
    )
    found |= dict(zip(synapses.POSITION, position, strict=False))
    classes = _class_columns(names, path)
    if len(classes) < 2 or not found.keys() & {"id", "z_nm"}:
        raise _not_predictions(path, names, [*found.values(), *classes.values()])
    in_voxels = position == _POSITIONS[-1] and "position_id" not in names
    return Published(
        str(path), tuple(classes), found | classes, in_voxels, voxel_size_nm_zyx
    )


def _usable(schema: pa.Schema, position: Sequence[str]) -> bool:
    """Returns False for a list of coordinates that is text, as in CSV files."""
    kind = schema.field(position[0]).type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return position[0] != _POINT or any(is_list(kind) for is_list in lists)


def _class_columns(names: Sequence[str], path: pathlib.Path) -> dict[str, str]:
    """Returns full class name → column of its probability, in the file's order."""
    matches: list[tuple[str, str]] = []
    for pattern in _CLASS_COLUMNS:
        if not matches:
            hits = ((name, re.fullmatch(pattern, name)) for name in names)
            matches = [(hit[1], name) for name, hit in hits if hit]
    if not matches:
        known = {*synapses.CLASSES, *_SHORT}
        matches = [(name, name) for name in names if name.lower() in known]
    has_neither = any(text.lower() == "neither" for text, _ in matches)
    found: dict[str, str] = {}
    for text, column in matches:
        name = _SHORT.get(text.lower(), text.lower())
        if column == _FLYEM_NEITHER and "synapse_id" not in names and not has_neither:
            name = "neither"
        if name in found:
            raise UserError(
                f"{path}: the columns {found[name]} and {column} both belong to the "
                f"class {name}; remove one of these columns"
            )
        found[name] = column
    return found


def _not_predictions(
    path: pathlib.Path, names: Sequence[str], recognised: Sequence[str]
) -> UserError:
    shown = ", ".join(names[:40]) + (" …" if len(names) > 40 else "")
    return UserError(
        f"{path} is not a table of predictions: its columns are {shown or 'none'}; "
        f"recognised columns: {', '.join(dict.fromkeys(recognised)) or 'none'}. The "
        "table needs at least two classes (nt_<class>_prob, nts_<n>.<class>, or gaba, "
        f"acetylcholine or ach, …) and an id ({', '.join(_IDS)}) or a position "
        "(z_nm, y_nm, x_nm; pre_z, pre_y, pre_x; pre_pt_position; z, y, x)"
    )


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the Parquet files of a folder, sorted, or the file itself."""
    if path.suffix == ".bz2":
        raise UserError(f"{path} is compressed; unpack it first: bunzip2 {path.name}")
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not paths:
        raise UserError(
            f"{path} is a folder without Parquet files; give a folder with *.parquet"
        )
    return paths


def _schema(path: pathlib.Path) -> pa.Schema:
    """Returns the schema of all columns; the columns of text files are strings."""

    def everything(names: Sequence[str]) -> dict[str, pa.DataType]:
        return dict.fromkeys(names, pa.string())

    paths = _files(path)
    schema, _ = file_formats.open(paths[0], everything, "predictions")
    for other in paths[1:]:
        if not file_formats.open(other, everything, "predictions")[0].equals(schema):
            raise UserError(
                f"{other} does not have the same columns as {paths[0]}; give a folder "
                "whose files have the same columns"
            )
    return schema


def _batches(path: pathlib.Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields batches of these columns; the ids of text files stay strings."""
    text = {*_IDS, *_NEURONS, "neurotransmitter"}
    types = {n: pa.string() if n in text else pa.float64() for n in names}
    for each in _files(path):
        yield from file_formats.open(each, lambda _: types, "predictions")[1]
