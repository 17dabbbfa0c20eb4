# SPDX-License-Identifier: Apache-2.0
"""Folders of several files, with a record that says what they are made from.

The record is there before the first of the files, so that after a kill, too, it is
known whose they are. `require_same` is for a folder that one command fills over several
starts, `claim` and `finish` for one whose files are made anew by each start; there the
folder is complete where the record says `finished`.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from synister_jax.base import files
from synister_jax.base.errors import UserError


class OtherContents(UserError):
    """A folder is made from something else than what is asked of it now."""


def require_same(record: pathlib.Path, made_from: dict[str, Any]) -> None:
    """Writes what a folder is made from, or refuses one that is made from other things.

    Args:
      record: a JSON file in the folder; what it says beyond `made_from` may differ.

    Raises:
      OtherContents: names the first entry that differs.
      UserError: the record is not what was written.
    """
    if not record.exists():
        files.write_json(record, made_from)
        return
    there = files.read_json(record)
    if not isinstance(there, dict):
        raise UserError(f"{record} is not what was written; remove it and rerun")
    for key, value in made_from.items():
        if there.get(key) != value:
            raise OtherContents(
                f"{record.parent} was made with other arguments: {key} was "
                f"{there.get(key)}, now {value}; choose another --output"
            )


def claim(
    record: pathlib.Path,
    made_from: dict[str, Any],
    names: Sequence[str],
    sources: Sequence[str | os.PathLike[str]],
) -> None:
    """Makes the folder of `record` ready for the files `names`, or refuses it.

    What is in it from earlier runs of the same `made_from` is to be replaced, and what
    a killed one left half-written is removed. All else in the folder stays.

    Args:
      made_from: what the files are made of.
      names: all that may be written, also working files.
      sources: files and folders that are read.

    Raises:
      UserError: one of `names` is a source, or is there and made from something else.
    """
    folder = record.parent
    for source in sources:
        files.require_other(folder, source)  # a folder of Parquet files
        for name in (record.name, *names):
            files.require_other(folder / name, source)
    files.make_folder(folder)
    made_from = json.loads(json.dumps(made_from))  # as it is read back
    earlier: dict[str, Any] = {}
    if record.exists():
        earlier = files.read_json(record)
        if not isinstance(earlier, dict) or not {*made_from, "files"} <= earlier.keys():
            raise UserError(
                f"{record} is there, and not from this command; choose another --output"
            )
    known = dict.fromkeys([*names, *earlier.get("files", ())])
    half = [f"{name}.partial" for name in known]
    there = [name for name in (*known, *half) if os.path.lexists(folder / name)]
    if there and not earlier:
        raise UserError(
            f"{folder} has a {there[0]}, and no {record.name} says that it may be "
            "replaced; choose another --output"
        )
    if there:
        require_same(record, made_from)
    files.write_json(record, made_from | {"files": list(names), "finished": False})
    for name in half:
        files.remove(folder / name)


def finish(
    record: pathlib.Path, content: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Writes the record of a complete folder, and returns it.

    Args:
      content: `made_from`, and what else there is to say.
      names: of the files, as far as they were written.
    """
    there = [name for name in names if (record.parent / name).exists()]
    content = json.loads(json.dumps(content)) | {"files": there, "finished": True}
    files.write_json(record, content)
    return content
