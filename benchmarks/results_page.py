# SPDX-License-Identifier: Apache-2.0
"""Writes RESULTS.md from results.json; what is not there is said to be missing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MISSING = "—"
_HEAD = f"""# Results of the benchmarks

Written by `python -m benchmarks.run_all` (`make bench`) from `results.json`, where all
numbers are. Ratios above 1: ours is faster. Sides alternate in one run; medians, of
ratios those of single rounds, in parentheses the smallest and the largest. Huge pages:
all sides with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. {_MISSING}: not measured or
known. The same programs run on a GPU; with `--config.compute_dtype=bfloat16` the share
of the peak is against the device's data sheet.

## Machines
"""

Results = Mapping[str, Mapping[str, Any]]  # by backend
Catalogue = Mapping[str, Mapping[str, Any]]  # benchmarks by name


def page(results: Results, catalogue: Catalogue) -> str:
    """Returns the page."""
    lines = [_HEAD]
    for backend, entries in results.items():
        run = entries["benchmarks"]
        for machine in dict.fromkeys(_machine(entry) for entry in run.values()):
            lines.append(f"- **{backend}**: {machine}")
        failed = ", ".join(name for name in run if run[name]["error"]) or "none"
        missing = ", ".join(name for name in catalogue if name not in run) or "none"
        lines.append(f"- Not run on {backend}: {missing}. Failed: {failed}.")
    lines += ["", "## Targets", "", "Targets are for two cores of a CPU.", ""]
    lines += _targets(results, catalogue)
    for name, benchmark in catalogue.items():
        lines += _section(name, benchmark, results)
    return "\n".join(lines).rstrip() + "\n"


def _machine(entry: Mapping[str, Any]) -> str:
    """Describes the hardware and the versions of one run."""
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
    """Returns where a report has numbers, by what is added to a column's name."""
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
    yield from _table(["what", "target", *results], rows)


def _judged(entry: Mapping[str, Any], keys: str, target: float) -> str:
    value = _lookup(entry["reports"][0], keys) if entry["reports"] else None
    if value is None:
        return _MISSING
    is_met = value >= target if "ratio" in keys else value <= target
    note = " (small sizes)" if entry["quick"] else " (short)" * (not is_met)
    return number(value) + note


def _section(
    name: str, benchmark: Mapping[str, Any], results: Results
) -> Iterator[str]:
    yield f"## {benchmark['title']}\n"
    arguments = ["--texture=URI"] * benchmark.get("texture", False)
    arguments = " ".join(["--folder=FOLDER", *arguments, *benchmark.get("full", [])])
    rerun = f"python -m benchmarks.{benchmark['module']} {arguments}"
    yield f"{benchmark['about']} `{rerun}`\n"
    columns: dict[str, tuple[Mapping[str, Any], str]] = {}
    for backend, entries in results.items():
        entry = entries["benchmarks"].get(name)
        if entry is None:
            yield f"Not run on {backend}.\n"
            continue
        said = f"On {backend}: {entry['date']}, revision {entry['revision']}."
        said += f" {entry['error'].replace('|', '/')}" * bool(entry["error"])
        yield said + " Small sizes, no measurement." * entry["quick"] + "\n"
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
                if len(table[0]) > 12:  # too wide
                    table = list(zip(*table, strict=True))
                yield from _table(table[0], table[1:])


def _lookup(report: Any, keys: str) -> Any:
    """Returns what is under keys joined by dots; None where one is not there."""
    for key in keys.split("."):
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _expanded(report: Mapping[str, Any], keys: str) -> Iterator[tuple[str, str]]:
    """Yields the numbers there, and of ratios the smallest and the largest.

    Each comes with what is to be added to the label.
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
    """Shows three digits, or all before the point; other values as they are."""
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
