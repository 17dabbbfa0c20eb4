# SPDX-License-Identifier: Apache-2.0
"""RESULTS.md from results.json: what is not there is said to be missing."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MISSING = "—"


@dataclasses.dataclass(frozen=True)
class Section:
    """Of one benchmark: what it shows, and where in its report.

    Attributes:
      numbers: (label, keys joined by dots).
      tables: (title, keys of a list of points).
      column: what distinguishes several reports of a run.
    """

    title: str
    shows: str
    numbers: tuple[tuple[str, str], ...]
    tables: tuple[tuple[str, str], ...] = ()
    column: str = ""
    picture: str = ""


@dataclasses.dataclass(frozen=True)
class _Target:
    what: str
    wanted: float
    name: str
    at: str
    at_huge: str = ""  # the same with huge pages
    is_seconds: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.wanted if self.is_seconds else value >= self.wanted


def _with_both(what: str, wanted: float, name: str, at: str) -> _Target:
    at_default, at_huge = (at.format(a) for a in ("default", "huge"))
    return _Target(what, wanted, name, at_default, at_huge)


_TO_GUNPOWDER = "ratio_to_gunpowder."
_TARGETS = (
    *(
        _Target(
            f"training input over gunpowder, {what}",
            wanted,
            "input",
            f"{_TO_GUNPOWDER}{side}",
            f"allocator_huge.{_TO_GUNPOWDER}{side}",
        )
        for what, wanted, side in (
            ("unaugmented records of shards to the device", 20, "ours_host"),
            ("with the augmentation computed here", 5, "ours_with_augmentation"),
        )
    ),
    *(
        _with_both(
            f"training step over PyTorch {what}",
            wanted,
            "train",
            f"allocators.{{}}.{side}.ratio.{side}",
        )
        for what, wanted, side in (
            ("as written", 2, "as_written"),
            ("tuned", 1, "tuned"),
        )
    ),
    *(
        _with_both(
            f"inference over PyTorch {what}",
            wanted,
            "predict",
            f"allocators.{{}}.ratio.{side}",
        )
        for what, wanted, side in (
            ("as written", 2.5, "as_written"),
            ("tuned", 1, "tuned"),
        )
    ),
    _with_both(
        "prediction end to end over the original's loop",
        2.5,
        "end_to_end",
        "allocators.{}.ratio.original",
    ),
    *(
        _Target(
            f"cold start to the first prediction, {what}",
            5,
            name,
            "seconds_to_first_prediction.cache",
            is_seconds=True,
        )
        for what, name in (("demonstration", "start"), ("full size", "start_full"))
    ),
)

Results = Mapping[str, Mapping[str, Any]]  # by backend
Sections = Mapping[str, tuple[Section, str]]  # by name; how to rerun it


def picture_of(file: str, backend: str) -> str:
    """The file's name for a backend."""
    return file if backend == "cpu" else file.replace(".", f"_{backend}.")


def page(results: Results, sections: Sections) -> str:
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `benchmarks/run_all.py` (`make bench`) from `results.json`, where "
        "all numbers are. Ratios above 1: ours is faster. Sides alternate in one run; "
        "medians, of ratios those of single rounds, in parentheses the smallest and "
        "the largest. Huge pages: all sides with "
        f"`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. {_MISSING}: not measured or known.",
        "",
        *_machines(results),
        *_targets(results),
    ]
    for name, (section, rerun) in sections.items():
        lines += _section(name, section, rerun, results)
    lines += _short(results, sections)
    lines += _gpu(results)
    return "\n".join(lines).rstrip() + "\n"


def _machines(results: Results) -> Iterator[str]:
    yield "## Machines"
    yield ""
    for backend, entries in results.items():
        for name, machine in _names(backend, entries).items():
            yield f"- **{machine}**: {name}"
    yield ""


def _names(backend: str, entries: Mapping[str, Any]) -> dict[str, str]:
    """What sections call a backend's machines: {what one is: name}."""
    found = [_machine(entry) for entry in entries["benchmarks"].values()]
    distinct = [machine for machine in dict.fromkeys(found) if machine != _MISSING]
    return {
        machine: backend if place == 1 else f"{backend} {place}"
        for place, machine in enumerate(distinct, start=1)
    }


def _machine(entry: Mapping[str, Any]) -> str:
    """Hardware and versions of one run."""
    machine = entry.get("machine")
    if machine is None:
        return _MISSING
    packages = [
        f"{name} {value}"
        for name, value in machine.items()
        if isinstance(value, str) and value[:1].isdigit() and name != "date"
    ]
    return (
        f"{machine['cpu']}, {machine['cpus']} cores, {machine['memory_gb']} GB; "
        f"{machine['devices']} × {machine['device']}; {', '.join(packages)}"
    )


def _targets(results: Results) -> Iterator[str]:
    yield "## Targets"
    yield ""
    yield "Targets are for two cores of a CPU."
    yield ""
    head = ["what", "target"]
    for backend in results:
        head += [backend, f"{backend}, huge pages"]
    rows = []
    for target in _TARGETS:
        sign = "≤" if target.is_seconds else "≥"
        unit = " s" if target.is_seconds else "×"
        row = [target.what, f"{sign} {number(target.wanted)}{unit}"]
        for entries in results.values():
            for at in (target.at, target.at_huge):
                row.append(_judged(at, target, unit, entries))
        rows.append(row)
    yield from _table(head, rows)


