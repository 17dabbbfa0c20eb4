# SPDX-License-Identifier: Apache-2.0
"""Tells whether the files beside this one are the published export v3.

    python data/fafb_v3/check.py

A file that differs gets a warning, for it may be usable still; exit code 1 if one is
missing.
"""

import pathlib
import sys

from synister_jax.base import command
from synister_jax.base.errors import UserError
from synister_jax.tables.mongo import json_export


def main() -> None:
    folder = pathlib.Path(__file__).parent
    different = json_export.unpublished(folder)
    for name in json_export.PUBLISHED:
        print(f"{name}: {different.get(name, 'as published')}")
    if "differs" in different.values():
        print("warning: not all files are the published ones", file=sys.stderr)
    if missing := [name for name, how in different.items() if how == "missing"]:
        raise UserError(f"no {', '.join(missing)} in {folder}; its README.md helps")


if __name__ == "__main__":
    command.run(main)
