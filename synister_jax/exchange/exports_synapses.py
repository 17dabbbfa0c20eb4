# SPDX-License-Identifier: Apache-2.0
"""Predictions in the files that other tools read: those with a row a synapse.

Columns, types and units of each are in docs/exports.md.
"""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base import queries
from synister_jax.base.errors import UserError
from synister_jax.evaluation import tallies
from synister_jax.exchange import writing
from synister_jax.exchange.writing import Convert
from synister_jax.tables import position_ids, predictions, synapses
from synister_jax.tables.predictions import Predictions

LEFT_OUT = "left-out.feather"
_NO_REGION = "<unspecified>"  # FlyEM's word for synapses outside all regions
_INT32 = 2**31  # voxels beyond do not fit the type of x, y and z


def flyem(
    source: Predictions,
    folder: pathlib.Path,
    voxel_size_nm_zyx: Sequence[float],
    split: str | None,
) -> list[str]:
    """FlyEM's tbar-neurotransmitters.feather; returns what there is to say.

    Args:
      split: whose parts become the column `split`; None: the only one there is.

    Raises:
      UserError: no such split, or several to choose from.
    """
    names = [name for name in source.schema.names if name.startswith("split_")]
    known = [name.removeprefix("split_") for name in names]
    if split is None and len(known) > 1:
        raise UserError(f"say which of the splits {', '.join(known)} with --split")
    if split is not None and split not in known:
        raise UserError(
            f"--split={split}: {source.path} has {', '.join(known) or 'none'}"
        )
    column = f"split_{split or known[0]}" if known else None
    regions = _regions(source)

    def convert(table: pa.Table) -> pa.Table:
        point, voxel, table = _points(table, voxel_size_nm_zyx)
        nothing = pa.nulls(len(table), pa.string())
        columns = {
            "point_id": pa.array(point.astype(np.uint64)),
            **_xyz(voxel),
            "conf": _confidence(table),
            "sv": nothing.cast(pa.int64()),
            "body": writing.ids(table, "neuron_id"),
            "roi": _categories(table["brain_region"].fill_null(_NO_REGION), regions),
        }
        for name in predictions.classes(table):
            column_of_class = f"nt_{writing.NAMES['flyem'][name]}_prob"
            columns[column_of_class] = writing.probability(table, name)
        part = nothing if column is None else table[column]
        return pa.table(columns | {"split": _categories(part, synapses.PARTS)})

    path = folder / "tbar-neurotransmitters.feather"
    return _write_points(path, source, voxel_size_nm_zyx, convert)


def neuprint(
    source: Predictions, folder: pathlib.Path, voxel_size_nm_zyx: Sequence[float]
) -> list[str]:
    """Neuprint_Synapses.csv, properties of neuPrint's Synapse nodes; returns notes."""

    def convert(table: pa.Table) -> pa.Table:
        point, voxel, table = _points(table, voxel_size_nm_zyx)
        x, y, z = (values.cast(pa.string()) for values in _xyz(voxel).values())
        parts = ["{x:", x, ", y:", y, ", z:", z, "}"]
        columns = {
            ":ID(Element-ID)": pa.array(point),
            "type:string": pa.repeat("pre", len(table)),
            "confidence:float": writing.blank(_confidence(table)),
            "location:point{srid:9157}": pc.binary_join_element_wise(*parts, ""),
        }
        for name in predictions.classes(table):
            values = writing.blank(writing.probability(table, name))
            columns[f"nt{writing.NAMES['neuprint'][name]}Prob:float"] = values
        return pa.table(columns)

    path = folder / "Neuprint_Synapses.csv"
    return _write_points(path, source, voxel_size_nm_zyx, convert)


def fafbseg(source: Predictions, folder: pathlib.Path) -> list[str]:
    """synapses.feather for fafbseg-py and R's fafbseg; returns what there is to say.

    fafbseg-py divides by the sum of a neuron's weights, and fails for all neurons where
    that of one is zero: where no predicted synapse of a neuron has a cleft score above
    0, all of its synapses weigh 1.
    """
    weightless = _weightless(source, folder)

    def convert(table: pa.Table) -> pa.Table:
        ids, neurons = table["synapse_id"], writing.ids(table, "neuron_id")
        z, y, x = (table[name] for name in synapses.POSITION)
        columns = {"id": ids, "offset": ids, "pre": neurons}
        if "post_neuron_id" in table.column_names:
            columns["post"] = writing.ids(table, "post_neuron_id")
        columns |= {"pre_x": x, "pre_y": y, "pre_z": z}
        weights = _weights(table)
        weights[_among(neurons.to_numpy(), weightless)] = 1
        columns["scores"] = writing.score(table, "connection_score")
        columns |= {"cleft_score": pa.array(weights), "cleft_scores": pa.array(weights)}
        return pa.table(columns | writing.fixed(table, "fafbseg"))

    writing.write(folder / "synapses.feather", source, convert)
    if "cleft_score" not in source.schema.names:
        return ["there are no cleft scores: every synapse weighs 1"]
    if not len(weightless):
        return []
    return [
        "neurons without a predicted synapse whose cleft score is above 0: "
        f"{len(weightless):,}; their synapses weigh 1 each: {_some(weightless)}"
    ]


