# SPDX-License-Identifier: Apache-2.0
"""Folders of several files, with a record that says what they are made from.

The record is written before the first file. So after a kill it is still known what made
the files. Use `require_same` for a folder that a command fills over several starts. Use
`claim` and `finish` for a folder whose files each start makes again; such a folder is
complete if its record says `finished`.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from synister_jax.base import files
from synister_jax.base.errors import UserError


class OtherContents(UserError):
    """A folder was made from other things than the command names now."""


def require_same(record: pathlib.Path, made_from: dict[str, Any]) -> None:
    """Records what a folder is made from, or refuses a folder made from other things.

    Args:
      record: a JSON file in the folder. It may have more keys than `made_from`.
      made_from: what the files of the folder are made from.

    Raises:
      OtherContents: an entry differs; the message names the first one.
      UserError: the record is not a JSON object.
    """
    if not record.exists():
        files.write_json(record, made_from)
        return
    there = files.read_json(record)
    if not isinstance(there, dict):
        raise UserError(f"{record} was changed; remove it and run the command again")
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

    Files of earlier runs with the same `made_from` will be replaced. Temporary files of
    killed runs are removed. Everything else in the folder stays.

    Args:
      record: a JSON file in the folder.
      made_from: what the files are made from.
      names: all files that may be written, also temporary ones.
      sources: the files and folders that are read.

    Raises:
      UserError: one of `names` is a source, or exists and was made from other things.
    """
    folder = record.parent
    for source in sources:
        files.require_other(
            folder, source
        )  # the source may be a folder of Parquet files
        for name in (record.name, *names):
            files.require_other(folder / name, source)
    files.make_folder(folder)
    made_from = json.loads(
        json.dumps(made_from)
    )  # lists for tuples, as when it is read back
    earlier: dict[str, Any] = {}
    if record.exists():
        earlier = files.read_json(record)
        if not isinstance(earlier, dict) or not {*made_from, "files"} <= earlier.keys():
            raise UserError(
                f"{record} exists and another command wrote it; choose another --output"
            )
    known = dict.fromkeys([*names, *earlier.get("files", ())])
    half = [f"{name}.partial" for name in known]
    there = [name for name in (*known, *half) if os.path.lexists(folder / name)]
    if there and not earlier:
        raise UserError(
            f"{folder} has {there[0]} already, but no {record.name} which says that "
            "this command wrote it; choose another --output"
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
      content: `made_from`, and everything else that the record says.
      names: the files. Those that do not exist are left out of the record.
    """
    there = [name for name in names if (record.parent / name).exists()]
    content = json.loads(json.dumps(content)) | {"files": there, "finished": True}
    files.write_json(record, content)
    return content
