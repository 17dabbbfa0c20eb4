# SPDX-License-Identifier: Apache-2.0
"""Gets the presynaptic sites of neurons from a source, and moves them into a volume.

Each service has a module with the same two functions. `presynaptic_sites` gets the
sites of some neurons. `listing` gets every presynaptic site of the service.
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
    """A source of synapses, with the names that people use for it."""

    name: str
    title: str
    units: str  # the unit of x, y and z of its positions
    space: str  # a key of `spaces.SPACES`
    neuron: str  # the name that the service uses for the id of a neuron


@dataclasses.dataclass(frozen=True)
class Found:
    """The answer for one neuron. `sites` has the columns of `SITES`.

    A neuron that the service knows can have no sites.
    """

    neuron_id: int
    known: bool
    sites: pa.Table


# The coordinates are those of the source. If neurons share a site, all rows of the site
# have the same synapse_id.
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
    # The transform service moves positions from FlyWire's frame to CATMAID's frame.
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
# The shape of gs://neuroglancer-janelia-flyem-hemibrain/emdata, in voxels (z, y, x).
_PUBLIC_HEMIBRAIN = (41407, 39743, 34431)
_MODULES = {
    "fafb-catmaid": "catmaid",
    "fafb-flywire": "flywire",
    "hemibrain": "neuprint",
    "malevnc": "neuprint",
    "none": "synapse_table",
}


def find(name: str) -> Source:
    """Returns the source with a name.

    Raises:
      UserError: there is no such source. The message lists all sources.
    """
    if name not in SOURCES:
        raise UserError(
            f"there is no source {name!r}; give one of {', '.join(SOURCES)}"
        )
    return SOURCES[name]


def settings(
    source: str,
    ini: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    synapses: str | os.PathLike[str] | None = None,
) -> credentials.SourceSettings:
    """Returns the server, the credentials and further settings of a source.

    See credentials.py for the names of the settings.

    Args:
      source: the name of the source.
      ini: an ini file with settings that the environment does not have.
      environment: the environment variables.
      synapses: for the source `none`, the synapse table in which neurons are looked up.

    Raises:
      UserError: there is no such source, or the file cannot be read or is not an ini
        file.
    """
    return credentials.read(find(source).name, ini, environment, synapses)


def presynaptic_sites(
    neuron_ids: Sequence[int],
    settings: credentials.SourceSettings,
) -> Iterator[Found]:
    """Yields the presynaptic sites of each neuron, in the order of `neuron_ids`.

    Args:
      neuron_ids: the ids, each of them once.
      settings: the settings of the source.

    Raises:
      UserError: the service cannot be reached, refuses the credentials, or gives an
        answer that cannot be used. The message says what to do.
    """
    services = settings.source != "none"
    # In FlyWire and neuPrint, id 0 is the background. In CATMAID, no skeleton has id 0.
    real = [neuron for neuron in neuron_ids if neuron or not services]
    answers = _module(settings.source).presynaptic_sites(real, settings)
    for neuron in neuron_ids:
        is_asked = neuron or not services
        yield next(answers) if is_asked else Found(0, False, SITES.empty_table())


def listing(
    settings: credentials.SourceSettings, after: int | None = None
) -> Iterator[tuple[pa.Table, int | None]]:
    """Yields every presynaptic site of the source, page by page.

    Args:
      settings: the settings of the source.
      after: the second value of the last page that the caller has. None starts with the
        first page.

    Yields:
      A table with the columns of `SITES`, and the value of `after` with which a later
      call continues behind this page.

    Raises:
      UserError: the service does not offer a listing, or one of the errors of
        `presynaptic_sites`.
    """
    return _module(settings.source).listing(settings, after)


def to_volume_nm_zyx(
    coordinates: Mapping[str, np.ndarray],
    volume_shape_zyx: Sequence[int] | None,
    settings: credentials.SourceSettings,
) -> np.ndarray:
    """Returns positions in nm in the volume frame, [n, 3] float64 as (z, y, x).

    A position with a NaN coordinate stays NaN.

    Args:
      coordinates: `x`, `y` and `z`, each [n] float64, in the unit of the source.
      volume_shape_zyx: the shape of the volume in voxels. It is needed if an axis is
        flipped (hemibrain).
      settings: the settings of the source.

    Raises:
      UserError: the shape is needed but not given, the volume does not fit the source,
        or FlyWire's transform service does not answer.
    """
    source = settings.source
    if source == "fafb-flywire":
        coordinates = _module(source).to_fafb(coordinates, settings)
    space = spaces.SPACES[find(source).space]
    if source == "hemibrain" and tuple(volume_shape_zyx or ()) == _PUBLIC_HEMIBRAIN:
        raise UserError(
            "source hemibrain: this source converts positions to the axes of the N5 "
            "export, but the volume is hemibrain's public volume, which has the axes "
            "of neuPrint; give positions in nm (8 · x, y, z) with --source=none"
        )
    return spaces.to_volume(space, coordinates, volume_shape_zyx)


def _module(source: str) -> ModuleType:
    """Returns the module that asks the source. Only this imports the client library."""
    name = _MODULES[find(source).name]
    try:
        return importlib.import_module(f"synister_jax.ondemand.sources.{name}")
    except ImportError as error:
        raise UserError(
            f"source {source}: the package {error.name} is not installed; run "
            "pip install 'synister_jax[sources]'"
        ) from None