def _weightless(source: Predictions, folder: pathlib.Path) -> np.ndarray:
    """Neurons, int64 [n], none of whose predicted synapses weighs anything."""
    schema = pa.schema([("neuron", pa.int64()), ("weight", pa.float32())])

    def batches() -> Iterator[pa.RecordBatch]:
        for table in source.tables():
            known = predictions.called(table) >= 0
            columns = [writing.ids(table, "neuron_id").to_numpy(), _weights(table)]
            yield pa.record_batch([pa.array(c[known]) for c in columns], schema)

    query = """SELECT neuron FROM rows GROUP BY neuron HAVING max(weight) = 0
        ORDER BY neuron"""
    found = pa.Table.from_batches(
        queries.run(query, schema, batches(), folder), pa.schema([schema.field(0)])
    )
    return found["neuron"].to_numpy()


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each is one of `ascending`; unlike np.isin without sorting it again."""
    place = np.searchsorted(ascending, values)
    found = place < len(ascending)
    found[found] = ascending[place[found]] == values[found]
    return found


def _weights(table: pa.Table) -> np.ndarray:
    """Cleft scores, float32 [n], 0 where unknown; 1 in a table without them."""
    if "cleft_score" not in table.column_names:
        return np.ones(len(table), np.float32)
    return tallies.weights(table)


def cave(source: Predictions, folder: pathlib.Path) -> list[str]:
    """synapses_nt_v1.feather, FlyWire's table of CAVE with flat positions in nm."""

    def convert(table: pa.Table) -> pa.Table:
        z, y, x = (table[name] for name in synapses.POSITION)
        nowhere = pa.nulls(len(table), pa.float64())
        unknown = pa.array(np.zeros(len(table), np.int64))
        return pa.table(
            {
                "id": table["synapse_id"],
                "pre_pt_root_id": writing.ids(table, "neuron_id"),
                "post_pt_root_id": writing.ids(table, "post_neuron_id"),
                "connection_score": writing.score(table, "connection_score"),
                "cleft_score": writing.score(table, "cleft_score"),
                **writing.fixed(table, "cave"),
                "valid_nt": pa.array(predictions.called(table) >= 0),
                "pre_pt_supervoxel_id": unknown,
                "post_pt_supervoxel_id": unknown,
                "pre_pt_position_x": x,
                "pre_pt_position_y": y,
                "pre_pt_position_z": z,
                **{f"post_pt_position_{axis}": nowhere for axis in "xyz"},
            }
        )

    writing.write(folder / "synapses_nt_v1.feather", source, convert)
    return []


def banc(source: Predictions, folder: pathlib.Path) -> list[str]:
    """BANC's banc_nt_prediction.parquet, and its calls as a CAVE reference table."""
    classes = np.array([*source.classes, None], object)  # [-1]: not predicted

    def convert(table: pa.Table) -> pa.Table:
        columns = writing.fixed(table, "banc")
        called = pa.array(classes[predictions.called(table)], pa.string())
        largest = np.max([*columns.values()], axis=0)
        columns |= {"probability": largest}
        halves = {name: pa.array(v.astype(np.float16)) for name, v in columns.items()}
        ends = {"predicted_nt": called, "probability": halves.pop("probability")}
        return pa.table({"id": table["synapse_id"], **halves, **ends})

    def refer(table: pa.Table) -> pa.Table:
        converted = convert(table)
        value = converted["probability"].to_numpy().astype(np.float32)
        return pa.table(
            {
                "tag": converted["predicted_nt"],
                "value": writing.blank(value),
                "id_ref": converted["id"],
                "valid": pc.is_valid(converted["predicted_nt"]),
                "valid_ref": pa.repeat(True, len(table)),
            }
        )

    writing.write(folder / "banc_nt_prediction.parquet", source, convert)
    writing.write(folder / "synapses_nt_prediction.csv", source, refer)
    return []