def _judged(at: str, target: _Target, unit: str, entries: Mapping[str, Any]) -> str:
    report = _first(entries, target.name)
    value = _lookup(report, at) if at else None
    if value is None:
        return _MISSING
    small = entries["benchmarks"][target.name]["quick"]
    mark = "" if target.is_met(value) else " (short)"
    said = f"{number(value)}{unit}{_range(report, at)}"
    return said + (" (small sizes)" if small else mark)


def _section(
    name: str, section: Section, rerun: str, results: Results
) -> Iterator[str]:
    yield f"## {section.title}"
    yield ""
    yield f"{section.shows} `{rerun}`"
    yield ""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for backend, entries in results.items():
        entry = entries["benchmarks"].get(name)
        if entry is None:
            yield f"Not run on {backend}."
            yield ""
            continue
        machine = _names(backend, entries).get(_machine(entry), _MISSING)
        date, revision = (entry.get(key) or _MISSING for key in ("date", "revision"))
        yield f"On {backend}: {date}, revision {revision}, machine {machine}."
        yield ""
        if entry["error"]:
            yield f"On {backend}: {entry['error'].replace('|', '/')}"
            yield ""
        if entry["quick"]:
            yield f"On {backend}: small sizes, no measurement."
            yield ""
        for report in entry["reports"]:
            which = _lookup(report, section.column) if section.column else None
            note = "" if which is None else f", {number(which)} {section.column}"
            columns.append((f"{backend}{note}", report))
    if not columns:
        return
    head = ["", *(title for title, _ in columns)]
    shown = [
        [label, *(f"{number(_lookup(r, at))}{_range(r, at)}" for _, r in columns)]
        for label, at in section.numbers
    ]
    yield from _table(head, shown)
    for title, at in section.tables:
        for column, report in columns:
            points = [dict(_flat(point)) for point in _lookup(report, at) or []]
            if points:
                yield f"{title}, {column}:"
                yield ""
                head = list(points[0])
                cells = [[number(p.get(key)) for key in head] for p in points]
                yield from _table([key.replace("_", " ") for key in head], cells)
    for backend, entries in results.items():
        if section.picture and _first(entries, name):
            file = picture_of(section.picture, backend)
            yield f"![{section.title}, {backend}]({file})"
            yield ""


def _short(results: Results, sections: Sections) -> Iterator[str]:
    yield "## What fell short"
    yield ""
    found = []
    for backend, entries in results.items():
        for target in _TARGETS:
            report = _first(entries, target.name)
            if _lookup(report, target.at) is None:
                found.append(f"{backend}, {target.what}: not measured")
                continue
            if entries["benchmarks"][target.name]["quick"]:
                found.append(f"{backend}, {target.what}: small sizes only")
                continue
            for at, of in ((target.at, ""), (target.at_huge, ", huge pages")):
                value = _lookup(report, at) if at else None
                if value is not None and not target.is_met(value):
                    said = f"{number(value)}, not {number(target.wanted)}"
                    found.append(f"{backend}, {target.what}{of}: {said}")
        for name in sections:
            entry = entries["benchmarks"].get(name)
            if entry is None:
                found.append(f"{backend}, {name}: not run")
            elif entry["error"]:
                found.append(f"{backend}, {name}: failed")
    yield from [f"- {line}" for line in found] or ["Nothing."]
    yield ""


def _gpu(results: Results) -> Iterator[str]:
    yield "## On a GPU"
    yield ""
    others = [backend for backend in results if backend != "cpu"]
    if not others:
        yield (
            "Not run: the same scripts run there unchanged, and with "
            "`--config.compute_dtype=bfloat16` the share of the peak is against the "
            "device's data sheet."
        )
    for backend in others:
        done = [
            name
            for name, entry in results[backend]["benchmarks"].items()
            if entry["reports"] and not entry["error"]
        ]
        yield f"Run on {backend}: {', '.join(done) or 'nothing'}."
    yield ""


def _first(entries: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The first report of a benchmark; empty where there is none."""
    reports = entries["benchmarks"].get(name, {}).get("reports", [])
    return reports[0] if reports else {}


def _lookup(report: Any, at: str) -> Any:
    """What is under keys joined by dots; None where one is not there."""
    for key in at.split("."):
        if not isinstance(report, Mapping):
            return None
        report = report.get(key)
    return report


def _range(report: Any, at: str) -> str:
    """Smallest and largest of what is a median of ratios; else nothing."""
    if "ratio" not in at:
        return ""
    ends = _lookup(report, at.replace("ratio", "ratio_range", 1))
    return f" ({number(ends[0])} to {number(ends[1])})" if ends else ""


def _flat(point: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in point.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        else:
            yield f"{before}{key}", value


def number(value: Any) -> str:
    """Three digits, or all before the point; other values as they are."""
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
