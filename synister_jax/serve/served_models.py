# SPDX-License-Identifier: Apache-2.0
"""Reads the models that the service offers, from models.toml and from their runs."""

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
    """A model of models.toml: a run, its volume, and the sources of its synapses."""

    name: str
    title: str
    workdir: pathlib.Path
    volume: str
    step: str  # a number, or `best`, which is the latest step without validation
    calibrated: bool
    sources: tuple[str, ...]
    synapses: str | None  # the table in which the source `none` looks up neurons

    def finds_neurons(self, source: str) -> bool:
        """Returns whether users can ask for neuron ids, not only for positions."""
        return source != "none" or self.synapses is not None


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """The facts about the network of a run that the page shows."""

    classes: tuple[str, ...]
    crop_shape_zyx: tuple[int, ...]
    voxel_size_nm_zyx: tuple[float, ...]


def load(folder: pathlib.Path) -> dict[str, ServedModel]:
    """Reads the models of the file models.toml in a folder, in the order of the file.

    Raises:
      UserError: The file does not exist or cannot be read, or a value is not valid.
    """
    path = folder / FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; write this file, for example\n{_EXAMPLE}"
        ) from None
    except (OSError, ValueError) as error:  # wrong TOML or Unicode is a ValueError
        raise UserError(f"cannot read {path}: {error}") from None
    if not content:
        raise UserError(f"{path} names no model; add a model, for example\n{_EXAMPLE}")
    return {name: _model(path, name, table) for name, table in content.items()}


def _model(path: pathlib.Path, name: str, table: Any) -> ServedModel:
    where = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: the name is not valid; use only a-z, 0-9, _ and -, at most "
            "64 characters"
        )
    if not isinstance(table, dict):
        raise UserError(
            f"{path}: {name} is not a table; write a table, for example\n{_EXAMPLE}"
        )
    for key, value in table.items():
        if key not in _TYPES:
            raise UserError(
                f"{where}: {key} is not known; the known keys are {', '.join(_TYPES)}"
            )
        if not isinstance(value, _TYPES[key]) or (
            isinstance(value, bool) and _TYPES[key] is not bool
        ):
            raise UserError(
                f"{where}: {key} = {value!r} has the wrong type; see docs/deploy.md"
            )
    if "volume" not in table:
        raise UserError(f'{where}: volume is missing; add volume = "…"')
    workdir = path.parent / table.get("workdir", name)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"{where}: workdir {workdir} is not the folder of a run, because it has no "
            "config.json; name the folder of a trained network"
        )
    step = str(table.get("step", "best"))
    if step != "best" and not step.isdecimal():
        raise UserError(
            f'{where}: step = {step!r} is not a step; give a number or "best"'
        )
    sources = table.get("sources", ["none"])
    if not sources or len(set(map(str, sources))) < len(sources):
        raise UserError(
            f"{where}: sources is empty or names a source twice; name at least one "
            "source, each once"
        )
    for source in sources:
        if source not in SOURCES:
            raise UserError(
                f"{where}: source {source!r} is not known; the known sources are "
                f"{', '.join(SOURCES)}"
            )
    synapses = table.get("synapses")
    if synapses is not None and "none" not in sources:
        raise UserError(
            f'{where}: only the source "none" uses synapses; add "none" to sources, or '
            "remove synapses"
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
    """Makes a path relative to a folder; leaves a URL or a spec as it is."""
    is_path = "://" not in uri and not uri.lstrip().startswith("{")
    return str(folder / uri) if is_path else uri


def network(model: ServedModel) -> NetworkFacts:
    """Reads the facts about the network of a model from the config.json of its run.

    Raises:
      UserError: config.json cannot be read or is not the configuration of a run.
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
        raise UserError(
            f"{path} is not the configuration of a run; name the folder of a trained "
            "network as workdir"
        ) from None