def synister(
    source: Predictions,
    folder: pathlib.Path,
    voxel_size_nm_zyx: Sequence[float],
    predict: int,
) -> list[str]:
    """The original's predictions.csv, and synapses.feather as published on Zenodo.

    Args:
      predict: the original's number of the prediction: columns are `nts_<predict>.…`.
    """

    def request(table: pa.Table) -> pa.Table:
        z, y, x = (writing.blank(table[name].to_numpy()) for name in synapses.POSITION)
        skids = pc.fill_null(table["neuron_id"], -1)
        columns = {"position_id": table["synapse_id"], "skid": skids}
        columns |= {"x": x, "y": y, "z": z}
        for name in predictions.classes(table):
            columns[name] = writing.blank(writing.probability(table, name))
        return pa.table(columns)

    def published(table: pa.Table) -> pa.Table:
        voxel = _voxels(table, voxel_size_nm_zyx)
        columns = {"id": table["synapse_id"], "body": writing.ids(table, "neuron_id")}
        columns |= _xyz(np.where(np.abs(voxel) < _INT32, voxel, np.nan))
        for name in predictions.classes(table):
            columns[f"nts_{predict}.{name}"] = writing.probability(table, name)
        return pa.table(columns)

    writing.write(folder / "predictions.csv", source, request)
    writing.write(folder / "synapses.feather", source, published)
    return []


def _write_points(
    path: pathlib.Path,
    source: Predictions,
    voxel_size_nm_zyx: Sequence[float],
    convert: Convert,
) -> list[str]:
    """Writes rows that have a point id; the others as they are into `LEFT_OUT`."""
    rows = writing.write(path, source, convert)
    notes = []
    if rows < source.rows:
        left_out = path.parent / LEFT_OUT
        writing.write(
            left_out, source, lambda t: _points(t, voxel_size_nm_zyx, False)[2]
        )
        notes.append(
            "rows without a point id (no position, or one beyond 21 bits of voxels): "
            f"{source.rows - rows:,}; they are in {left_out} instead"
        )
    schema = pa.schema([("point", pa.int64())])
    points = (
        pa.record_batch([pa.array(_points(table, voxel_size_nm_zyx)[0])], schema)
        for table in source.tables()
    )
    query = """SELECT count(*) AS n FROM
        (SELECT point FROM rows GROUP BY point HAVING count(*) > 1)"""
    [counted] = queries.run(query, schema, points, path.parent)
    if repeated := counted["n"][0].as_py():
        notes.append(
            f"points with several rows: {repeated:,}; their rows share a point id, and "
            "FlyEM's tools expect each once"
        )
    return notes


def _confidence(table: pa.Table) -> np.ndarray:
    """FlyEM's confidence of a T-bar (synapses.OPTIONAL), float32 [n], NaN: unknown."""
    has_cleft = "cleft_score" in table.column_names
    return writing.score(table, "cleft_score" if has_cleft else "connection_score")


def _some(ids: np.ndarray) -> str:
    more = f" and {len(ids) - 5:,} more" if len(ids) > 5 else ""
    return ", ".join(map(str, ids[:5])) + more


def _voxels(table: pa.Table, voxel_size_nm_zyx: Sequence[float]) -> np.ndarray:
    """Whole numbers as float64 [n, 3], NaN where there is no position."""
    return np.rint(synapses.positions_nm_zyx(table) / voxel_size_nm_zyx)


def _xyz(voxel_zyx: np.ndarray) -> dict[str, pa.Array]:
    """Columns x, y, z int32, null for NaN."""
    z, y, x = (writing.blank(values).cast(pa.int32()) for values in voxel_zyx.T)
    return {"x": x, "y": y, "z": z}


def _points(
    table: pa.Table, voxel_size_nm_zyx: Sequence[float], having: bool = True
) -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """(point ids, voxels, rows) of the rows that have a point id, or have none."""
    voxel = _voxels(table, voxel_size_nm_zyx)
    point = position_ids.neuprint(voxel)
    chosen = (point >= 0) == having
    return point[chosen], voxel[chosen], table.filter(pa.array(chosen))


def _regions(source: Predictions) -> list[str]:
    """The values of brain_region, in order: one dictionary for all of a file."""
    found: set[str] = set()
    for table in source.tables(["brain_region"]):
        found.update(pc.unique(table["brain_region"]).to_pylist())
    return sorted((found - {None}) | {_NO_REGION})


def _categories(
    values: pa.Array | pa.ChunkedArray, names: Sequence[str]
) -> pa.DictionaryArray:
    names = pa.array(names, pa.string())
    index = pc.index_in(values, value_set=names).cast(pa.int32())
    if isinstance(index, pa.ChunkedArray):
        index = index.combine_chunks()
    return pa.DictionaryArray.from_arrays(index, names)
