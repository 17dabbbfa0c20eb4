# SPDX-License-Identifier: Apache-2.0
"""The command `predict`, and the files that it writes into a folder."""

import pathlib
import sys


def run_command(
    trained_run: pathlib.Path,
    table: pathlib.Path,
    volume: pathlib.Path,
    out: pathlib.Path,
) -> list[str]:
    return [sys.executable, "-m", "synister_jax.predict"] + [
        f"--workdir={trained_run}",
        f"--synapses={table}",
        f"--volume={volume}",
        f"--output={out}",
        "--unit_rows=3",
        "--batch_size=4",
    ]


def output_files(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }
