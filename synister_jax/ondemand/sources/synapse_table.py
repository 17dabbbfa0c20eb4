# SPDX-License-Identifier: Apache-2.0
"""The source `none`: looks up neurons in a synapse table, and asks no service."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import SITES, Found
from synister_jax.ondemand.sources.credentials import SourceSettings
from synister_jax.tables import reading


def presynaptic_sites(
    neuron_ids: Sequence[int], settings: SourceSettings
) -> Iterator[Found]:
    """Implements `sources.presynaptic_sites`. The table is read once for all neurons.

    Every synapse of a neuron in the table is a presynaptic site of the neuron. A neuron
    without a synapse in the table is unknown. Missing coordinates are NaN.

    Raises:
      UserError: no table is given, the table cannot be read, or its neuron_id column is
        absent or empty.
    """
    if settings.synapses is None:
        raise UserError(
            "source none looks up neurons in a synapse table, but no table is given; "
            "give --synapses=TABLE"
        )
    asked = pa.array(neuron_ids, pa.int64())
    parts = [SITES.empty_table()]
    names_neurons = False
    for table in reading.open(settings.synapses).tables():
        names_neurons |= table["neuron_id"].null_count < len(table)
        table = table.filter(pc.is_in(table["neuron_id"], value_set=asked))
        columns = [table["synapse_id"], table["neuron_id"]]
        columns += [table[f"{axis}_nm"] for axis in "xyz"]
        parts.append(pa.table(columns, schema=SITES))
    if not names_neurons:
        raise UserError(
            f"{settings.synapses} names no neuron: its column neuron_id is absent or "
            "empty; give a table with this column"
        )
    found = pa.concat_tables(parts)
    place = pc.index_in(found["neuron_id"], value_set=asked).to_numpy()
    order = np.argsort(place, kind="stable")
    found = found.take(order)
    starts = np.searchsorted(place[order], np.arange(len(asked) + 1))
    for index, neuron_id in enumerate(neuron_ids):
        sites = found.slice(starts[index], starts[index + 1] - starts[index])
        yield Found(int(neuron_id), len(sites) > 0, sites)


def listing(
    settings: SourceSettings, after: int | None
) -> Iterator[tuple[pa.Table, int | None]]:
    """Raises `UserError`, because the synapse table is a listing already."""
    raise UserError(
        "source none cannot list a volume: its synapse table is a listing already; "
        "use this table"
    )
