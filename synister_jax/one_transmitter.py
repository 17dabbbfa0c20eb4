# SPDX-License-Identifier: Apache-2.0
r"""Tests which neurons, hemilineages or cell types release more than one transmitter.

    python -m synister_jax.one_transmitter --predictions=DIR/predictions.feather \
        --by=hemilineage --confusion=RUN/evaluation/test/step-N/metrics.json \
        --output=hemilineages.feather

The command tests for each group whether its calls can come from one transmitter. It
knows how often the network takes one transmitter for another, and how much the calls
within a group depend on each other. A false discovery rate limits the errors over all
groups. docs/one_transmitter.md says what the test assumes, and what the verdict
`several` can mean.
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

# The units of a group: the synapses of a neuron, or the neurons of a hemilineage or
# cell type. `evaluate` measures the confusion of both. Brain regions are not tested,
# because nobody expects one transmitter there.
UNITS = {"neuron": "synapses", "hemilineage": "neurons", "cell_type": "neurons"}
# The key of metrics.json for the correlation of the units' calls, and the key for the
# groups in which these units come.
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
    """Counts how the units of every group are called.

    The units of a neuron are its predicted synapses. The units of a hemilineage or cell
    type are its neurons, each called by majority (`vote_tallies.calls_of_neurons`).

    Args:
      n_min: leave out neurons that have fewer predicted synapses.

    Returns:
      The n groups in ascending order, and the counts by class, int64 [n, k].

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
            f"{GROUP_COLUMNS[by]} is empty; choose another --by"
        )
    predicted = neurons.predicted
    if small := int(((predicted > 0) & (predicted < n_min)).sum()):
        print(
            f"{small:,} of {len(neurons.groups):,} neurons have fewer than {n_min} "
            "predicted synapses and are not counted: their calls are wrong more often "
            "than the confusion matrix says"
        )
    return names, counts


def least_synapses(confusion: Confusion) -> int:
    """Returns how many predicted synapses a neuron needs to be counted.

    The confusion matrix was measured on neurons, of which a tenth are smaller than this
    number. If the matrix does not say how large they were, the function warns and
    returns 1.
    """
    if least := confusion.measured.get("neurons", {}).get("tenth_of_synapses"):
        return least
    print(
        f"warning: {confusion.name} does not say how large its neurons are. Neurons "
        "with few synapses are called wrongly more often, and can look like another "
        "transmitter: give --n_min"
    )
    return 1


