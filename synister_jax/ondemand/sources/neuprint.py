# SPDX-License-Identifier: Apache-2.0
"""Hemibrain and male VNC: neuPrint's T-bars, asked with neuprint-python.

The client knows the server's addresses, payloads and errors; the questions are Cypher
of our own over neuPrint's data model: (:Segment)-[:Contains]->(:SynapseSet)
-[:Contains]->(:Synapse), of which `fetch_synapses` also asks. That function is not
used: it fetches every property of a synapse, regions and all, and lists nothing whole.
Coordinates are voxels of 8 nm; ids are made of them, as FlyEM counts.
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

_BATCH = 10  # bodies a request for neurons, as neuprint-python's own batches
# A page of a listing has bodies until their T-bars are this many.
_PAGE_SITES = 50_000
_PAGE_BODIES = 2_000


class _Client(http_session.OwnSession, neuprint.Client):
    """neuprint-python with our time-outs and retries."""

    def arrow_endpoint(self) -> bool:
        """Not used here; the client would ask about it before every question."""
        return False


def presynaptic_sites(
    neuron_ids: Sequence[int], settings: SourceSettings
) -> Iterator[Found]:
    """See `sources.presynaptic_sites`; sites come in the order of their ids."""
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
    """See `sources.listing`; `after` is the last body id of a page.

    Bodies come in the order of their ids, which the server has an index of: a page
    costs the same wherever it is, and is the same whatever was asked before it. A
    T-bar that is in no connection of its body is not among them.
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
        raise UserError(f"neuPrint needs a token: set {settings.where('token')}")
    session = http_session.Session("neuPrint", settings.where("token"), [token])
    try:
        return _Client(session, server, settings["dataset"], token, progress=False)
    except RuntimeError as error:  # no such data set, no https
        why = session.redacted(" ".join(str(error).split()))
        raise UserError(f"{why}: set {settings.where('dataset')}") from None
    except (ValueError, AttributeError):  # of the list of data sets
        raise session.broken(f"//{server}", "no list of data sets") from None


def _sites(client: _Client, bodies: Sequence[int]) -> pa.Table:
    """The T-bars of bodies, of `SITES`, in the order of bodies' ids and their own."""
    columns = _table(
        client,
        "MATCH (n:Segment)-[:Contains]->(:SynapseSet)-[:Contains]->(s:Synapse) "
        f"WHERE n.bodyId IN {list(bodies)} AND s.type = 'pre' "
        # A T-bar is in a set for each partner of its body.
        "WITH DISTINCT n, s "
        "RETURN n.bodyId, s.location.x, s.location.y, s.location.z",
        ["bodyId", "x", "y", "z"],
    )
    body, x, y, z = columns
    ids = ids_from_positions.neuprint(np.stack([z, y, x], axis=1))
    foreign = ~np.isin(body, np.asarray(bodies, np.int64))
    if (ids < 0).any() or foreign.any():
        raise client.session.broken(
            client.server, "T-bars of other bodies, or outside of any volume"
        )
    arrays = [ids, body, *(values.astype(np.float64) for values in (x, y, z))]
    order = np.lexsort((ids, body))
    return pa.table([array[order] for array in arrays], schema=SITES)


def _table(client: _Client, cypher: str, names: Sequence[str]) -> list[np.ndarray]:
    """Columns of integers, [n] int64 each, that a question has as its answer."""
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
    """[n] int64. Neo4j's points have floats as coordinates, which are whole."""
    if all(type(value) is int for value in values):
        return np.array(values, np.int64)
    if not all(type(value) in (int, float) for value in values):
        raise TypeError
    floats = np.array(values, np.float64)
    if not (np.abs(floats) < 1 << 53).all() or (floats != np.rint(floats)).any():
        raise ValueError
    return floats.astype(np.int64)
