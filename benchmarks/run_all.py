# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks, and writes results.json, RESULTS.md and the roofline picture.

    make bench
    python -m benchmarks.run_all --folder=bench --only=train,predict
    python -m benchmarks.run_all --folder=bench --quick
    python -m benchmarks.run_all --folder=bench --only=none

catalogue.py lists the programs and their arguments. Each program runs in a process of
its own and writes its progress into FOLDER/NAME.log. When a program ends, its report
goes to results.json, together with the machine and the revision. If this command stops
before its end, run the missing benchmarks with `--only`. Benchmarks that are not run
keep their results. `--only=none` only writes RESULTS.md and the picture again.

`--quick` runs every program for some seconds, to check that all work. Its results are
no measurement, and are written into FOLDER instead of this directory.
"""

import datetime
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

from absl import flags

from benchmarks import pictures, results_page
from benchmarks.catalogue import BENCHMARKS
from synister_jax.base import command, files
from synister_jax.base.errors import UserError

_FOLDER = flags.DEFINE_string(
    "folder",
    None,
    "Keep the volumes, tables and runs of the benchmarks in this folder.",
    required=True,
)
_ONLY = flags.DEFINE_list(
    "only",
    list(BENCHMARKS),
    "Run only these benchmarks, or `none`. The default is all.",
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Use small sizes, to check that all programs work."
)
_TEXTURE = flags.DEFINE_string(
    "texture",
    None,
    "Use this volume of real EM in the benchmarks that read voxels. The default is "
    "noise.",
)
_TEXTURE_NAME = flags.DEFINE_string(
    "texture_name",
    "a volume of the user's",
    "Write this name of the --texture volume into the results.",
)

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parent


def main() -> None:
    folder = files.make_folder(_FOLDER.value).resolve()
    output = folder if _QUICK.value else _HERE
    chosen = [] if _ONLY.value == ["none"] else _ONLY.value
    if unknown := sorted(set(chosen) - set(BENCHMARKS)):
        known = ", ".join(BENCHMARKS)
        raise UserError(f"--only: {', '.join(unknown)} is unknown; choose from {known}")
    path = output / "results.json"
    results = files.read_json(path) if path.exists() else {}
    failed = []
    for name in chosen:
        machine = json.loads(_output("-m", "benchmarks.side_by_side"))
        entry = {"machine": machine, "revision": _revision()} | _run(name, folder)
        entries = results.setdefault(machine["backend"], {"benchmarks": {}})
        entries["benchmarks"][name] = entry
        files.write_json(path, results)
        if entry["error"].startswith("failed"):
            failed.append(name)
            print(f"{name}: {entry['error']}", flush=True)
        _write_page(results, output)
    if not chosen:
        _write_page(results, output)
    if failed:
        raise UserError(f"{', '.join(failed)} failed; see {folder}/NAME.log")


def _write_page(results: dict[str, Any], output: pathlib.Path) -> None:
    page = results_page.page(results, BENCHMARKS)
    for backend, entries in results.items():
        measured = entries["benchmarks"].items()
        reports = {n: entry["reports"][0] for n, entry in measured if entry["reports"]}
        if "layers" in reports:
            file = "roofline.png" if backend == "cpu" else f"roofline_{backend}.png"
            files.write_bytes(output / file, pictures.roofline(reports))
            # The section of the layers is the last one.
            page += f"\n![Layers and the roofline, {backend}]({file})\n"
    files.write_text(output / "RESULTS.md", page)


def _run(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Runs a benchmark, and returns {reports, error, quick, date, seconds}.

    The error is one line, or "" if the benchmark did not fail.
    """
    benchmark = BENCHMARKS[name]
    entry = {"reports": [], "error": "", "quick": _QUICK.value, "seconds": 0}
    entry["date"] = datetime.date.today().isoformat()
    needed = benchmark.get("needs")
    if needed and not pathlib.Path(needed).exists():
        return entry | {"error": f"not run: there is no {needed}"}
    program = ["-m", f"benchmarks.{benchmark['module']}", f"--folder={folder / name}"]
    program += benchmark.get("quick" if _QUICK.value else "full", [])
    if benchmark.get("texture") and _TEXTURE.value:
        program.append(f"--texture={_TEXTURE.value}")
    print(f"{name}: {' '.join(program)}", flush=True)
    log = folder / f"{name}.log"
    start = time.monotonic()
    try:
        with log.open("w") as errors:
            said = _without_paths(_output(*program, stderr=errors), folder)
        entry["reports"] = [json.loads(line) for line in said.splitlines()[-1:]]
    except (subprocess.CalledProcessError, json.JSONDecodeError) as problem:
        *_, last = ["", *log.read_text(errors="replace").split("\n")[:-1]]
        said = f"failed: {type(problem).__name__}: {_without_paths(last, folder)}"
        entry["error"] = said[:400]
    entry["seconds"] = round(time.monotonic() - start, 1)
    return entry


def _output(*arguments: str, **options: Any) -> str:
    """Returns the output of a new Python process with these arguments.

    JAX runs only in such processes, and never in this one.
    """
    command_line = [sys.executable, *arguments]
    return subprocess.check_output(command_line, text=True, cwd=_ROOT, **options)


def _without_paths(text: str, folder: pathlib.Path) -> str:
    """Returns the text without paths of this machine, because results are published."""
    if _TEXTURE.value:
        text = text.replace(_TEXTURE.value, _TEXTURE_NAME.value)
    text = text.replace(str(folder), "FOLDER").replace(f"{_ROOT.resolve()}/", "")
    return re.sub(r"/(tmp|home|root|Users)/[^\s\"']*", "PATH", text)


def _revision() -> str | None:
    """Returns the git revision, or None outside git.

    A "+" at the end means that measured files differ from the revision.
    """
    # The files that this program writes do not count as a difference.
    written = [f":!benchmarks/{name}" for name in ("results.json", "*.md", "*.png")]
    paths = ["synister_jax", "configs", "benchmarks", "tests/helpers", *written]

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", *arguments], text=True, cwd=_ROOT, stderr=subprocess.DEVNULL
        )

    try:
        revision = git("rev-parse", "--short", "HEAD").strip()
        return revision + "+" * bool(git("status", "--porcelain", "--", *paths))
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    command.run(main)