def model(confusion: Confusion, level: str, correlation: float | None) -> CallModel:
    """Returns how the calls of a group with one transmitter scatter over the classes.

    Args:
      confusion: counts, or rows that sum to 1, of units at this level.
      level: "synapses" or "neurons".
      correlation: how much the calls of the units of a group depend on each other, from
        0 to below 1. None takes the value of metrics.json. If metrics.json has no value
        for neurons, the function warns and takes 0.

    Raises:
      UserError: the correlation is needed and unknown; or the confusion matrix has
        neither counts nor rows that sum to 1, or fewer than two classes.
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
            f"{confusion.name} has {level} of only one true class, but two classes are "
            "needed; give the confusion matrix of a part that has more classes"
        )
    fractions = not confusion.is_of_counts
    confusion.require_rows()
    if correlation is None:
        if level == "synapses" or fractions:
            raise UserError(
                f"{confusion.name} does not say how much the calls of the {level} of a "
                "group depend on each other; give --correlation, from 0 to below 1"
            )
        print(
            f"warning: {confusion.name} does not say how much the calls of the neurons "
            "of a hemilineage depend on each other. They are taken as independent "
            "(--correlation=0): errors that the neurons of a group share can look like "
            "a second transmitter"
        )
        correlation = 0.0
    if not 0 <= correlation < 1:
        raise UserError(
            f"a correlation of {correlation:g} (from --correlation or "
            f"{confusion.name}) is not possible: give a number from 0 to below 1"
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
    """Tests every group by the calls of its units.

    Args:
      counts: int64 [n, k], the calls of n groups by class.
      model: how the calls of a group with one transmitter scatter.
      classes: the k names.
      fdr: the false discovery rate.
      draws: the number of groups that are simulated for each class and size.

    Returns:
      A table with one row for each group. A value that is not defined is null.

      - `units`, `count_<class>`: the number of units, and of those of each call.
      - `single_neurotransmitter`, `single_log_likelihood`: the likeliest single
        transmitter, and its log-likelihood in nats.
      - `first_neurotransmitter`, `second_neurotransmitter`, `second_share`: the
        likeliest mixture of two. The second is null and its share 0 if no mixture is
        likelier than the single transmitter.
      - `statistic`: the log-likelihood ratio of the mixture and the single transmitter.
      - `p_value`, and `q_value` by Benjamini and Hochberg over all tested groups.
      - `verdict`: `several` (q ≤ fdr), `one` (not rejected, which proves nothing),
        `too_few` (with so few units no calls could be rejected) or `not_predicted`.
      - `rule`: how the test was made.
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
    """Returns lines that say what was found, and whether there were enough draws."""
    counts = {
        e["values"]: e["counts"] for e in table["verdict"].value_counts().to_pylist()
    }
    lines = [", ".join(f"{n:,} {name}" for name, n in sorted(counts.items()))]
    tested = counts.get("one", 0) + counts.get("several", 0)
    if counts.get("too_few") and not tested:
        lines.append(
            "nothing was tested: with so few units, or so high a correlation, a group "
            "with one transmitter can have any calls"
        )
    # Benjamini and Hochberg reject a group only if this many have the smallest p-value.
    needed = math.ceil(tested / (draws + 1) / fdr)
    if needed > 1:
        lines.append(
            f"if fewer than {needed:,} of the {tested:,} tested groups have several "
            f"transmitters, {draws:,} draws cannot find them; "
            f"--draws={draws * 10 + 9} can, and takes ten times as long"
        )
    return "\n".join(lines)


def main() -> None:
    path = flags.DEFINE_string(
        "predictions",
        None,
        "Read these predictions: a Feather file, or a folder of Parquet files.",
        required=True,
    )
    by = flags.DEFINE_enum(
        "by", "neuron", list(UNITS), "Group the synapses by this, and test each group."
    )
    confusion = flags.DEFINE_string(
        "confusion",
        None,
        "Take from this file how often the network calls one class for another: "
        "metrics.json of the test part, its folder RUN/evaluation/test, or a CSV of "
        "counts or of P(called | true) whose rows are the true classes.",
        required=True,
    )
    correlation = flags.DEFINE_float(
        "correlation",
        None,
        "Say how strongly the calls within a group depend on each other: a correlation "
        "from 0 to below 1. By default the correlation in metrics.json.",
    )
    fdr = flags.DEFINE_float(
        "fdr", 0.05, "Allow this false discovery rate, above 0 and below 1."
    )
    draws = flags.DEFINE_integer(
        "draws",
        DRAWS,
        "Simulate this many groups for each class and size. More draws find rarer "
        "groups and take longer.",
        lower_bound=99,
    )
    n_min = flags.DEFINE_integer(
        "n_min",
        None,
        "With --by=hemilineage or cell_type, leave out neurons that have fewer "
        "predicted synapses than this. By default the number below which a tenth of "
        "the neurons in metrics.json are.",
        lower_bound=1,
    )
    output = flags.DEFINE_string(
        "output",
        None,
        "Write the verdicts into this file, NAME.feather or NAME.parquet.",
        required=True,
    )

    def test() -> None:
        if not 0 < fdr.value < 1:
            raise UserError(f"--fdr={fdr.value:g}: give a rate above 0 and below 1")
        synapses.check_writable(output.value)
        files.require_other(output.value, path.value)
        level = UNITS[by.value]
        if level == "synapses" and n_min.value is not None:
            raise UserError("--n_min means nothing with --by=neuron; leave it out")
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
