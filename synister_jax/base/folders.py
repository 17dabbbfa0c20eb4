# SPDX-License-Identifier: Apache-2.0
"""Folders of several files with a record that says what they were made of.

The record is there before the first of the files, so that after a kill, too, it is
known whose they are. A folder is complete where the record says `finished`.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from synister_jax.base import files
from synister_jax.base.errors import UserError


def claim(
    record: pathlib.Path,
    plan: dict[str, Any],
    names: Sequence[str],
    sources: Sequence[str | os.PathLike[str]],
) -> None:
    """Makes the folder of `record` ready for the files `names`, or refuses it.

    What is in it from earlier runs of the same plan is to be replaced, and what a
    killed one left half-written is removed. All else in the folder stays.

    Args:
      plan: what the files are made of.
      names: all that may be written, also working files.
      sources: files and folders that are read.

    Raises:
      UserError: one of `names` is a source, or is there and not from this plan.
    """
    folder = record.parent
    for source in sources:
        files.require_other(folder, source)  # a folder of Parquet files
        for name in (record.name, *names):
            files.require_other(folder / name, source)
    files.make_folder(folder)
    plan = json.loads(json.dumps(plan))  # as it is read back
    earlier: dict[str, Any] = {}
    if record.exists():
        earlier = files.read_json(record)
        if not isinstance(earlier, dict) or not {*plan, "files"} <= earlier.keys():
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
        files.keep_plan(record, plan)
    files.write_json(record, plan | {"files": list(names), "finished": False})
    for name in half:
        files.remove(folder / name)


def finish(
    record: pathlib.Path, content: dict[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Writes the record of a complete folder, and returns it.

    Args:
      content: the plan, and what else there is to say.
      names: of the files, as far as they were written.
    """
    there = [name for name in names if (record.parent / name).exists()]
    content = json.loads(json.dumps(content)) | {"files": there, "finished": True}
    files.write_json(record, content)
    return content
