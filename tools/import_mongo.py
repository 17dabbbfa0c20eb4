# SPDX-License-Identifier: Apache-2.0
r"""Copies ground truth and predictions between files and MongoDB.

The databases have the layout of the original system, funkelab/synister. `load` and
`dump` copy a synapse table into a database and out of it. `load_predictions` and
`dump_predictions` do this with a prediction table.

    python tools/import_mongo.py load --mongo=mongodb://localhost/synister \
        --synapses=data/fafb_v3
    python tools/import_mongo.py dump --mongo=synister \
        --credentials=db_credentials.ini --output=synapses.feather
    python tools/import_mongo.py load_predictions --mongo=mongodb://localhost/synister \
        --predictions=predictions.feather --split=skeleton --experiment=fafb \
        --train=3 --predict=1000 --part=test
    python tools/import_mongo.py dump_predictions --mongo=mongodb://localhost/synister \
        --split=skeleton --experiment=fafb --train=3 --predict=1000 \
        --output=predictions.feather

The predictions of a whole brain have a layout of their own. For these, give
--layout=brain --collection=NAME --predict=8, and leave out --split, --experiment and
--train. If an import stops before its end, run the same command again.
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
    flags.DEFINE_string(
        "mongo",
        None,
        "Use this database: mongodb://HOST/DB, or a name together with --credentials.",
    )
    flags.DEFINE_string(
        "credentials",
        None,
        "Read host, port, user and password from the section [Credentials] of this ini "
        "file.",
    )
    flags.mark_flag_as_required("mongo")


def _define_overwrite() -> None:
    flags.DEFINE_bool("overwrite", False, "Replace what the database has already.")


def _define_layout() -> None:
    flags.DEFINE_enum(
        "layout",
        TEST_SET,
        list(_OF_LAYOUT),
        "Use the layout for the test set of a split, or the layout for a whole brain.",
    )
    flags.DEFINE_string("split", None, "Use the predictions of this split.")
    flags.DEFINE_string(
        "experiment", None, "Use this experiment of the original system."
    )
    flags.DEFINE_integer("train", None, "Use this train number of the original system.")
    flags.DEFINE_integer(
        "predict", None, "Use this predict number of the original system."
    )
    flags.DEFINE_string("collection", None, "Use this collection (for --layout=brain).")

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
    flags.DEFINE_string(
        "synapses",
        None,
        "Store this synapse table (a file, a folder with an export v3, or a database).",
    )
    flags.mark_flag_as_required("synapses")


def load() -> None:
    given = flags.FLAGS
    _check_not_itself(given.synapses)
    table = reading.load(given.synapses)
    fractions = (synapses.positions_nm_zyx(table) % 1 != 0).any(axis=1)
    if count := np.count_nonzero(fractions):
        print(
            f"note: {count:,} positions are not whole nm; the database stores them "
            "unchanged, but the original system cuts their fractions off"
        )
    content, sha256 = _source(given.synapses, table)
    with databases.connect(given.mongo, given.credentials) as database:
        written = databases.write(database, content, table, sha256, given.overwrite)
        counts = databases.recorded(database, databases.GROUND_TRUTH)["rows"]
    shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    print(f"{_where()}: {shown}{'' if written else ', stored already'}")


def _check_not_itself(source: str) -> None:
    """Raises an error if --overwrite would replace a database by its own content.

    If such an import were killed half-way, no complete copy of the content would exist.
    """
    if not flags.FLAGS.overwrite or not source.startswith(address.SCHEMES):
        return
    names = [
        address.database_name(address.resolve(*uri))
        for uri in ((source,), (flags.FLAGS.mongo, flags.FLAGS.credentials))
    ]
    if names[0] == names[1]:
        raise UserError(
            f"--overwrite: --synapses and --mongo both name database {names[0]}; dump "
            "this database to a file first, and load the file"
        )


def _source(
    location: str, table: pa.Table
) -> tuple[Mapping[str, Iterable[documents.Document]], str]:
    """Returns the documents of each collection, and a checksum of the source.

    An export v3 consists of documents already, which are not changed.
    """
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
    flags.DEFINE_string(
        "output", None, "Write the synapse table into this Feather or Parquet file."
    )
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
    flags.DEFINE_string(
        "predictions", None, "Store the predictions of this Feather file."
    )
    flags.mark_flag_as_required("predictions")
    parts = ["all", *synapses.PARTS]
    flags.DEFINE_enum(
        "part", "all", parts, "Store only the rows of this part of --split."
    )


def load_predictions() -> None:
    given = flags.FLAGS
    name = _collection()
    if given.layout == BRAIN and given.part != "all":
        raise UserError(
            "--part: --layout=brain stores all rows and has no split; leave it out"
        )
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
    done = "is stored" if written else "is stored already"
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
    flags.DEFINE_list(
        "classes",
        None,
        "Give the class names in the order of the network's outputs. Predictions that "
        "`load_predictions` stored need no names.",
    )
    flags.DEFINE_string("output", None, "Write the predictions into this Feather file.")
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
