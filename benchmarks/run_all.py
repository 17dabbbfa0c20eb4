# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks one after the other; writes results.json, RESULTS.md, a picture.

    make bench
    python -m benchmarks.run_all --folder=FOLDER [--only=train,predict] [--quick]
    python -m benchmarks.run_all --folder=FOLDER --only=none

Which programs, and with what arguments, is in catalogue.py. Each is a process of its
own, whose progress is in FOLDER/NAME.log. What it printed is in results.json as soon as
it is done, with the machine and the revision that it ran on: kill this at any moment,
and run what is missing with `--only`. Those that were not run keep what they had;
`--only=none` writes RESULTS.md anew. `--quick` takes sizes of seconds to see that all
programs work; what it measures says nothing, and goes to FOLDER instead of here.
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
    "folder", None, "Folder where the benchmarks keep what they make.", required=True
)
_ONLY = flags.DEFINE_list("only", list(BENCHMARKS), "Names of benchmarks, or none.")
_QUICK = flags.DEFINE_bool("quick", False, "Take small sizes, to see that all works.")
_TEXTURE = flags.DEFINE_string(
    "texture", None, "Volume of real EM for those that read; without it, noise."
)
_TEXTURE_NAME = flags.DEFINE_string(
    "texture_name", "a volume of the user's", "Name of that volume in the results."
)

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parent


def main() -> None:
    folder = files.make_folder(_FOLDER.value).resolve()
    output = folder if _QUICK.value else _HERE
    chosen = [] if _ONLY.value == ["none"] else _ONLY.value
    if unknown := sorted(set(chosen) - set(BENCHMARKS)):
        known = ", ".join(BENCHMARKS)
        raise UserError(f"--only: there is no {', '.join(unknown)}; there are {known}")
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
        raise UserError(f"failed: {', '.join(failed)}; see {folder}/NAME.log")


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
    """Returns {reports, error, quick, date, seconds}; an error is "" or a line."""
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
    """Returns what Python prints with these arguments; JAX never starts in here."""
    command_line = [sys.executable, *arguments]
    return subprocess.check_output(command_line, text=True, cwd=_ROOT, **options)


def _without_paths(text: str, folder: pathlib.Path) -> str:
    """Returns the text without paths of this machine: results are for others too."""
    if _TEXTURE.value:
        text = text.replace(_TEXTURE.value, _TEXTURE_NAME.value)
    text = text.replace(str(folder), "FOLDER").replace(f"{_ROOT.resolve()}/", "")
    return re.sub(r"/(tmp|home|root|Users)/[^\s\"']*", "PATH", text)


def _revision() -> str | None:
    """Returns the revision measured, + where files differ from it; None outside git."""
    # What this program writes itself is no difference.
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
