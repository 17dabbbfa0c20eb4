# SPDX-License-Identifier: Apache-2.0
"""How each published source of ground truth lays out its tables.

Columns and rules are those of funkelab/synister_data (consolidate.py, ingest.py) and,
for BANC, of htem/synister_banc (01_split_data.py, 02_train.py).
"""

import dataclasses
from collections.abc import Mapping

from synister_jax.base.errors import UserError
from synister_jax.tables import synapses


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Which columns a source has, and what is special about it."""

    space: str  # of `spaces.SPACES`
    synapse_id: str
    # The first known value of these, row by row; one of the columns must be there.
    neuron_id: tuple[str, ...]
    # The first alternative whose columns are all there; of these the first known value.
    # None at all: the transmitter is the file's name up to its first dot.
    neurotransmitter: tuple[tuple[str, ...], ...] = ()
    hemilineage: str = ""
    brain_region: str = ""
    cell_type: str = ""
    xyz: tuple[str, str, str] = ("x", "y", "z")
    # A row without an id gets the Cantor number of its voxel of this size.
    voxel_size_nm_zyx: tuple[float, ...] | None = None
    neuprint_ids: bool = False  # the id is made of the voxel's coordinates
    verified: str = ""  # where this column is there, it must say "true"
    smallest_size: int = 0  # of a synapse, in the column `size`
    may_lack: tuple[str, ...] = ()  # columns that a file need not have
    neuron_needed: bool = True
    splits: bool = False  # columns split_<name> are taken over


_KNOWN = ("known.classic.transmitter", "known.other.transmitter")
DIALECTS: Mapping[str, Dialect] = {
    "fafb": Dialect(
        "fafb-catmaid",
        "connector_id",
        ("skid", "flywire.id"),
        (_KNOWN, ("transmitter",), ("known.neurotransmitter",)),
        hemilineage="ItoLee.Hemilineage",
        brain_region="inside",
        voxel_size_nm_zyx=(40, 4, 4),
        verified="neurotransmitter.verified",
        may_lack=("ItoLee.Hemilineage", "inside"),
    ),
    "hemibrain": Dialect(
        "hemibrain-neuprint",
        "connector_id",
        ("bodyid",),
        (_KNOWN,),
        hemilineage="ItoLee.Hemilineage",
        brain_region="inside",
        voxel_size_nm_zyx=(8, 8, 8),
        may_lack=("ItoLee.Hemilineage", "inside"),
    ),
    "malevnc": Dialect("malevnc-neuprint", "syn_id", ("body",), neuprint_ids=True),
    # What consolidate.py writes: in the frame of the container already.
    "consolidated": Dialect(
        "volume",
        "connector_id",
        ("skid", "flywire_id", "body_id", "bodyid"),
        (("neurotransmitter",),),
        hemilineage="hemilineage",
        brain_region="region",
        may_lack=("hemilineage", "region"),
    ),
    "banc": Dialect(
        "banc",
        "id",
        ("body",),
        (("nt_name",),),
        cell_type="cell_type",
        smallest_size=5,
        may_lack=("cell_type",),
    ),
}


def of_table(mapping: Mapping[str, str]) -> Dialect:
    """Of a table in nm of its volume; `mapping`: our names (and x, y, z) to its own.

    What is mapped must be there; of the rest, only the id and the coordinates.

    Raises:
      UserError: a name on the left is not one of ours.
    """
    names = [n for n in synapses.SCHEMA.names if n not in synapses.POSITION]
    own = {name: mapping.get(name, name) for name in [*names, "x", "y", "z"]}
    if unknown := mapping.keys() - own.keys():
        raise UserError(
            f"--columns: {', '.join(sorted(unknown))} is not a column of the synapse "
            f"table; it has {', '.join(own)}"
        )
    return Dialect(
        "volume",
        own["synapse_id"],
        (own["neuron_id"],),
        ((own["neurotransmitter"],),),
        own["hemilineage"],
        own["brain_region"],
        own["cell_type"],
        (own["x"], own["y"], own["z"]),
        may_lack=tuple(set(names) - mapping.keys() - {"synapse_id"}),
        neuron_needed=False,
        splits=True,
    )
