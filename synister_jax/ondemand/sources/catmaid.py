# SPDX-License-Identifier: Apache-2.0
"""Gets skeletons of FAFB and their presynaptic connectors from CATMAID.

The module sends two kinds of requests itself, because pymaid would install 30 packages
for them. `{project}/skeletons/validity` is documented in skeleton.py of CATMAID's
source (django/applications/catmaid/control), and `{project}/connectors/links/` in
connector.py. CATMAID servers show this documentation at /apis/.

The token is sent as `X-Authorization`, so that `Authorization` is free for the HTTP
user and password. Coordinates are in nm, as CATMAID has them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from synister_jax.base.errors import UserError
from synister_jax.ondemand.sources import SITES, Found, http_session
from synister_jax.ondemand.sources.credentials import SourceSettings

_BATCH = 50  # skeletons for each request


def presynaptic_sites(
    neuron_ids: Sequence[int], settings: SourceSettings
) -> Iterator[Found]:
    """Implements `sources.presynaptic_sites`. Each connector is one site.

    The connectors of a skeleton have the order of their ids.
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
    """Raises `UserError`, because CATMAID would send all connectors at once."""
    raise UserError(
        f"source {settings.source} cannot list a whole volume: CATMAID cannot send "
        "connectors in parts; ask for neurons, or use a published table with "
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
        # requests would encode text as Latin-1, so bytes are given. The type hints of
        # requests allow only text.
        session.auth = (settings["user"].encode(), password.encode())  # type: ignore[assignment]
    return session


def _ask(
    session: http_session.Session,
    settings: SourceSettings,
    path: str,
    ids: list[int],
    **form: str,
) -> tuple[str, Any]:
    """Returns the address and the answer of a request about skeletons."""
    url = f"{settings['url'].rstrip('/')}/{settings['project']}/{path}"
    fields = {f"skeleton_ids[{i}]": str(neuron) for i, neuron in enumerate(ids)}
    answer = session.json("POST", url, data=fields | form)
    # CATMAID reports errors in an answer with a normal status (catmaid/middleware.py).
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
    """Returns the ids that are skeletons of the project."""
    url, answer = _ask(session, settings, "skeletons/validity", ids)
    if not isinstance(answer, list) or not all(type(n) is int for n in answer):
        raise session.broken(url, "no list of skeleton ids")
    return set(answer) & set(ids)


def _sites(
    session: http_session.Session, settings: SourceSettings, ids: list[int]
) -> pa.Table:
    """Returns the connectors with the columns of `SITES`.

    Each of the `links` of an answer starts with skeleton, connector, x, y and z.
    """
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
    # A skeleton can have several nodes at a connector. Each pair is kept once.
    pairs = np.stack([arrays[1].to_numpy(), arrays[0].to_numpy()], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    return pa.table(arrays, schema=SITES).take(pa.array(first))
