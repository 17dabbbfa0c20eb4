# SPDX-License-Identifier: Apache-2.0
"""On demand: neurons or positions in, their transmitters out.

    python -m synister_jax.request --neurons=16,27295 --source=fafb-catmaid \
        --workdir=RUN --volume=URI --output=DIR
    python -m synister_jax.request --positions=positions.csv --source=hemibrain \
        --workdir=RUN --volume=URI --output=DIR

A neuron's presynaptic sites are asked of CATMAID, FlyWire or neuPrint, or looked up in
a table (--source=none --synapses=TABLE). Positions are in the source's own coordinates
(docs/sources.md). Writes DIR/predictions.csv in the original's columns, .feather and
DIR/report.html with a bar chart for every neuron; every position has its row, in order,
with a status. Kill it and rerun it: what is finished stays.
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

_SHOWN = 20  # neurons that are printed


class _Told:
    """Prints how far each stage is."""

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
        "neurons", None, "CSV with their ids (skid, bodyid, root_id, …), or ids: 16,27."
    )
    positions = flags.DEFINE_string(
        "positions", None, "CSV with x, y, z, and where there are any id and skid."
    )
    source = flags.DEFINE_enum(
        "source",
        None,
        list(sources.SOURCES),
        "Where neurons and positions are from.",
        required=True,
    )
    table = flags.DEFINE_string(
        "synapses", None, "Synapse table with the neurons of --source=none."
    )
    credentials = flags.DEFINE_string(
        "credentials", None, "Ini file of the source, where the environment has none."
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Folder of a trained run.", required=True
    )
    step = flags.DEFINE_string("step", "best", "Checkpoint: a number or `best`.")
    calibrated = flags.DEFINE_bool(
        "calibrated", False, "With the temperature that calibrate.py fitted."
    )
    volume = flags.DEFINE_string("volume", None, "Volume.", required=True)
    batch_size = flags.DEFINE_integer("batch_size", 32, "Crops at once.", lower_bound=1)
    output = flags.DEFINE_string("output", None, "Folder of the answer.", required=True)

    def run() -> None:
        if (neurons.value is None) == (positions.value is None):
            raise UserError("give either --neurons or --positions")
        looked_up = source.value == "none" and neurons.value is not None
        if looked_up != (table.value is not None):
            raise UserError(
                "--synapses=TABLE is where --source=none looks up --neurons; "
                + ("give it" if looked_up else "leave it out")
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
    """With `best`, an answer goes on with the step it began with: training may, too."""
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
    """The calls of the first neurons, in the order asked."""
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
