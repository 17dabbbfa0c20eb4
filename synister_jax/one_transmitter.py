# SPDX-License-Identifier: Apache-2.0
"""Which neurons, hemilineages or cell types seem to release more than one transmitter?

    python -m synister_jax.one_transmitter --predictions=DIR/predictions.feather \
        --by=hemilineage --confusion=RUN/evaluation/test/step-N/metrics.json \
        --output=hemilineages.feather

Tests each group against one transmitter, given how the network confuses them and how
alike the units of a group are; a false discovery rate limits the errors over all of
them. docs/one_transmitter.md says what that assumes and what `several` can mean.
"""

import math
import pathlib

import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax.base import command, files, table_metadata
from synister_jax.base.errors import UserError
from synister_jax.evaluation import confusions, mixtures, vote_tallies
from synister_jax.evaluation.confusions import Confusion
from synister_jax.evaluation.mixtures import CallModel
from synister_jax.tables import predictions, synapses
from synister_jax.tables.predictions import Predictions
from synister_jax.tables.synapses import GROUP_COLUMNS

# What the units of a group are: calls of `evaluate` at that level are confused so. A
# brain region is not here: nobody expects one transmitter of it.
UNITS = {"neuron": "synapses", "hemilineage": "neurons", "cell_type": "neurons"}
# Where metrics.json has the correlation of the calls, and what the units come in.
_CORRELATION = {
    "synapses": "synapses_within_neurons",
    "neurons": "neurons_within_hemilineages",
}
_CLUSTERS = {"synapses": "neurons", "neurons": "hemilineages"}
RULE = "likelihood ratio of two transmitters and one"
DRAWS = 9_999


def units(
    source: Predictions,
    by: str,
    folder: pathlib.Path | None = None,
    n_min: int = 1,
) -> tuple[pa.Array, np.ndarray]:
    """The groups, ascending, and how many of their units are called what, [n, k].

    Of a neuron its predicted synapses; of a hemilineage or cell type its neurons, each
    by majority vote (`vote_tallies.calls_of_neurons`).

    Args:
      n_min: neurons of fewer predicted synapses are no units.

    Raises:
      UserError: no row names a group.
    """
    neurons = vote_tallies.of(source, "neuron", folder)
    if by == "neuron":
        return neurons.groups[GROUP_COLUMNS[by]].combine_chunks(), neurons.counts
    names, counts = vote_tallies.calls_of_neurons(neurons, by, n_min)
    if not len(names):
        raise UserError(
            f"{source.path} names no {by.replace('_', ' ')}: its column "
            f"{GROUP_COLUMNS[by]} is empty"
        )
    predicted = neurons.predicted
    if small := int(((predicted > 0) & (predicted < n_min)).sum()):
        print(
            f"{small:,} of {len(neurons.groups):,} neurons have fewer than {n_min} "
            "predicted synapses and are no units: their calls err more often than the "
            "confusion says"
        )
    return names, counts


def least_synapses(confusion: Confusion) -> int:
    """Predicted synapses of a neuron as large as those that the confusion is of.

    A tenth of them are smaller. 1, with a warning, where the source does not say.
    """
    if least := confusion.measured.get("neurons", {}).get("tenth_of_synapses"):
        return least
    print(
        f"warning: {confusion.name} does not say how large its neurons are; neurons of "
        "few synapses, whose calls err more often, can pass for another transmitter: "
        "give --n_min"
    )
    return 1


def model(confusion: Confusion, level: str, correlation: float | None) -> CallModel:
    """How calls of units of `level` scatter: by a confusion in counts or fractions.

    Args:
      correlation: as given by --correlation; None: that of metrics.json. Where that has
        none of neurons, 0 with a warning.

    Raises:
      UserError: the correlation is needed and unknown, or the confusion is of neither
        counts nor rows that sum to 1, or of fewer than two classes.
    """
    counts, clusters = confusion.counts, None
    measured = confusion.measured
    if correlation is None:
        correlation = (measured.get("correlation") or {}).get(_CORRELATION[level])
    of_clusters = measured.get(_CLUSTERS[level])
    if of_clusters is not None:
        clusters = np.sum(of_clusters["confusion"], axis=1)
        order = [measured["classes"].index(name) for name in confusion.classes]
        clusters = clusters[order]
    if (counts.sum(axis=1) > 0).sum() < 2:
        raise UserError(
            f"{confusion.name} has labelled {level} of fewer than two classes; give "
            "the confusion of a part with more"
        )
    fractions = not confusion.is_of_counts
    confusion.require_rows()
    if correlation is None:
        if level == "synapses" or fractions:
            raise UserError(
                f"{confusion.name} does not say how alike the calls of {level} of a "
                "group are; give --correlation, from 0 to below 1"
            )
        print(
            f"warning: {confusion.name} does not say how alike the calls of neurons of "
            "a hemilineage are; taken as independent (--correlation=0), so that errors "
            "which neurons of a group share can pass for a second transmitter"
        )
        correlation = 0.0
    if not 0 <= correlation < 1:
        raise UserError(
            f"a correlation of {correlation:g} (--correlation, or of "
            f"{confusion.name}) is not possible: it is from 0 to below 1"
        )
    if fractions:
        return mixtures.from_fractions(counts, correlation)
    return mixtures.from_counts(counts, correlation, clusters)


