# SPDX-License-Identifier: Apache-2.0
"""Answers a request: gets its synapses, predicts them and writes a folder of results.

The command `request` and the web service write the same folder, byte for byte:

- `request.json` describes the request.
- `sites/` has the positions as the source gave them and in the volume frame.
- `synapses.feather` has one row for each row of the answer.
- `predictions.feather` and `predictions.json` hold the predictions (merging.py).
- `predictions.csv` and `report.html` show the predictions.
- `answer.json` is written last.

Finished files are kept. A request that was stopped therefore continues where it was.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import feather

import synister_jax
from synister_jax.base import files, output_folders, table_metadata
from synister_jax.base.errors import UserError, redact
from synister_jax.base.progress import Progress
from synister_jax.bulk import execution, merging, planning, unit_results, worker_inputs
from synister_jax.em import crops, volumes
from synister_jax.exchange import export_files, synister
from synister_jax.network import checkpoint, inference, saved_calibration
from synister_jax.ondemand import answer_page, sources
from synister_jax.ondemand.answer_record import REQUEST, AnswerRecord
from synister_jax.ondemand.questions import Asked
from synister_jax.ondemand.sources.credentials import SourceSettings
from synister_jax.tables import predictions, reading, synapses

# Called often with (stage, done, total). The function can raise an error to stop the
# work.
Tell = Callable[[str, int, int], None]

# A unit of this size takes less than a minute on two CPU cores, and a fraction of a
# second on an accelerator. A stopped request therefore loses little work.
UNIT_ROWS = 512
# The sites of this many neurons or positions are in one file.
_GROUP = {"neurons": 100, "positions": 10_000}


@dataclasses.dataclass(frozen=True)
class OpenNetwork:
    """An opened checkpoint, and the opened volume from which it reads crops."""

    workdir: pathlib.Path
    step: int
    classifier: inference.Classifier
    volume: volumes.Volume
    abstain_below: float | None

    @classmethod
    def open(
        cls,
        workdir: pathlib.Path,
        step: int,
        volume: str,
        batch_size: int,
        calibrated: bool = False,
    ) -> "OpenNetwork":
        """Opens a checkpoint and a volume.

        Args:
          workdir: the folder of the run.
          step: the step of the checkpoint.
          volume: the URI of the volume.
          batch_size: the number of crops that are predicted at once.
          calibrated: use the saved calibration of the checkpoint.

        Raises:
          UserError: the run, the step, the volume or the calibration does not exist or
            cannot be opened.
        """
        members = ((str(workdir), step),)
        fitted = saved_calibration.load(members, 1) if calibrated else None
        temperature = fitted["temperature"] if fitted else None
        job = worker_inputs.Inputs(
            members, batch_size, 1, volume, None, "", False, temperature
        )
        classifier, opened = job.open()
        if fitted:
            [member] = classifier.members
            saved_calibration.require_parameters(fitted, member["parameters_sha256"])
        below = fitted["abstain_below"] if fitted else None
        return cls(workdir, step, classifier, opened, below)


def choose_step(workdir: pathlib.Path, text: str) -> int:
    """Returns the step that a text names.

    Args:
      workdir: the folder of the run.
      text: a number, or `best`. If no checkpoint was validated, `best` is the latest.

    Raises:
      UserError: the run or the checkpoint does not exist, or the text is neither a
        number nor `best`.
    """
    checkpoint.load_config(workdir)  # refuses a folder that is not a run
    if text == "best":
        return checkpoint.best_or_latest_step(workdir)
    if not text.isdecimal():
        raise UserError(f"step {text!r}: give a number or `best`")
    return checkpoint.choose_step(workdir, int(text))


def answer(
    asked: Asked,
    network: OpenNetwork,
    settings: SourceSettings,
    folder: pathlib.Path,
    tell: Tell,
    most_synapses: int | None = None,
) -> AnswerRecord:
    """Answers a request in a folder, and returns the content of its answer.json.

    Args:
      asked: the neurons or positions of the request.
      network: the network that predicts, and its volume.
      settings: the settings of the source, with the name of the source.
      folder: the folder of results. It is created if it does not exist.
      tell: called with the progress.
      most_synapses: the largest number of synapses of all neurons together. None means
        that any number is allowed.

    Raises:
      UserError: the source or the volume cannot be read, the folder belongs to another
        request, or there are too many synapses. Finished files are kept.
    """
    files.make_folder(folder)
    asked_of = settings.shown()
    request = {
        "kind": asked.kind,
        "source": settings.source,
        "asked_of": asked_of,
        "step": network.step,
        "volume": network.volume.uri,
        "volume_shape_zyx": list(network.volume.shape_zyx),
        "asked_sha256": files.sha256_of_columns(asked.table, asked.table.column_names),
    }
    output_folders.require_same(folder / REQUEST, request)
    unknown, without = _find_synapses(
        asked, network, settings, folder, tell, most_synapses
    )
    record, doubt = _predict(network, folder, tell)
    table = predictions.open(folder / "predictions.feather")
    export_files.write(
        folder / "predictions.csv", table, _original_columns, silent=True
    )
    about: AnswerRecord = {
        "kind": asked.kind,
        "source": settings.source,
        "source_title": sources.SOURCES[settings.source].title,
        "asked_of": asked_of,
        "asked": len(asked.table),
        "unknown_neurons": [str(neuron) for neuron in unknown],
        "neurons_without_synapses": [str(neuron) for neuron in without],
        "rows": record["rows"],
        "status": record["status"],
        "classes": list(network.classifier.classes),
        "model": {"workdir": network.workdir.name, "step": network.step},
        "volume": redact(network.volume.uri),
        "temperature": record.get("temperature"),
        "warnings": [doubt] if doubt else [],
        "written_by": f"synister_jax {synister_jax.__version__}",
    }
    files.write_text(folder / "report.html", answer_page.render(folder, about))
    files.write_json(folder / "answer.json", about)
    return about


def at_once(
    network: OpenNetwork, positions_nm_zyx: np.ndarray
) -> tuple[np.ndarray, list]:
    """Predicts a few positions at once, without a folder.

    Args:
      network: the network that predicts, and its volume.
      positions_nm_zyx: [n, 3] in nm, in the volume frame.

    Returns:
      The probabilities, [n, classes] float32, and the statuses, [n]. Positions without
      a prediction have NaN as probabilities.

    Raises:
      UserError: the volume cannot be read.
    """
    volume, classifier = network.volume, network.classifier
    shape = tuple(classifier.config.crop_shape_zyx)
    columns = dict(zip(synapses.POSITION, positions_nm_zyx.T, strict=True))
    starts, status = planning.locate(pa.table(columns), shape, volume)
    places = np.flatnonzero(planning.has_crop(status))
    found = list(crops.read(volume, starts[places], shape))
    whole = np.array([not crop.unreadable for crop in found], bool)
    status[places[~whole]] = crops.MISSING_DATA
    probabilities = np.full((len(status), len(classifier.classes)), np.nan, np.float32)
    if found:
        records = np.stack([crop.voxels for crop in found])
        probabilities[places[whole]] = classifier(records)[whole]
    return probabilities, list(status)


def _find_synapses(
    asked: Asked,
    network: OpenNetwork,
    settings: SourceSettings,
    folder: pathlib.Path,
    tell: Tell,
    most_synapses: int | None,
) -> tuple[list[int], list[int]]:
    """Writes synapses.feather; returns unknown neurons and neurons without synapses."""
    path = folder / "synapses.feather"
    try:
        about = table_metadata.of(pa.ipc.open_file(str(path)).schema)
        return about["unknown"], about["without"]
    except (OSError, pa.ArrowException):
        pass  # the file does not exist yet, or it is damaged
    whole = (
        asked.kind == "neurons" and settings.source == "none"
    )  # a table is read once
    size = len(asked.table) if whole else _GROUP[asked.kind]
    files.make_folder(folder / "sites")
    pieces: list[pa.Table] = []
    unknown: list[int] = []
    without: list[int] = []
    for first in range(0, len(asked.table), max(size, 1)):
        piece = folder / "sites" / f"sites-{first:09d}.feather"
        table = _read_group(piece)
        if table is None:
            stage = "asking for synapses"
            if asked.kind == "positions":
                stage = "placing in the volume"
            tell(stage, first, len(asked.table))
            group = asked.table.slice(first, size)
            found = _group(group, first, asked, settings, tell)
            shape = network.volume.shape_zyx
            files.write_feather(piece, _placed(found, shape, settings))
            table = feather.read_table(piece, memory_map=False)
        about = table_metadata.of(table)
        unknown += about["unknown"]
        without += about["without"]
        pieces.append(table.replace_schema_metadata(None))
        rows = sum(map(len, pieces))
        if most_synapses is not None and rows > most_synapses:
            raise UserError(
                f"these neurons have more than {most_synapses:,} synapses, which is "
                "the limit of one request; ask for fewer neurons at once"
            )
    about = {"unknown": unknown, "without": without}
    table = table_metadata.described(pa.concat_tables(pieces), about)
    synapses.write(synapses.conform(table, "the request", answer_all=True), path)
    return unknown, without


def _read_group(path: pathlib.Path) -> pa.Table | None:
    """Returns the sites of a file, or None if the file is missing or damaged."""
    try:
        table = feather.read_table(path, memory_map=False)
        whole = {"unknown", "without"} <= table_metadata.of(table).keys()
    except (OSError, pa.ArrowException, ValueError):
        return None
    return table if whole else None


def _group(
    rows: pa.Table,
    first: int,
    asked: Asked,
    settings: SourceSettings,
    tell: Tell,
) -> pa.Table:
    """Returns the sites of some rows of the request, in their order.

    The table has the columns of `sources.SITES`.
    """
    if asked.kind == "positions":
        names = {"position_id": "synapse_id"}
        columns = [names.get(name, name) for name in rows.column_names]
        sites = rows.rename_columns(columns).select(sources.SITES.names)
        about: dict[str, list[int]] = {"unknown": [], "without": []}
    else:
        found = []
        neurons = rows["neuron_id"].to_pylist()
        for answered in sources.presynaptic_sites(neurons, settings):
            found.append(answered)
            tell("asking for synapses", first + len(found), len(asked.table))
        about = {
            "unknown": [f.neuron_id for f in found if not f.known],
            "without": [f.neuron_id for f in found if f.known and not len(f.sites)],
        }
        # The order in which a source gives the sites may change between requests.
        order = [("synapse_id", "ascending")]
        sites = pa.concat_tables([f.sites.sort_by(order) for f in found])
    return table_metadata.described(sites, about)


def _placed(
    sites: pa.Table,
    volume_shape_zyx: Sequence[int],
    settings: SourceSettings,
) -> pa.Table:
    """Adds `z_nm`, `y_nm` and `x_nm` in the volume frame; unknown values are NaN."""
    coordinates = {name: sites[name].to_numpy() for name in "xyz"}
    placed = sources.to_volume_nm_zyx(coordinates, volume_shape_zyx, settings)
    for name, values in zip(synapses.POSITION, placed.T, strict=True):
        sites = sites.append_column(name, pa.array(np.ascontiguousarray(values)))
    return sites


class _Counted(Progress):
    """A progress that shows nothing, and reports every batch to `tell`."""

    def __init__(self, done: int, total: int, tell: Tell) -> None:
        super().__init__("predict", total, "synapses", done, silent=True)
        self._tell, self._rows, self._all_rows = tell, done, total
        self.add(0)

    def add(self, count: int = 1) -> None:
        self._rows += count
        self._tell("predicting", self._rows, self._all_rows)


def _predict(
    network: OpenNetwork, folder: pathlib.Path, tell: Tell
) -> tuple[merging.PredictionsRecord, str | None]:
    """Returns the content of predictions.json, and the doubt about the positions."""
    source = reading.open(folder / "synapses.feather")
    # The name has no path, so that the same request in another folder gives the same
    # bytes.
    source = dataclasses.replace(source, name="the request")
    plan = planning.of_classifier(
        network.classifier, source, network.volume, folder, UNIT_ROWS
    )
    left = unit_results.unfinished(plan, range(len(plan)), retry_missing=False)
    total = plan.predicted_rows
    progress = _Counted(total - sum(left.values()), total, tell)
    execution.execute(plan, list(left), network.classifier, network.volume, progress)
    below = network.abstain_below
    record = merging.finish(
        plan, network.classifier, source, network.volume, abstain_below=below
    )
    return record, plan.about["doubt"]


def _original_columns(table: pa.Table) -> pa.Table:
    """Returns the columns that synistereq (the original) writes, and the status."""
    columns = synister.request_columns(table)
    return columns.append_column("status", table["status"])
