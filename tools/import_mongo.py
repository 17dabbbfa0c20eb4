# SPDX-License-Identifier: Apache-2.0
"""The original system's MongoDB: ground truth and predictions, in and out.

    python tools/import_mongo.py load --mongo=mongodb://localhost/synister \
        --synapses=data/fafb_v3
    python tools/import_mongo.py dump --mongo=synister \
        --credentials=db_credentials.ini --output=synapses.feather
    python tools/import_mongo.py load_predictions --mongo=mongodb://localhost/synister \
        --predictions=predictions.feather --split=skeleton --experiment=fafb \
        --train=3 --predict=1000 [--part=test]
    python tools/import_mongo.py dump_predictions --mongo=mongodb://localhost/synister \
        --split=skeleton --experiment=fafb --train=3 --predict=1000 \
        [--classes=gaba,acetylcholine,…] --output=predictions.feather

Predictions of a whole brain: --layout=brain --collection=NAME --predict=8 instead of
split, experiment and train. Kill an import at any moment and run it again.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.tables import reading, synapses
from synister_jax.tables.mongo import (
    address,
    brain_predictions,
    databases,
    documents,
    json_export,
    testset_predictions,
)

TEST_SET, BRAIN = "testset", "brain"
_OF_LAYOUT = {
    TEST_SET: ("split", "experiment", "train", "predict"),
    BRAIN: ("collection", "predict"),
}


def _define_mongo() -> None:
    flags.DEFINE_string("mongo", None, "mongodb://… or name of a database.")
    flags.DEFINE_string("credentials", None, "Ini file with [Credentials].")
    flags.mark_flag_as_required("mongo")


def _define_overwrite() -> None:
    flags.DEFINE_bool("overwrite", False, "Replace what is there.")


def _define_layout() -> None:
    flags.DEFINE_enum("layout", TEST_SET, list(_OF_LAYOUT), "Layout of predictions.")
    flags.DEFINE_string("split", None, "Name of the split.")
    flags.DEFINE_string("experiment", None, "The original's experiment.")
    flags.DEFINE_integer("train", None, "The original's train number.")
    flags.DEFINE_integer("predict", None, "The original's predict number.")
    flags.DEFINE_string("collection", None, "Collection of a whole brain.")

    @flags.multi_flags_validator(
        ["layout", *dict.fromkeys(sum(_OF_LAYOUT.values(), ()))]
    )
    def _(values: dict[str, Any]) -> bool:
        wanted = _OF_LAYOUT[values["layout"]]
        for name, value in values.items():
            if name != "layout" and (value is not None) != (name in wanted):
                verb = "needs" if name in wanted else "does not take"
                raise flags.ValidationError(
                    f"--layout={values['layout']} {verb} --{name}"
                )
        return True


def _define_load() -> None:
    _define_mongo()
    _define_overwrite()
    flags.DEFINE_string("synapses", None, "Synapse table.")
    flags.mark_flag_as_required("synapses")


def load() -> None:
    given = flags.FLAGS
    _check_not_itself(given.synapses)
    table = reading.load(given.synapses)
    fractions = (synapses.positions_nm_zyx(table) % 1 != 0).any(axis=1)
    if count := np.count_nonzero(fractions):
        print(
            f"note: {count:,} positions are not whole nm; they are stored as they are, "
            "and the original system cuts their fractions off"
        )
    content, sha256 = _source(given.synapses, table)
    with databases.connect(given.mongo, given.credentials) as database:
        written = databases.write(database, content, table, sha256, given.overwrite)
        counts = databases.recorded(database, databases.GROUND_TRUTH)["rows"]
    shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"{_where()}: {shown}{'' if written else ', there already'}")


def _check_not_itself(source: str) -> None:
    """A killed --overwrite of a database by its own content would leave no copy."""
    if not flags.FLAGS.overwrite or not source.startswith(address.SCHEMES):
        return
    names = [
        address.database_name(address.resolve(*uri))
        for uri in ((source,), (flags.FLAGS.mongo, flags.FLAGS.credentials))
    ]
    if names[0] == names[1]:
        raise UserError(
            f"--overwrite of database {names[0]} from a database of that name: dump it "
            "to a file first, and load that"
        )


def _source(
    location: str, table: pa.Table
) -> tuple[Mapping[str, Iterable[documents.Document]], str]:
    """Documents and their checksum: those of an export v3 as they are."""
    folder = pathlib.Path(location)
    if folder.is_dir():
        parts = [files.sha256(folder / f"{n}_v3.json") for n in documents.COLLECTIONS]
        return json_export.collections(folder), " ".join(parts)
    names = table.column_names
    return documents.from_table(table), files.sha256_of_columns(table, names)


def _where() -> str:
    return address.redact(address.resolve(flags.FLAGS.mongo, flags.FLAGS.credentials))


def _define_dump() -> None:
    _define_mongo()
    flags.DEFINE_string("output", None, "Feather or Parquet to write.")
    flags.mark_flag_as_required("output")


def dump() -> None:
    given = flags.FLAGS
    where = _where()
    with databases.connect(given.mongo, given.credentials) as database:
        columns, batches = databases.read_batches(database)
        schema = synapses.conform(columns.empty_table(), where).schema
        total = database.synapses.count_documents({})
        checked = _checked(batches, where)
        rows = synapses.write_batches(given.output, schema, checked, total)
    print(f"{given.output}: {rows:,} synapses of {where}")


def _checked(batches: Iterable[pa.RecordBatch], where: str) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in batches:
        table = pa.Table.from_batches([batch])
        source = f"{where}, rows counted from {start:,} on"
        checked = synapses.conform(table, source)
        start += len(batch)
        yield from checked.replace_schema_metadata().to_batches()


def _define_load_predictions() -> None:
    _define_mongo()
    _define_overwrite()
    _define_layout()
    flags.DEFINE_string("predictions", None, "Feather of predictions.")
    flags.mark_flag_as_required("predictions")
    parts = ["all", *synapses.PARTS]
    flags.DEFINE_enum("part", "all", parts, "Rows to write, of the split.")


def load_predictions() -> None:
    given = flags.FLAGS
    name = _collection()
    if given.layout == BRAIN and given.part != "all":
        raise UserError("--part is of a split; --layout=brain takes all rows")
    feather = testset_predictions.open_feather(
        given.predictions, given.split, given.part
    )
    with databases.connect(given.mongo, given.credentials) as database:
        if given.layout == BRAIN:
            written = brain_predictions.write_brain(
                database, name, given.predict, feather, given.overwrite
            )
        else:
            written = testset_predictions.write_test_set(
                database, name, feather, given.overwrite
            )
    done = "written" if written else "there already"
    print(f"{_where()}, {given.layout} {name}: {given.predictions} {done}")


def _collection() -> str:
    given = flags.FLAGS
    if given.layout == BRAIN:
        name = given.collection
    else:
        name = testset_predictions.test_set_name(
            given.split, given.experiment, given.train, given.predict
        )
    testset_predictions.check_name(name)
    return name


def _define_dump_predictions() -> None:
    _define_mongo()
    _define_layout()
    flags.DEFINE_list("classes", None, "Class names in the network's order.")
    flags.DEFINE_string("output", None, "Feather to write.")
    flags.mark_flag_as_required("output")


def dump_predictions() -> None:
    given = flags.FLAGS
    name = _collection()
    source = f"{_where()} {name}"
    with databases.connect(given.mongo, given.credentials) as database:
        if given.layout == BRAIN:
            schema, batches, total = brain_predictions.read_brain(
                database, name, given.predict, given.classes, source
            )
        else:
            schema, batches, total = testset_predictions.read_test_set(
                database, name, given.classes, source
            )
        rows = synapses.write_batches(given.output, schema, batches, total)
    print(f"{given.output}: {rows:,} predictions of {source}")


_COMMANDS: Mapping[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "load": (_define_load, load),
    "dump": (_define_dump, dump),
    "load_predictions": (_define_load_predictions, load_predictions),
    "dump_predictions": (_define_dump_predictions, dump_predictions),
}


if __name__ == "__main__":
    define, main = _COMMANDS[command.subcommand(list(_COMMANDS))]
    define()
    command.run(main)
