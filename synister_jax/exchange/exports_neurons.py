# SPDX-License-Identifier: Apache-2.0
"""Predictions in the files that other tools read: those with a row a neuron.

Columns, types and units of each are in docs/exports.md; the calls are those of
`aggregate`, by the rule that the consumer knows.
"""

import pathlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.evaluation import calls, rules
from synister_jax.evaluation.confusions import Confusion
from synister_jax.exchange import writing
from synister_jax.tables.predictions import Predictions

# The optic lobe's consensus trusts no call of these without an experiment
# (flyem-snapshot, `override-celltype-before-consensus` and its specification).
NEEDS_EXPERIMENT = ("dopamine", "octopamine", "serotonin")


def flyem(source: Predictions, folder: pathlib.Path, confusion: Confusion) -> None:
    """FlyEM's body-neurotransmitters.feather and neurotransmitter-confusion.csv.

    Args:
      confusion: of the classes of `source`, in any order.
    """
    bodies = _bodies(source, folder, confusion)
    neurons = bodies.pop("neurons")
    body = {"body": neurons["neuron_id"], "cell_type": neurons["cell_type"]}
    table = pa.table(body | bodies)
    writing.write_table(folder / "body-neurotransmitters.feather", table, source)
    confusion = confusion.for_classes(source.classes)
    names = [writing.NAMES["flyem"][name] for name in source.classes]
    columns = {"ground_truth": pa.array(names)}
    # A class that was not seen has no row; FlyEM's table has zeros there.
    rates = np.nan_to_num(confusion.by_row())
    columns |= dict(zip(names, rates.T, strict=True))
    writing.write_table(
        folder / "neurotransmitter-confusion.csv", pa.table(columns), source
    )


def neuprint(
    source: Predictions, folder: pathlib.Path, confusion: Confusion | None
) -> None:
    """Neuprint_Neurons.csv, properties of neuPrint's Segment and Neuron nodes.

    With a confusion those of the optic lobe and the male CNS (FlyEM's rule), without
    those of the male VNC (largest mean probability).
    """
    if confusion is None:
        neurons = calls.of_groups(source, "neuron", "mean_probability", folder=folder)
        called = neurons["predicted_neurotransmitter"]
        properties = {
            "predictedNt:string": _translated(called),
            "predictedNtProb:float": neurons["score"],
        }
    else:
        bodies = _bodies(source, folder, confusion)
        neurons = bodies.pop("neurons")
        del bodies["ground_truth"]  # is not exported to neuPrint
        properties = {_property(name, c): c for name, c in bodies.items()}
    body = neurons["neuron_id"]
    columns = {":ID(Body-ID)": body, "bodyId:long": body, **properties}
    for name in source.classes:
        column = f"nt{writing.NAMES['neuprint'][name]}Prob:float"
        columns[column] = neurons[f"mean_{name}_prob"]
    writing.write_table(folder / "Neuprint_Neurons.csv", pa.table(columns), source)


def codex(source: Predictions, folder: pathlib.Path) -> None:
    """neurons.csv.gz: the largest mean probability, and all of them."""
    neurons = calls.of_groups(source, "neuron", "mean_probability", folder=folder)
    names = writing.NAMES["codex"]
    columns = {
        "root_id": neurons["neuron_id"],
        "group": pa.nulls(len(neurons), pa.string()),
        "nt_type": _translated(neurons["predicted_neurotransmitter"], names),
        "nt_type_score": neurons["score"],
    }
    zero = pc.if_else(pc.is_valid(neurons["score"]), 0.0, None)
    for name, code in names.items():
        known = name in source.classes
        mean = neurons[f"mean_{name}_prob"] if known else zero
        columns[f"{code.lower()}_avg"] = mean
    writing.write_table(folder / "neurons.csv.gz", pa.table(columns), source)


