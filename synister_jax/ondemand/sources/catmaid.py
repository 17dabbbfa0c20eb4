# SPDX-License-Identifier: Apache-2.0
"""FAFB's CATMAID: skeletons and the connectors that they are presynaptic to.

Plain requests: pymaid would bring 30 packages for two of them. Both are documented in
CATMAID's source (django/applications/catmaid/control), which its servers show at
/apis/: `{project}/skeletons/validity` in skeleton.py, `{project}/connectors/links/` in
connector.py. A token goes into `X-Authorization`, so that HTTP's own password fits into
`Authorization`. Coordinates are nm as CATMAID has them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import SITES, Found, http_session
from synister_jax.ondemand.sources.credentials import SourceSettings

_BATCH = 50  # skeletons a request


def presynaptic_sites(
    neuron_ids: Sequence[int], settings: SourceSettings
) -> Iterator[Found]:
    """See `sources.presynaptic_sites`. A connector is one site of a skeleton.

    Connectors come in the order of their ids.
    """
    with _session(settings) as session:
        for first in range(0, len(neuron_ids), _BATCH):
            batch = [int(neuron) for neuron in neuron_ids[first : first + _BATCH]]
            known = _known(session, settings, batch)
            sites = _sites(session, settings, [n for n in batch if n in known])
            owner = sites["neuron_id"].to_numpy()
            for neuron in batch:
                own = sites.filter(pa.array(owner == neuron))
                yield Found(neuron, neuron in known, own)


def listing(
    settings: SourceSettings, after: int | None
) -> Iterator[tuple[pa.Table, int | None]]:
    """Not offered: CATMAID would answer with all connectors at once."""
    raise UserError(
        f"source {settings.source} cannot list a whole volume: CATMAID gives all "
        "connectors at once or none; ask for neurons, or use a published table with "
        "--source=none --synapses=TABLE"
    )


def _session(settings: SourceSettings) -> http_session.Session:
    token, password = settings["token"], settings["password"]
    session = http_session.Session(
        "CATMAID", settings.where("token"), [token, password]
    )
    if token:
        session.headers["X-Authorization"] = f"Token {token}"
    if settings["user"]:
        # requests would write text as Latin-1; its types know of text alone.
        session.auth = (settings["user"].encode(), password.encode())  # type: ignore[assignment]
    return session


def _ask(
    session: http_session.Session,
    settings: SourceSettings,
    path: str,
    ids: list[int],
    **form: str,
) -> tuple[str, Any]:
    """(address, answer) of a request about skeletons."""
    url = f"{settings['url'].rstrip('/')}/{settings['project']}/{path}"
    fields = {f"skeleton_ids[{i}]": str(neuron) for i, neuron in enumerate(ids)}
    answer = session.json("POST", url, data=fields | form)
    # CATMAID tells of errors in an answer like any other (catmaid/middleware.py).
    if isinstance(answer, dict) and "error" in answer:
        why = " ".join(str(answer["error"]).split())
        why = session.redacted(why)[: http_session.DETAIL]
        more = ""
        if "ermission" in f"{answer.get('type')}{why}":
            more = f": set {settings.where('token')}"
        raise session.problem(url, f"reports an error: {why}{more}")
    return url, answer


def _known(
    session: http_session.Session, settings: SourceSettings, ids: list[int]
) -> set[int]:
    """Those that are skeletons of the project; the answer is a list of their ids."""
    url, answer = _ask(session, settings, "skeletons/validity", ids)
    if not isinstance(answer, list) or not all(type(n) is int for n in answer):
        raise session.broken(url, "no list of skeleton ids")
    return set(answer) & set(ids)


def _sites(
    session: http_session.Session, settings: SourceSettings, ids: list[int]
) -> pa.Table:
    """Of `SITES`: the answer's `links` start with skeleton, connector, x, y and z."""
    if not ids:
        return SITES.empty_table()
    url, answer = _ask(
        session,
        settings,
        "connectors/links/",
        ids,
        relation_type="presynaptic_to",
        with_tags="false",
    )
    try:
        rows = [row[:5] for row in answer["links"]]
        if not all(type(row[0]) is type(row[1]) is int for row in rows):
            raise TypeError
        columns = list(zip(*rows, strict=True)) or [()] * 5
        order = [columns[1], columns[0], *columns[2:]]
        arrays = [
            pa.array(values, field.type)
            for values, field in zip(order, SITES, strict=True)
        ]
    except (KeyError, TypeError, ValueError, OverflowError, pa.ArrowException):
        raise session.broken(url, "no connector links") from None
    # A skeleton may have several nodes at a connector.
    pairs = np.stack([arrays[1].to_numpy(), arrays[0].to_numpy()], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    return pa.table(arrays, schema=SITES).take(pa.array(first))
