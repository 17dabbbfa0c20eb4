# SPDX-License-Identifier: Apache-2.0
r"""Answers a request: names neurons or positions, and gets their transmitters.

    python -m synister_jax.request --neurons=16,27295 --source=fafb-catmaid \
        --workdir=RUN --volume=URI --output=DIR
    python -m synister_jax.request --positions=positions.csv --source=hemibrain \
        --workdir=RUN --volume=URI --output=DIR

The command asks CATMAID, FlyWire or neuPrint for the presynaptic sites of the neurons,
or looks them up in a table (--source=none --synapses=TABLE). Positions are in the
coordinates of the source; docs/sources.md lists them. The command writes

    DIR/predictions.csv      one row for every position, in order, with a status and the
                             columns of the original request tool
    DIR/predictions.feather  the same as a prediction table
    DIR/report.html          a page with a bar chart for every neuron

You can kill the command and type it again: what is finished stays.
"""

import io
import pathlib
import re
import sys

import pyarrow as pa
from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.evaluation import group_calls
from synister_jax.ondemand import answer_record, questions, sources
from synister_jax.tables import predictions

_SHOWN = 20  # so many neurons are printed


class _Told:
    """Shows the progress of each stage."""

    def __init__(self) -> None:
        self._stage, self._done = "", 0
        self._progress: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage, self._done = stage, done
            self._progress = Progress(stage, total, "", done)
        elif self._progress is not None and done > self._done:
            self._progress.add(done - self._done)
            self._done = done


def main() -> None:
    neurons = flags.DEFINE_string(
        "neurons",
        None,
        "Predict the synapses of these neurons: ids separated by commas (16,27), or a "
        "CSV with a column of ids (skid, bodyid, root_id or a similar name).",
    )
    positions = flags.DEFINE_string(
        "positions",
        None,
        "Predict these positions: a CSV with the columns x, y and z. It may have the "
        "columns id and skid, too.",
    )
    source = flags.DEFINE_enum(
        "source",
        None,
        list(sources.SOURCES),
        "Say whose ids or coordinates these are. docs/sources.md describes each "
        "source.",
        required=True,
    )
    table = flags.DEFINE_string(
        "synapses",
        None,
        "With --source=none, look up the neurons in this synapse table.",
    )
    credentials = flags.DEFINE_string(
        "credentials",
        None,
        "Read the address and the token of the source from this ini file. Environment "
        "variables, if they are set, come first.",
    )
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Predict with the network of the run in this folder.",
        required=True,
    )
    step = flags.DEFINE_string(
        "step",
        "best",
        "Use the checkpoint of this step, or `best` for the best on validation.",
    )
    calibrated = flags.DEFINE_bool(
        "calibrated",
        False,
        "Divide the logits by the temperature that `synister_jax.calibrate` fitted to "
        "the checkpoint.",
    )
    volume = flags.DEFINE_string(
        "volume",
        None,
        "Read the crops from this volume: a folder, or an address that starts with "
        "https, gs or s3.",
        required=True,
    )
    batch_size = flags.DEFINE_integer(
        "batch_size", 32, "Classify this many crops at once.", lower_bound=1
    )
    output = flags.DEFINE_string(
        "output", None, "Write the answer into this folder.", required=True
    )

    def run() -> None:
        if (neurons.value is None) == (positions.value is None):
            raise UserError("give either --neurons or --positions")
        looked_up = source.value == "none" and neurons.value is not None
        if looked_up != (table.value is not None):
            raise UserError(
                "--neurons with --source=none needs --synapses=TABLE, and nothing else "
                f"uses this table; {'give it' if looked_up else 'leave it out'}"
            )
        asked = _asked(neurons.value, positions.value)
        settings = sources.settings(
            source.value, credentials.value, synapses=table.value
        )
        # JAX takes seconds to import: --help and wrong flags answer without it.
        from synister_jax.ondemand import answering

        run_folder, folder = pathlib.Path(workdir.value), pathlib.Path(output.value)
        network = answering.OpenNetwork.open(
            run_folder,
            answering.choose_step(run_folder, _step(folder, step.value)),
            volume.value,
            batch_size.value,
            calibrated.value,
        )
        about = answering.answer(asked, network, settings, folder, _Told())
        for warning in about["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
        _print_neurons(folder)
        for name in ("unknown_neurons", "neurons_without_synapses"):
            if about[name]:
                shown = ", ".join(about[name][:_SHOWN])
                more = ", …" if len(about[name]) > _SHOWN else ""
                print(f"{name.replace('_', ' ')} ({len(about[name]):,}): {shown}{more}")
        counts = ", ".join(f"{n:,} {name}" for name, n in about["status"].items())
        print(f"{folder}/predictions.csv: {about['rows']:,} rows: {counts or 'none'}")
        print(f"report: {(folder / 'report.html').resolve()}")

    command.run(run)


def _step(folder: pathlib.Path, text: str) -> str:
    """Returns the step to use. For `best`, an answer that was begun keeps its step.

    Training may have found a better checkpoint meanwhile, and one answer must come from
    one checkpoint.
    """
    if text == "best" and (folder / answer_record.REQUEST).exists():
        return str(files.read_json(folder / answer_record.REQUEST).get("step", text))
    return text


def _asked(neurons: str | None, positions: str | None) -> questions.Asked:
    if neurons is not None and re.fullmatch(r"[0-9,\s]+", neurons):
        checked = questions.check(io.BytesIO(neurons.encode()), "neurons")
        if checked.asked is None:
            raise UserError(f"--neurons={neurons}: {checked.errors[0].message}")
        asked, warnings = checked.asked, checked.warnings
    else:
        kind: questions.Kind = "positions" if neurons is None else "neurons"
        path = positions if neurons is None else neurons
        if not path:
            raise UserError(f"--{kind} is empty; give a CSV file")
        asked, warnings = questions.load(path, kind)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return asked


def _print_neurons(folder: pathlib.Path) -> None:
    """Prints the calls of the first neurons, in the order in which they were asked."""
    source = predictions.open(folder / "predictions.feather")
    owners = [table["neuron_id"].drop_null() for table in source.tables(["neuron_id"])]
    order = pa.chunked_array(owners, pa.int64()).unique().to_pylist()
    if not order:
        return
    called = group_calls.of(source, "neuron", folder=folder).to_pylist()
    by_id = {row["neuron_id"]: row for row in called}
    for neuron in order[:_SHOWN]:
        row = by_id[neuron]
        name = row["predicted_neurotransmitter"] or "not predicted"
        votes = row.get(f"count_{name}", 0)
        print(f"{neuron}: {name}, {votes:,} of {row['predicted']:,} synapses")
    if len(order) > _SHOWN:
        print(f"… and {len(order) - _SHOWN:,} more neurons, in the report")


if __name__ == "__main__":
    main()
