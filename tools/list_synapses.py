# SPDX-License-Identifier: Apache-2.0
"""Every presynaptic site that a service has, as a synapse table for `predict`.

    python tools/list_synapses.py --source=hemibrain --volume=URI \
        --output=synapses.feather

Of the services only neuPrint can be listed (hemibrain, malevnc). It is shared and not
made for that: where a published table of all synapses exists, take that instead
(docs/sources.md). This asks page by page, one request at a time. Pages are kept in
`<output>.pages` until the table is whole: killed and started again with the same
command, it goes on, and the table has the same bytes.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from absl import flags
from pyarrow import feather

from synister_jax.base import command, files, output_folders, table_metadata
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.em import spaces, volumes
from synister_jax.ondemand import sources
from synister_jax.ondemand.sources.credentials import SourceSettings
from synister_jax.tables import synapses

_SOURCE = flags.DEFINE_enum(
    "source", None, list(sources.SOURCES), "Who is asked.", required=True
)
_VOLUME = flags.DEFINE_string(
    "volume", None, "The volume in whose frame the positions shall be.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Feather or Parquet.", required=True)
_CREDENTIALS = flags.DEFINE_string(
    "credentials", None, "Ini file with what the environment does not say."
)
_AFTER = b"after"  # in a page's metadata: where the next one starts


def main() -> None:
    output = pathlib.Path(_OUTPUT.value)
    synapses.check_writable(output)
    settings = sources.settings(_SOURCE.value, _CREDENTIALS.value)
    sources.listing(settings)  # refuses at once who has none
    volume = volumes.open(_VOLUME.value)
    folder = output.with_name(output.name + ".pages")
    files.make_folder(folder)
    plan = {"source": settings.source, "volume_shape_zyx": list(volume.shape_zyx)}
    plan |= settings.shown()
    with files.locked(folder):
        if not _pages(folder):  # nothing is kept of a plan that did not work
            files.remove(folder / "plan.json")
        output_folders.require_same(folder / "plan.json", plan)
        pages = _fetch(folder, settings, volume)
        if not pages:
            raise UserError(f"{settings.source} lists no synapse; check {plan}")
        space = spaces.SPACES[sources.SOURCES[settings.source].space]
        about = plan | {"coordinates": spaces.describe(space, volume.shape_zyx)}
        rows = _join(pages, output, about)
        files.remove(folder)
    print(f"{output}: {rows:,} synapses")


def _pages(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("page-*.feather"))


def _fetch(
    folder: pathlib.Path, settings: SourceSettings, volume: volumes.Volume
) -> list[pathlib.Path]:
    """The pages' files, those that were not there yet written."""
    pages = _pages(folder)
    after, rows = None, 0
    for path in pages:
        table = feather.read_table(path)
        after, rows = int(table.schema.metadata[_AFTER]), rows + len(table)
    progress = Progress("listed", None, "synapses", rows)
    if pages:
        print(f"going on behind {rows:,} synapses", flush=True)
    for sites, last in sources.listing(settings, after):
        coordinates = {axis: sites[axis].to_numpy() for axis in "xyz"}
        positions = sources.to_volume_nm_zyx(coordinates, volume.shape_zyx, settings)
        if not pages and (doubt := spaces.doubt(positions, volume)):
            raise UserError(f"{doubt}; is --volume that of {settings.source}?")
        columns = {name: sites[name] for name in ("synapse_id", "neuron_id")}
        columns |= zip(synapses.POSITION, positions.T, strict=True)
        table = pa.table(columns).replace_schema_metadata({_AFTER: str(last)})
        pages.append(folder / f"page-{len(pages):06d}.feather")
        files.write_feather(pages[-1], table)
        progress.add(len(table))
    progress.close()
    return pages


def _join(
    pages: list[pathlib.Path], output: pathlib.Path, about: dict[str, Any]
) -> int:
    def conformed(page: pathlib.Path) -> pa.Table:
        table = table_metadata.described(feather.read_table(page), about)
        return synapses.conform(table, str(page))

    def batches() -> Iterator[pa.RecordBatch]:
        for page in pages:
            yield from conformed(page).to_batches()

    total = sum(len(feather.read_table(page, ["synapse_id"])) for page in pages)
    schema = conformed(pages[0]).schema
    return synapses.write_batches(output, schema, batches(), total)


if __name__ == "__main__":
    command.run(main)
