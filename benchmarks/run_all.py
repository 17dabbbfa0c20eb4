# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks one after the other; writes results.json, RESULTS.md, pictures.

    make bench
    python benchmarks/run_all.py --folder=FOLDER [--only=train,predict] [--quick]

Which scripts, and with what arguments, is in catalogue.py. Each is a process of its
own, whose progress is in FOLDER/NAME.log. What it printed is in results.json as soon as
it is done, under the backend that JAX has here, with the machine and the revision that
it ran on: kill this at any moment, and run what is missing with `--only`. Those that
were not run keep what they had.
`--quick` takes sizes of seconds to see that all scripts work; what it measures says
nothing, and goes to FOLDER instead of here.
"""

import contextlib
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import results_page
import roofline
from absl import flags
from catalogue import BENCHMARKS, Benchmark

from synister_jax.base import command, files
from synister_jax.base.errors import UserError

_FOLDER = flags.DEFINE_string("folder", None, "Where it all is made.", required=True)
_ONLY = flags.DEFINE_list("only", [], "Names; default: all.")
_QUICK = flags.DEFINE_bool("quick", False, "Small sizes, to see that all works.")
_TEXTURE = flags.DEFINE_string(
    "texture", None, "Volume of real EM, for the benchmarks that read; else noise."
)
_TEXTURE_NAME = flags.DEFINE_string(
    "texture_name", "a volume of the user's", "What the results call it."
)

_HERE = pathlib.Path(__file__).parent


def main() -> None:
    folder = files.make_folder(_FOLDER.value).resolve()
    output = folder if _QUICK.value else _HERE
    names = [benchmark.name for benchmark in BENCHMARKS]
    if unknown := set(_ONLY.value) - set(names):
        raise UserError(
            f"--only={','.join(_ONLY.value)}: there is no {', '.join(sorted(unknown))};"
            f" there are {', '.join(names)}"
        )
    path = output / "results.json"
    machine = _machine()
    backend = machine["backend"]
    results = files.read_json(path) if path.exists() else {}
    results.setdefault(backend, {"benchmarks": {}})
    failed = []
    for benchmark in BENCHMARKS:
        if _ONLY.value and benchmark.name not in _ONLY.value:
            continue
        ran_on = {"machine": machine, "revision": _revision()}
        entry = _run(benchmark, backend, folder, output) | ran_on
        results[backend]["benchmarks"][benchmark.name] = entry
        files.write_json(path, results)
        if entry["error"].startswith("failed"):
            failed.append(benchmark.name)
            print(f"{benchmark.name}: {entry['error']}", flush=True)
        _write_page(results, output)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see {folder}/NAME.log")


def _write_page(results: dict[str, Any], output: pathlib.Path) -> None:
    for backend, entries in results.items():
        reports = entries["benchmarks"].get("layers", {}).get("reports")
        if reports:
            picture = roofline.draw(reports[0], roofline.whole_network(entries))
            name = results_page.picture_of(roofline.FILE, backend)
            files.write_bytes(output / name, picture)
    sections = {
        benchmark.name: (benchmark.section, _shown(benchmark, results))
        for benchmark in BENCHMARKS
    }
    files.write_text(output / "RESULTS.md", results_page.page(results, sections))


def _shown(benchmark: Benchmark, results: dict[str, Any]) -> str:
    """How to rerun it."""
    read = {
        report.get("texture", "noise")
        for entries in results.values()
        for report in entries["benchmarks"].get(benchmark.name, {}).get("reports", [])
    }
    arguments = ["--folder=FOLDER"] * benchmark.has_folder
    arguments += ["--texture=URI"] * bool(read - {"noise"})
    arguments += [a.replace("{picture}", "FILE.png") for a in benchmark.full]
    return " ".join(["python", f"benchmarks/{benchmark.script}", *arguments])


def _run(
    benchmark: Benchmark, backend: str, folder: pathlib.Path, output: pathlib.Path
) -> dict[str, Any]:
    """{reports, error, quick, date, seconds}; an error is "" or a line."""
    entry = {"reports": [], "error": "", "quick": _QUICK.value}
    entry["date"] = datetime.date.today().isoformat()
    if benchmark.needs and not pathlib.Path(benchmark.needs).exists():
        return entry | {
            "error": f"not run: there is no {benchmark.needs}",
            "seconds": 0,
        }
    given = benchmark.quick if _QUICK.value else benchmark.full
    picture = output / results_page.picture_of(benchmark.section.picture, backend)
    arguments = [argument.replace("{picture}", str(picture)) for argument in given]
    if benchmark.has_folder:
        arguments.append(f"--folder={folder / benchmark.name}")
    if benchmark.reads_texture and _TEXTURE.value:
        arguments.append(f"--texture={_TEXTURE.value}")
    script = str(_HERE / benchmark.script)
    log = folder / f"{benchmark.name}.log"
    print(f"{benchmark.name}: {' '.join([script, *arguments])}", flush=True)
    start = time.monotonic()
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, script, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    entry["seconds"] = round(time.monotonic() - start, 1)
    for line in done.stdout.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            report = json.loads(_without_paths(line, folder))
            if isinstance(report, dict):
                entry["reports"].append(report)
    if done.returncode or not entry["reports"]:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        said = _without_paths(last, folder)
        entry["error"] = f"failed with exit code {done.returncode}: {said}"[:400]
    return entry


def _without_paths(text: str, folder: pathlib.Path) -> str:
    """The text without paths of this machine: results are for others too."""
    if _TEXTURE.value:
        text = text.replace(_TEXTURE.value, _TEXTURE_NAME.value)
    text = text.replace(str(folder), "FOLDER")
    text = text.replace(f"{_HERE.parent.resolve()}{os.sep}", "")
    return re.sub(r"/(tmp|home|root|Users)/[^\s\"']*", "PATH", text)


def _revision() -> str | None:
    """Of what is measured and what measures, + where files differ; None outside git."""
    # What this script writes itself is no difference.
    written = [f":!benchmarks/{name}" for name in ("results.json", "*.md", "*.png")]
    paths = ["synister_jax", "configs", "benchmarks", *written]
    try:
        revision = _git("rev-parse", "--short", "HEAD").strip()
        differs = bool(_git("status", "--porcelain", "--", *paths))
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + "+" * differs


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_HERE.parent,
        text=True,
        check=True,
    ).stdout


def _machine() -> dict[str, Any]:
    """This machine, its backend and versions; JAX starts in a process of its own."""
    code = (
        "import json, side_by_side; print(json.dumps(side_by_side.about("
        "'synister_jax', 'jax', 'jaxlib', 'flax', 'grain', 'array_record',"
        "'tensorstore', 'duckdb', 'pyarrow', 'numpy', 'torch', 'gunpowder')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, cwd=_HERE
    )
    about = json.loads(done.stdout.splitlines()[-1])
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model[1] if model else about["machine"],
        "memory_gb": round(pages * page_bytes / 1e9, 1),
        **about,
    }


if __name__ == "__main__":
    command.run(main)
