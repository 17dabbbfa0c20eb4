# SPDX-License-Identifier: Apache-2.0
"""Writes predictions as FlyEM's tables of T-bars and bodies, for flyem-snapshot.

docs/exports.md gives the columns, their types and their units.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError
from synister_jax.evaluation import group_calls, voting_rules
from synister_jax.evaluation.confusions import Confusion
from synister_jax.exchange import export_files, flyem_points
from synister_jax.exchange.export_files import Consumer, ExportOptions
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions

# FlyEM calls the class "neither" "unknown" (flyem-snapshot, `translate-names`).
NAMES = {name: name for name in synapses.CLASSES} | {"neither": "unknown"}
# The consensus of the optic lobe accepts these transmitters only from an experiment,
# not from a call (flyem-snapshot, `override-celltype-before-consensus` and its
# specification).
NEEDS_EXPERIMENT = ("dopamine", "octopamine", "serotonin")
_NO_REGION = "<unspecified>"  # FlyEM's word for synapses outside all regions


def _write(
    source: Predictions,
    folder: pathlib.Path,
    options: ExportOptions,
    confusion: Confusion | None,
) -> list[str]:
    assert options.voxel_size_nm_zyx is not None and confusion is not None
    size = options.voxel_size_nm_zyx
    notes = _write_synapses(source, folder, size, options.split)
    _write_neurons(source, folder, confusion)
    return notes


def _write_synapses(
    source: Predictions,
    folder: pathlib.Path,
    voxel_size_nm_zyx: Sequence[float],
    split: str | None,
) -> list[str]:
    """Writes FlyEM's tbar-neurotransmitters.feather; returns messages for the user.

    Args:
      split: the split whose parts become the column `split`. With None, the only split
        of the table is used, if the table has any.

    Raises:
      UserError: The table does not have this split, or has several splits and the user
        did not choose.
    """
    names = [name for name in source.schema.names if name.startswith("split_")]
    known = [name.removeprefix("split_") for name in names]
    if split is None and len(known) > 1:
        raise UserError(
            f"the predictions have several splits ({', '.join(known)}): choose a split "
            "with --split"
        )
    if split is not None and split not in known:
        raise UserError(
            f"--split={split}: {source.path} has no such split; its splits are: "
            f"{', '.join(known) or 'none'}"
        )
    column = f"split_{split or known[0]}" if known else None
    regions = _regions(source)

    def convert(table: pa.Table) -> pa.Table:
        point, voxel, table = flyem_points.having(table, voxel_size_nm_zyx)
        nothing = pa.nulls(len(table), pa.string())
        columns = {
            "point_id": pa.array(point.astype(np.uint64)),
            **flyem_points.xyz(voxel),
            "conf": flyem_points.confidence(table),
            "sv": nothing.cast(pa.int64()),
            "body": export_files.ids(table, "neuron_id"),
            "roi": _categories(table["brain_region"].fill_null(_NO_REGION), regions),
        }
        for name in predictions.classes(table):
            column_of_class = f"nt_{NAMES[name]}_prob"
            columns[column_of_class] = export_files.probability(table, name)
        part = nothing if column is None else table[column]
        return pa.table(columns | {"split": _categories(part, synapses.PARTS)})

    path = folder / "tbar-neurotransmitters.feather"
    return flyem_points.write(path, source, voxel_size_nm_zyx, convert)


def _write_neurons(
    source: Predictions, folder: pathlib.Path, confusion: Confusion
) -> None:
    """Writes body-neurotransmitters.feather and neurotransmitter-confusion.csv.

    Args:
      confusion: the confusion matrix of the classes of `source`, in any order.
    """
    found = bodies(source, folder, confusion)
    neurons = found.pop("neurons")
    body = {"body": neurons["neuron_id"], "cell_type": neurons["cell_type"]}
    table = pa.table(body | found)
    export_files.write_table(folder / "body-neurotransmitters.feather", table, source)
    names = [NAMES[name] for name in source.classes]
    columns = {"ground_truth": pa.array(names)}
    # The rates of a class without synapses are NaN; FlyEM's table has zeros there.
    rates = np.nan_to_num(confusion.for_classes(source.classes).by_row())
    columns |= dict(zip(names, rates.T, strict=True))
    export_files.write_table(
        folder / "neurotransmitter-confusion.csv", pa.table(columns), source
    )


def bodies(
    source: Predictions, folder: pathlib.Path, confusion: Confusion
) -> dict[str, pa.ChunkedArray]:
    """Returns FlyEM's columns for the n neurons of the predictions.

    The ground truth is the known transmitter of the neuron's cell type. If the type has
    none, the ground truth is the known transmitter of the neuron. The column holds only
    one transmitter, so several known transmitters count as none. In the consensus the
    ground truth replaces the call of the type.

    Args:
      source: the predictions.
      folder: the folder of the export, which also takes temporary files.
      confusion: the confusion matrix of the classes of `source`, in any order.

    Returns:
      The columns, of n rows each. The entry `neurons` is the table of the neurons
      themselves, as `group_calls.of` returns it.
    """
    neurons = group_calls.of(source, "neuron", "flyem", confusion, folder)
    types = export_files.calls_of_types(
        source, folder, neurons["cell_type"], "flyem", confusion
    )
    truth = pc.coalesce(_single(types), _single(neurons))
    called, of_type = types["predicted_neurotransmitter"], types["predicted"]
    needs = pc.is_in(called, value_set=pa.array(NEEDS_EXPERIMENT))
    trusted = pc.if_else(needs, voting_rules.UNCLEAR, called)
    return {
        "neurons": neurons,
        "total_nt_predictions": neurons["predicted"].cast(pa.int32()),
        # FlyEM writes 0 and "unclear" if no synapse has a prediction. FlyEM writes 0
        # also if the confusion matrix has no row for the called class.
        "predicted_nt_confidence": neurons["score"].fill_null(0.0),
        "predicted_nt": export_files.translated(
            neurons["predicted_neurotransmitter"].fill_null(voting_rules.UNCLEAR),
            NAMES,
        ),
        "ground_truth": export_files.translated(truth, NAMES),
        "celltype_total_nt_predictions": of_type.fill_null(0).cast(pa.int32()),
        "celltype_predicted_nt": export_files.translated(called, NAMES),
        "celltype_predicted_nt_confidence": pc.if_else(
            pc.is_valid(of_type), types["score"].fill_null(0.0), None
        ),
        "consensus_nt": export_files.translated(pc.coalesce(truth, trusted), NAMES),
    }


def _single(groups: pa.Table) -> pa.ChunkedArray:
    """Returns each group's known transmitter; null for several (gaba+octopamine)."""
    known = groups["neurotransmitter"]
    return pc.if_else(pc.match_substring(known, "+"), None, known)


def _regions(source: Predictions) -> list[str]:
    """Returns all brain regions, sorted, because a file needs a single dictionary."""
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


FLYEM = Consumer(
    names=NAMES,
    files=(
        "tbar-neurotransmitters.feather",
        "body-neurotransmitters.feather",
        "neurotransmitter-confusion.csv",
        flyem_points.LEFT_OUT,
    ),
    takes={"voxel_size_nm_zyx": True, "confusion": True, "split": False},
    needs_neurons=True,
    write=_write,
)
