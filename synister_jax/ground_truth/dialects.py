# SPDX-License-Identifier: Apache-2.0
"""Describes the table columns of each published source of ground truth.

The columns and rules come from funkelab/synister_data (consolidate.py, ingest.py). For
BANC, they come from htem/synister_banc (01_split_data.py, 02_train.py).
"""

import dataclasses
from collections.abc import Mapping

from synister_jax.base.errors import UserError
from synister_jax.tables import synapses


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The columns of a source, and the rules for reading them.

    An empty column name means that the source has no such column.
    """

    space: str  # the frame of the coordinates, a key of `spaces.SPACES`
    synapse_id: str
    # In each row, the first known value of these columns is used. The file must have at
    # least one of the columns, unless all of them are in `may_lack`.
    neuron_id: tuple[str, ...]
    # The first alternative whose columns the file has is used. Within this alternative,
    # the first known value of each row is used. If there are no alternatives, the
    # transmitter is the name of the file up to its first dot.
    neurotransmitter: tuple[tuple[str, ...], ...] = ()
    hemilineage: str = ""
    brain_region: str = ""
    cell_type: str = ""
    xyz: tuple[str, str, str] = ("x", "y", "z")
    # A row without a synapse id gets the Cantor number of its voxel as the id. This is
    # the size of the voxel.
    voxel_size_nm_zyx: tuple[float, ...] | None = None
    neuprint_ids: bool = False  # FlyEM's id, computed from the voxel
    # If the file has this column, labels count only in rows where it is "true".
    verified: str = ""
    smallest_size: int = 0  # of a synapse in the column `size`; 0 keeps all synapses
    may_lack: tuple[str, ...] = ()  # columns that a file can be without
    neuron_needed: bool = True  # refuse rows without a neuron id
    splits: bool = False  # copy the columns split_<name>


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
    # These files are written by consolidate.py. Their positions are already in the
    # volume frame.
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
    """Returns the dialect of a table with positions in the volume frame, in nm.

    Reading the table fails if a mapped column is missing, or if the column of the
    synapse id or a coordinate is missing. All other columns are optional.

    Args:
      mapping: from the column names of a synapse table, and x, y and z, to the column
        names of the file.

    Raises:
      UserError: a key of `mapping` is not a column of a synapse table.
    """
    names = [n for n in synapses.SCHEMA.names if n not in synapses.POSITION]
    own = {name: mapping.get(name, name) for name in [*names, "x", "y", "z"]}
    if unknown := mapping.keys() - own.keys():
        raise UserError(
            f"--columns: {', '.join(sorted(unknown))} is not a column of the synapse "
            f"table; use one of {', '.join(own)}"
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
