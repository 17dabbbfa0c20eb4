# SPDX-License-Identifier: Apache-2.0
"""The models that the service offers: the file models.toml, and what a run says."""

import dataclasses
import pathlib
import re
import tomllib
from typing import Any

from synister_jax.base import files
from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import SOURCES

FILE = "models.toml"
_EXAMPLE = """\
[demo]
title = "Demonstration"
workdir = "../run"
volume = "../data/volume.n5/volumes/raw/s0"
sources = ["none"]
synapses = "../synapses.feather"
"""
_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_TYPES = {
    "title": str,
    "workdir": str,
    "volume": str,
    "step": str | int,
    "calibrated": bool,
    "sources": list,
    "synapses": str,
}


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A run, the volume that it looks at, and who may name synapses in that."""

    name: str
    title: str
    workdir: pathlib.Path
    volume: str
    step: str  # a number, or `best`: the latest where none was validated
    calibrated: bool
    sources: tuple[str, ...]
    synapses: str | None  # a table to look neurons up in, for the source `none`

    def finds_neurons(self, source: str) -> bool:
        """Whether neurons can be asked for, not positions alone."""
        return source != "none" or self.synapses is not None


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """What the page needs to know of a run's network."""

    classes: tuple[str, ...]
    crop_shape_zyx: tuple[int, ...]
    voxel_size_nm_zyx: tuple[float, ...]


def load(folder: pathlib.Path) -> dict[str, ServedModel]:
    """The models of a folder's models.toml, in its order.

    Raises:
      UserError: there is no such file, or something in it cannot be meant.
    """
    path = folder / FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; it names the models, for example\n{_EXAMPLE}"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: TOML's and Unicode's too
        raise UserError(f"cannot read {path}: {error}") from None
    if not content:
        raise UserError(f"{path} names no model; for example\n{_EXAMPLE}")
    return {name: _model(path, name, table) for name, table in content.items()}


def _model(path: pathlib.Path, name: str, table: Any) -> ServedModel:
    where = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: a name is made of a-z, 0-9, _ and -")
    if not isinstance(table, dict):
        raise UserError(f"{path}: {name} is no model; for example\n{_EXAMPLE}")
    for key, value in table.items():
        if key not in _TYPES:
            raise UserError(
                f"{where}: {key} is not known; there is {', '.join(_TYPES)}"
            )
        if not isinstance(value, _TYPES[key]) or (
            isinstance(value, bool) and _TYPES[key] is not bool
        ):
            raise UserError(f"{where}: {key} = {value!r} is of the wrong type")
    if "volume" not in table:
        raise UserError(f'{where}: volume is missing; add volume = "…"')
    workdir = path.parent / table.get("workdir", name)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"{where}: workdir {workdir} is not a run: it has no config.json"
        )
    step = str(table.get("step", "best"))
    if step != "best" and not step.isdecimal():
        raise UserError(f'{where}: step = {step!r}; give a number or "best"')
    sources = table.get("sources", ["none"])
    if not sources or len(set(map(str, sources))) < len(sources):
        raise UserError(f"{where}: sources names at least one source, each once")
    for source in sources:
        if source not in SOURCES:
            raise UserError(
                f"{where}: source {source!r} is not known; there is "
                f"{', '.join(SOURCES)}"
            )
    synapses = table.get("synapses")
    if synapses is not None and "none" not in sources:
        raise UserError(
            f'{where}: synapses is for the source "none" alone; add that to sources, '
            "or leave synapses out"
        )
    return ServedModel(
        name=name,
        title=table.get("title", name),
        workdir=workdir,
        volume=_place(path.parent, table["volume"]),
        step=step,
        calibrated=table.get("calibrated", False),
        sources=tuple(sources),
        synapses=None if synapses is None else _place(path.parent, synapses),
    )


def _place(folder: pathlib.Path, uri: str) -> str:
    """A path as seen from here; a URL or a spec as it is."""
    is_path = "://" not in uri and not uri.lstrip().startswith("{")
    return str(folder / uri) if is_path else uri


def network(model: ServedModel) -> NetworkFacts:
    """Of the run's configuration.

    Raises:
      UserError: it cannot be read.
    """
    path = model.workdir / "config.json"
    config = files.read_json(path)
    try:
        return NetworkFacts(
            tuple(config["classes"]),
            tuple(config["crop_shape_zyx"]),
            tuple(config["voxel_size_nm_zyx"]),
        )
    except (KeyError, TypeError):
        raise UserError(f"{path} is not the configuration of a run") from None
