# SPDX-License-Identifier: Apache-2.0
"""Who is asked for the presynaptic sites of a neuron, and how places reach a volume.

Each service has a module with the same two functions: `presynaptic_sites` and
`listing`, which is every presynaptic site that the service has.
"""

import dataclasses
import importlib
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.em import spaces
from synister_jax.ondemand.sources import credentials


@dataclasses.dataclass(frozen=True)
class Source:
    """Where synapses come from, as people name it."""

    name: str
    title: str
    units: str  # of the x, y, z of its positions
    space: str  # of `spaces.SPACES`
    neuron: str  # what the service calls the id of a neuron


@dataclasses.dataclass(frozen=True)
class Found:
    """The answer for one neuron; `sites` is of `SITES`.

    A neuron that the service knows may have no site.
    """

    neuron_id: int
    known: bool
    sites: pa.Table


# Coordinates are the source's own. Neurons may share a site, with one synapse_id.
SITES = pa.schema(
    [
        ("synapse_id", pa.int64()),
        ("neuron_id", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("z", pa.float64()),
    ]
)

_ALL = (
    Source("fafb-catmaid", "FAFB, CATMAID", "nm", "fafb-catmaid", "skeleton id"),
    # The transform service leads from FlyWire's nm to CATMAID's.
    Source("fafb-flywire", "FAFB, FlyWire", "nm", "fafb-catmaid", "root id"),
    Source(
        "hemibrain",
        "Hemibrain, neuPrint",
        "voxels of 8 nm",
        "hemibrain-neuprint",
        "body id",
    ),
    Source(
        "malevnc", "Male VNC, neuPrint", "voxels of 8 nm", "malevnc-neuprint", "body id"
    ),
    Source("none", "The volume itself", "nm", "volume", "neuron id"),
)
SOURCES: Mapping[str, Source] = types.MappingProxyType(
    {source.name: source for source in _ALL}
)
# gs://neuroglancer-janelia-flyem-hemibrain/emdata, in voxels (z, y, x).
_PUBLIC_HEMIBRAIN = (41407, 39743, 34431)
_MODULES = {
    "fafb-catmaid": "catmaid",
    "fafb-flywire": "flywire",
    "hemibrain": "neuprint",
    "malevnc": "neuprint",
    "none": "synapse_table",
}


def find(name: str) -> Source:
    """The source of that name; `UserError` with those that there are."""
    if name not in SOURCES:
        raise UserError(f"no source {name!r}; it is one of {', '.join(SOURCES)}")
    return SOURCES[name]


def settings(
    source: str,
    ini: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    synapses: str | os.PathLike[str] | None = None,
) -> credentials.SourceSettings:
    """Server, credentials and the like of a source; see credentials.py.

    Args:
      ini: a file that says what the environment does not.
      synapses: for `none`, the synapse table in which neurons are looked up.

    Raises:
      UserError: no such source; the file is absent or not an ini.
    """
    return credentials.read(find(source).name, ini, environment, synapses)


def presynaptic_sites(
    neuron_ids: Sequence[int],
    settings: credentials.SourceSettings,
) -> Iterator[Found]:
    """The presynaptic sites of each neuron, in the order asked.

    Args:
      neuron_ids: each once.

    Raises:
      UserError: the service cannot be reached, refuses the credentials, or answers
        with what is not an answer; what to do about it.
    """
    services = settings.source != "none"
    # A segment that is background, in FlyWire and in neuPrint; no skeleton has the id.
    real = [neuron for neuron in neuron_ids if neuron or not services]
    answers = _module(settings.source).presynaptic_sites(real, settings)
    for neuron in neuron_ids:
        is_asked = neuron or not services
        yield next(answers) if is_asked else Found(0, False, SITES.empty_table())


def listing(
    settings: credentials.SourceSettings, after: int | None = None
) -> Iterator[tuple[pa.Table, int | None]]:
    """Every presynaptic site of the source, page by page: (of `SITES`, where it is).

    Args:
      after: what came with the last page that is already there; None starts.

    Yields:
      A page and what to give as `after` to go on behind it.

    Raises:
      UserError: the service does not offer it, and where such a table is published; or
        as `presynaptic_sites`.
    """
    return _module(settings.source).listing(settings, after)


def to_volume_nm_zyx(
    coordinates: Mapping[str, np.ndarray],
    volume_shape_zyx: Sequence[int] | None,
    settings: credentials.SourceSettings,
) -> np.ndarray:
    """Positions in nm in the volume's frame, [n, 3] float64; NaN rows stay NaN.

    Args:
      coordinates: `x`, `y`, `z`, [n] float64 each, in the source's units.
      volume_shape_zyx: in voxels; needed where an axis is flipped (hemibrain).

    Raises:
      UserError: the shape is needed; FlyWire's transform service does not answer.
    """
    source = settings.source
    if source == "fafb-flywire":
        coordinates = _module(source).to_fafb(coordinates, settings)
    space = spaces.SPACES[find(source).space]
    if source == "hemibrain" and tuple(volume_shape_zyx or ()) == _PUBLIC_HEMIBRAIN:
        raise UserError(
            "this is hemibrain's public volume, with neuPrint's own axes; source "
            "hemibrain is for the N5 export, whose axes are turned: give positions of "
            "8 · x, y, z nm with --source=none"
        )
    return spaces.to_volume(space, coordinates, volume_shape_zyx)


def _module(source: str) -> ModuleType:
    """The module that asks it; its client is imported only here."""
    name = _MODULES[find(source).name]
    try:
        return importlib.import_module(f"synister_jax.ondemand.sources.{name}")
    except ImportError as error:
        raise UserError(
            f"source {source} needs the package {error.name}: "
            "pip install 'synister_jax[sources]'"
        ) from None
