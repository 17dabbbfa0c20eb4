# SPDX-License-Identifier: Apache-2.0
"""Gets the T-bars of hemibrain and male VNC from neuPrint with neuprint-python.

The client knows the addresses, payloads and errors of the server. The queries of this
module are written in Cypher for neuPrint's data model: (:Segment)-[:Contains]->
(:SynapseSet)-[:Contains]->(:Synapse). The function `fetch_synapses` of the client uses
the same model. It is not used here, because it fetches every property of a synapse,
including its regions, and cannot list a whole volume.

Coordinates are in voxels of 8 nm. The ids are computed from the coordinates, in the
same way as FlyEM does.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import neuprint
import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import SITES, Found, http_session
from synister_jax.ondemand.sources.credentials import SourceSettings
from synister_jax.tables import ids_from_positions

_BATCH = 10  # bodies for each request, as in neuprint-python
# A page of a listing has at most this many T-bars, but at least one body.
_PAGE_SITES = 50_000
_PAGE_BODIES = 2_000


class _Client(http_session.OwnSession, neuprint.Client):
    """The client of neuprint-python with our time-outs and retries."""

    def arrow_endpoint(self) -> bool:
        """Returns False; otherwise the client asks the server before every query."""
        return False


def presynaptic_sites(
    neuron_ids: Sequence[int], settings: SourceSettings
) -> Iterator[Found]:
    """Implements `sources.presynaptic_sites`. Sites have the order of their ids."""
    client = _client(settings)
    for first in range(0, len(neuron_ids), _BATCH):
        batch = [int(neuron) for neuron in neuron_ids[first : first + _BATCH]]
        known = _table(
            client,
            f"MATCH (n:Segment) WHERE n.bodyId IN {batch} RETURN n.bodyId",
            ["bodyId"],
        )
        sites = _sites(client, batch)
        owner = sites["neuron_id"].to_numpy()
        for neuron in batch:
            own = sites.filter(pa.array(owner == neuron))
            yield Found(neuron, bool((known[0] == neuron).any()), own)


def listing(
    settings: SourceSettings, after: int | None
) -> Iterator[tuple[pa.Table, int | None]]:
    """Implements `sources.listing`. `after` is the last body id of a page.

    Bodies have the order of their ids, for which the server has an index. Every page
    therefore takes the same time, and does not depend on earlier requests. T-bars that
    are in no connection of their body are not listed.
    """
    client = _client(settings)
    last = -1 if after is None else after
    while True:
        bodies, counts = _table(
            client,
            f"MATCH (n:Segment) WHERE n.bodyId > {last} AND n.pre > 0 "
            f"RETURN n.bodyId, n.pre ORDER BY n.bodyId LIMIT {_PAGE_BODIES}",
            ["bodyId", "pre"],
        )
        if not len(bodies):
            return
        if (np.diff(bodies, prepend=last) <= 0).any():
            raise client.session.broken(client.server, "bodies that are not in order")
        size = np.searchsorted(np.cumsum(counts), _PAGE_SITES, side="right")
        bodies = bodies[: max(1, size)]
        last = int(bodies[-1])
        yield _sites(client, bodies.tolist()), last


def _client(settings: SourceSettings) -> _Client:
    token, server = settings["token"], settings["server"]
    if not token:
        raise UserError(f"neuPrint needs a token; set {settings.where('token')}")
    session = http_session.Session("neuPrint", settings.where("token"), [token])
    try:
        return _Client(session, server, settings["dataset"], token, progress=False)
    except RuntimeError as error:  # unknown data set, or not https
        why = session.redacted(" ".join(str(error).split()))
        raise UserError(f"neuPrint: {why}; set {settings.where('dataset')}") from None
    except (ValueError, AttributeError):  # the list of data sets cannot be read
        raise session.broken(f"//{server}", "no list of data sets") from None


def _sites(client: _Client, bodies: Sequence[int]) -> pa.Table:
    """Returns the T-bars of bodies with the columns of `SITES`.

    The rows are sorted by body id, then by synapse id.
    """
    columns = _table(
        client,
        "MATCH (n:Segment)-[:Contains]->(:SynapseSet)-[:Contains]->(s:Synapse) "
        f"WHERE n.bodyId IN {list(bodies)} AND s.type = 'pre' "
        # A T-bar is in one set for each partner of its body. DISTINCT keeps it once.
        "WITH DISTINCT n, s "
        "RETURN n.bodyId, s.location.x, s.location.y, s.location.z",
        ["bodyId", "x", "y", "z"],
    )
    body, x, y, z = columns
    ids = ids_from_positions.neuprint(np.stack([z, y, x], axis=1))
    foreign = ~np.isin(body, np.asarray(bodies, np.int64))
    if (ids < 0).any() or foreign.any():
        raise client.session.broken(
            client.server, "T-bars of other bodies, or T-bars outside of any volume"
        )
    arrays = [ids, body, *(values.astype(np.float64) for values in (x, y, z))]
    order = np.lexsort((ids, body))
    return pa.table([array[order] for array in arrays], schema=SITES)


def _table(client: _Client, cypher: str, names: Sequence[str]) -> list[np.ndarray]:
    """Returns the columns of the answer to a query, each [n] int64."""
    try:
        answer = client.fetch_custom(cypher, format="json")
        return [_integers(values) for values in _columns(answer["data"], len(names))]
    except (ValueError, TypeError, KeyError, OverflowError):
        what = f"no table of {', '.join(names)}"
        raise client.session.broken(client.server, what) from None


def _columns(rows: list[list[Any]], count: int) -> list[tuple[Any, ...]]:
    if any(len(row) != count for row in rows):
        raise ValueError
    return list(zip(*rows, strict=True)) or [()] * count


def _integers(values: tuple[Any, ...]) -> np.ndarray:
    """Returns values as [n] int64. Neo4j gives coordinates as whole floats."""
    if all(type(value) is int for value in values):
        return np.array(values, np.int64)
    if not all(type(value) in (int, float) for value in values):
        raise TypeError
    floats = np.array(values, np.float64)
    if not (np.abs(floats) < 1 << 53).all() or (floats != np.rint(floats)).any():
        raise ValueError
    return floats.astype(np.int64)