def banc(source: Predictions, folder: pathlib.Path) -> None:
    """BANC's banc_neurotransmitter_prediction.csv, by its rule."""
    neurons = calls.of_groups(source, "neuron", "banc", folder=folder)
    types = _types(source, folder, neurons["cell_type"], "banc", None)
    nothing = pa.nulls(len(neurons), pa.string())
    columns = {"root_id": neurons["neuron_id"].cast(pa.string())}
    for name in writing.NAMES["banc"]:
        known = name in source.classes
        zeros = pa.array(np.zeros(len(neurons), np.int64))
        columns[name] = neurons[f"count_{name}"] if known else zeros
    columns |= {
        "neurotransmitter_predicted": neurons["predicted_neurotransmitter"],
        "neurotransmitter_score": neurons["score"],
        "count": neurons["predicted"],
        "supervoxel_id": nothing,
        "position": nothing,
        "cell_type": neurons["cell_type"],
        "cell_type_neurotransmitter_predicted": types["predicted_neurotransmitter"],
        "cell_type_neurotransmitter_score": types["score"],
    }
    writing.write_table(
        folder / "banc_neurotransmitter_prediction.csv", pa.table(columns), source
    )


def _bodies(
    source: Predictions, folder: pathlib.Path, confusion: Confusion
) -> dict[str, pa.ChunkedArray]:
    """FlyEM's columns of n neurons, after `neurons`, the table they are of.

    The ground truth is that of the neuron's type if its synapses name one, else that
    of its own; it overrides the type's call in the consensus. Several transmitters of
    one neuron are none that the column could hold.
    """
    neurons = calls.of_groups(source, "neuron", "flyem", confusion, folder)
    types = _types(source, folder, neurons["cell_type"], "flyem", confusion)
    truth = pc.coalesce(_single(types), _single(neurons))
    called, of_type = types["predicted_neurotransmitter"], types["predicted"]
    needs = pc.is_in(called, value_set=pa.array(NEEDS_EXPERIMENT))
    trusted = pc.if_else(needs, rules.UNCLEAR, called)
    return {
        "neurons": neurons,
        "total_nt_predictions": neurons["predicted"].cast(pa.int32()),
        # Where nothing is predicted, or the confusion has no row of the call, FlyEM
        # says 0 and "unclear".
        "predicted_nt_confidence": neurons["score"].fill_null(0.0),
        "predicted_nt": _translated(
            neurons["predicted_neurotransmitter"].fill_null(rules.UNCLEAR)
        ),
        "ground_truth": _translated(truth),
        "celltype_total_nt_predictions": of_type.fill_null(0).cast(pa.int32()),
        "celltype_predicted_nt": _translated(called),
        "celltype_predicted_nt_confidence": pc.if_else(
            pc.is_valid(of_type), types["score"].fill_null(0.0), None
        ),
        "consensus_nt": _translated(pc.coalesce(truth, trusted)),
    }


def _single(groups: pa.Table) -> pa.ChunkedArray:
    """The known transmitter of each group; null for several, as gaba+octopamine."""
    known = groups["neurotransmitter"]
    return pc.if_else(pc.match_substring(known, "+"), None, known)


def _types(
    source: Predictions,
    folder: pathlib.Path,
    cell_type: pa.ChunkedArray,
    rule: str,
    confusion: Confusion | None,
) -> pa.Table:
    """The row of `aggregate` of each neuron's cell type; nulls for one without."""
    if not writing.any_value(source, "cell_type"):
        fields = [
            ("neurotransmitter", pa.string()),
            ("predicted", pa.int64()),
            ("predicted_neurotransmitter", pa.string()),
            ("score", pa.float64()),
        ]
        nothing = [pa.nulls(len(cell_type), kind) for _, kind in fields]
        return pa.table(nothing, schema=pa.schema(fields))
    types = calls.of_groups(source, "cell_type", rule, confusion, folder)
    names = types["cell_type"].combine_chunks()
    return types.take(pc.index_in(cell_type, value_set=names))


def _translated(
    called: pa.ChunkedArray | pa.Array,
    names: Mapping[str, str] = writing.NAMES["flyem"],
) -> pa.ChunkedArray | pa.Array:
    """The consumer's names for those of classes; what is none stays."""
    index = pc.index_in(called, value_set=pa.array([*names]))
    return pc.coalesce(pa.array([*names.values()]).take(index), called)


def _property(name: str, column: pa.ChunkedArray) -> str:
    """predicted_nt → predictedNt:string, as neo4j's importer reads it."""
    first, *others = name.split("_")
    kinds = {pa.int32(): "int", pa.float64(): "float", pa.string(): "string"}
    return first + "".join(map(str.capitalize, others)) + ":" + kinds[column.type]