def judge(
    counts: np.ndarray,
    model: CallModel,
    classes: tuple[str, ...],
    fdr: float,
    draws: int,
) -> pa.Table:
    """Tests groups by their calls [n, k].

    Columns: `units`; `count_<class>`; `single_neurotransmitter`, the likeliest, and its
    `single_log_likelihood` (nats); `first_neurotransmitter`,
    `second_neurotransmitter` and `second_share` of the likeliest mixture (second null
    and share 0 where none is likelier than the single one); `statistic`, the
    log-likelihood ratio of the two; `p_value`; `q_value` (Benjamini and Hochberg, over
    all groups that are tested); `verdict`: `several` (q ≤ fdr), `one` (not rejected,
    which proves nothing), `too_few` (no calls of so few units could be rejected) or
    `not_predicted`; `rule`. What is undefined is null.
    """
    total = counts.sum(axis=1)
    least = mixtures.least_units(model, fdr, draws)
    tested = total >= least if least else np.zeros(len(total), bool)
    fitted = mixtures.fit(counts, model)
    p, q = np.ones(len(total)), np.ones(len(total))
    if tested.any():
        p[tested] = mixtures.p_values(counts[tested], model, draws)
        from scipy import stats  # takes a second to import

        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    nothing, names = total == 0, np.asarray(classes)
    verdict = np.select(
        [nothing, ~tested, q <= fdr], ["not_predicted", "too_few", "several"], "one"
    )
    likelihood = fitted.log_likelihood.max(axis=1)
    rule = (
        f"{RULE}, correlation {model.correlation:.4g}, false discovery rate {fdr:g}, "
        f"{draws} draws"
    )
    columns = {"units": pa.array(total, pa.int64())}
    for index, name in enumerate(classes):
        columns[f"count_{name}"] = pa.array(counts[:, index], pa.int64())
    columns |= {
        "single_neurotransmitter": pa.array(names[fitted.single], mask=nothing),
        "single_log_likelihood": pa.array(likelihood, mask=nothing),
        "first_neurotransmitter": pa.array(names[fitted.first], mask=nothing),
        "second_neurotransmitter": pa.array(
            names[fitted.second], mask=nothing | (fitted.second < 0)
        ),
        "second_share": pa.array(fitted.share, mask=nothing),
        "statistic": pa.array(fitted.statistic(), mask=nothing),
        "p_value": pa.array(p, mask=~tested),
        "q_value": pa.array(q, mask=~tested),
        "verdict": pa.array(verdict, pa.string()),
        "rule": pa.array([rule] * len(total), pa.string()),
    }
    return pa.table(columns)


def summary(table: pa.Table, fdr: float, draws: int) -> str:
    """What was found, and whether the draws were enough to find it, in lines."""
    counts = {
        e["values"]: e["counts"] for e in table["verdict"].value_counts().to_pylist()
    }
    lines = [", ".join(f"{n:,} {name}" for name, n in sorted(counts.items()))]
    tested = counts.get("one", 0) + counts.get("several", 0)
    if counts.get("too_few") and not tested:
        lines.append(
            "nothing was tested: with so few units, or so high a correlation, one "
            "class can have any calls"
        )
    # So many must have the smallest p-value for Benjamini and Hochberg to reject any.
    needed = math.ceil(tested / (draws + 1) / fdr)
    if needed > 1:
        lines.append(
            f"of {tested:,} tested, fewer than {needed:,} cannot be found with "
            f"{draws:,} draws; --draws={draws * 10 + 9} takes ten times as long"
        )
    return "\n".join(lines)


def main() -> None:
    path = flags.DEFINE_string("predictions", None, "Prediction table.", required=True)
    by = flags.DEFINE_enum("by", "neuron", list(UNITS), "What is tested.")
    confusion = flags.DEFINE_string(
        "confusion",
        None,
        "metrics.json of the test part, or CSV of counts or of rows P(called | true).",
        required=True,
    )
    correlation = flags.DEFINE_float(
        "correlation", None, "Of calls within a group, if not that of metrics.json."
    )
    fdr = flags.DEFINE_float("fdr", 0.05, "False discovery rate, above 0 and below 1.")
    draws = flags.DEFINE_integer(
        "draws", DRAWS, "Groups simulated for each class and size.", lower_bound=99
    )
    n_min = flags.DEFINE_integer(
        "n_min",
        None,
        "Neurons of fewer predicted synapses are no units of a hemilineage or cell "
        "type; by default a tenth of the neurons of metrics.json are smaller.",
        lower_bound=1,
    )
    output = flags.DEFINE_string(
        "output", None, "Feather or Parquet to write.", required=True
    )

    def test() -> None:
        if not 0 < fdr.value < 1:
            raise UserError(f"--fdr={fdr.value:g}: it is above 0 and below 1")
        synapses.check_writable(output.value)
        files.require_other(output.value, path.value)
        level = UNITS[by.value]
        if level == "synapses" and n_min.value is not None:
            raise UserError("--n_min means nothing by neuron; leave it out")
        source = predictions.open(path.value)
        matrix = confusions.load(confusion.value, level).for_classes(source.classes)
        expected = model(matrix, level, correlation.value)
        least = 1
        if level == "neurons":
            least = n_min.value or least_synapses(matrix)
        with files.scratch(output.value) as folder:
            groups, counts = units(source, by.value, folder, least)
        table = judge(counts, expected, source.classes, fdr.value, draws.value)
        table = table.add_column(0, GROUP_COLUMNS[by.value], groups)
        about = {
            "classes": list(source.classes),
            "by": by.value,
            "units": level,
            "confusion": matrix.name,
            "correlation": expected.correlation,
            "fdr": fdr.value,
            "draws": draws.value,
            "n_min": least,
            "predictions": {"path": str(source.path)} | source.about,
        }
        synapses.write(
            table_metadata.described(table, about),
            output.value,
        )
        print(f"{output.value}: {len(table):,} groups; units are {level}")
        print(summary(table, fdr.value, draws.value))

    command.run(test)


if __name__ == "__main__":
    main()
