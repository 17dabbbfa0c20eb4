# SPDX-License-Identifier: Apache-2.0
"""Writes the text of RESULTS.md from results.json.

The page also says which numbers are missing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MISSING = "—"
_HEAD = f"""# Results of the benchmarks

`python -m benchmarks.run_all` (`make bench`) writes this page. All numbers are in
`results.json`.

How to read the tables:

- "Ours" is this project. A ratio divides the rate of ours by the rate of another
  program. A ratio above 1 means that ours is faster.
- The programs of a comparison run in turns, for several rounds. A rate is the median of
  the rounds. A ratio is the median of the ratios within each round. The numbers in
  parentheses are the smallest and the largest ratio of a round.
- In the columns "huge pages", all programs run with
  `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. They ask the kernel for memory pages of 2 MB.
- "Share of the peak" compares the arithmetic rate of a program with the highest rate of
  the device. On common GPUs this rate comes from the data sheet. On other devices it is
  measured with the product of two large matrices.
- "{_MISSING}" means that a number was not measured or is not known. "(missed)" means
  that a number does not reach its target.
- A "+" after a revision means that the measured files differed from this revision.

The benchmarks also run on a GPU. `--config.compute_dtype=bfloat16` measures in
bfloat16.

## Machines
"""

Results = Mapping[str, Mapping[str, Any]]  # by backend
Catalogue = Mapping[str, Mapping[str, Any]]  # benchmarks by name


def page(results: Results, catalogue: Catalogue) -> str:
    """Returns the page as Markdown text."""
    lines = [_HEAD]
    for backend, entries in results.items():
        run = entries["benchmarks"]
        for machine in dict.fromkeys(_machine(entry) for entry in run.values()):
            lines.append(f"- **{backend}**: {machine}")
        failed = ", ".join(name for name in run if run[name]["error"]) or "none"
        missing = ", ".join(name for name in catalogue if name not in run) or "none"
        lines.append(f"- Benchmarks not run on {backend}: {missing}. Failed: {failed}.")
    lines += ["", "## Targets", "", "The targets are for two CPU cores.", ""]
    lines += _targets(results, catalogue)
    for name, benchmark in catalogue.items():
        lines += _section(name, benchmark, results)
    return "\n".join(lines).rstrip() + "\n"


def _machine(entry: Mapping[str, Any]) -> str:
    """Returns the hardware and the package versions of a run in one line."""
    machine = entry["machine"]
    packages = [
        f"{name} {value}"
        for name, value in machine.items()
        if isinstance(value, str) and value[:1].isdigit()
    ]
    return (
        f"{machine['cpu']}, {machine['cpus']} cores, {machine['memory_gb']} GB; "
        f"{machine['devices']} × {machine['device']}; {', '.join(packages)}"
    )


def _columns(benchmark: Mapping[str, Any]) -> dict[str, str]:
    """Returns where the numbers are in a report, by the suffix of the column name."""
    places = benchmark.get("allocators", ("",))
    return dict(zip(("", ", huge pages"), places, strict=False))


def _targets(results: Results, catalogue: Catalogue) -> Iterator[str]:
    rows = []
    for name, benchmark in catalogue.items():
        for what, (keys, target) in benchmark.get("targets", {}).items():
            sign = "≥" if "ratio" in keys else "≤"
            for note, at in _columns(benchmark).items():
                row = [f"{benchmark['title']}: {what}{note}", f"{sign} {target}"]
                for entries in results.values():
                    entry = entries["benchmarks"].get(name, {"reports": [{}]})
                    row.append(_judged(entry, keys.format(at), target))
                rows.append(row)
    yield from _table(["measured", "target", *results], rows)


def _judged(entry: Mapping[str, Any], keys: str, target: float) -> str:
    value = _lookup(entry["reports"][0], keys) if entry["reports"] else None
    if value is None:
        return _MISSING
    is_met = value >= target if "ratio" in keys else value <= target
    note = " (small sizes)" if entry["quick"] else " (missed)" * (not is_met)
    return number(value) + note


def _section(
    name: str, benchmark: Mapping[str, Any], results: Results
) -> Iterator[str]:
    yield f"## {benchmark['title']}\n"
    arguments = ["--texture=URI"] * benchmark.get("texture", False)
    arguments = " ".join(["--folder=FOLDER", *arguments, *benchmark.get("full", [])])
    rerun = f"python -m benchmarks.{benchmark['module']} {arguments}"
    yield f"{benchmark['about']} Command: `{rerun}`\n"
    columns: dict[str, tuple[Mapping[str, Any], str]] = {}
    for backend, entries in results.items():
        entry = entries["benchmarks"].get(name)
        if entry is None:
            yield f"Not run on {backend}.\n"
            continue
        said = f"On {backend}: {entry['date']}, revision {entry['revision']}."
        said += f" {entry['error'].replace('|', '/')}" * bool(entry["error"])
        yield said + " Small sizes: no real measurement." * entry["quick"] + "\n"
        for report in entry["reports"]:
            for note, at in _columns(benchmark).items():
                columns[backend + note] = report, at
    if not columns:
        return
    rows: dict[str, list[str]] = {}
    for place, (report, at) in enumerate(columns.values()):
        for label, keys in benchmark["rows"].items():
            for more, shown in _expanded(report, keys.format(at)):
                row = rows.setdefault(label + more, [_MISSING] * len(columns))
                row[place] = shown
    yield from _table(["", *columns], [[label, *row] for label, row in rows.items()])
    for title, keys in benchmark.get("tables", {}).items():
        for column, (report, _) in columns.items():
            points = [dict(_flat(point)) for point in _lookup(report, keys) or []]
            yield f"{title}, {column}:" + f" {_MISSING}" * (not points) + "\n"
            if points:
                table = [[key.replace("_", " ") for key in points[0]]]
                table += [
                    [number(value) for value in point.values()] for point in points
                ]
                if len(table[0]) > 12:  # the table is too wide for the page
                    table = list(zip(*table, strict=True))
                yield from _table(table[0], table[1:])


def _lookup(report: Any, keys: str) -> Any:
    """Returns the value under keys joined by dots, or None if a key is absent."""
    for key in keys.split("."):
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _expanded(report: Mapping[str, Any], keys: str) -> Iterator[tuple[str, str]]:
    """Yields the text that is added to the label, and the number, of each row.

    A ratio also has the smallest and the largest ratio of a round in parentheses.
    """
    found = _lookup(report, keys)
    ranges = _lookup(report, keys.replace("ratio", "ratio_range")) or {}
    if not isinstance(found, Mapping):
        yield "", number(found)
        return
    for name, value in found.items():
        said = number(value)
        if "ratio" in keys:
            said += f" ({number(ranges[name][0])} to {number(ranges[name][1])})"
        yield f" {name.replace('_', ' ')}", said


def _flat(point: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in point.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        else:
            yield f"{before}{key}", value


def number(value: Any) -> str:
    """Returns a number as text with three digits, or with all digits before the point.

    A value that is no number becomes `str(value)`, and None becomes a dash.
    """
    if value is None:
        return _MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(['---'] * len(head))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
