# SPDX-License-Identifier: Apache-2.0
r"""Lists every presynaptic site of a service as a synapse table for `predict`.

    python tools/list_synapses.py --source=hemibrain --volume=URI \
        --output=synapses.feather

Only neuPrint can list all its synapses (hemibrain, malevnc). Many people share this
service, and it is not made for such long lists. If a table of all synapses is
published, use the published table instead (docs/sources.md).

The command sends one request at a time, and each answer is one page of the table. The
pages are kept in `<output>.pages` until the table is complete. If the command stops
before its end, run the same command again: it continues after the last page, and the
table has the same bytes.
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
    "source",
    None,
    list(sources.SOURCES),
    "List the presynaptic sites of this service.",
    required=True,
)
_VOLUME = flags.DEFINE_string(
    "volume",
    None,
    "Convert the positions to the frame of this volume.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Write this Feather or Parquet file.", required=True
)
_CREDENTIALS = flags.DEFINE_string(
    "credentials",
    None,
    "Read from this ini file the settings that no environment variable gives.",
)
# The key in the metadata of a page that says where the next page starts.
_AFTER = b"after"


def main() -> None:
    output = pathlib.Path(_OUTPUT.value)
    synapses.check_writable(output)
    settings = sources.settings(_SOURCE.value, _CREDENTIALS.value)
    sources.listing(settings)  # raises at once if the service cannot be listed
    volume = volumes.open(_VOLUME.value)
    folder = output.with_name(output.name + ".pages")
    files.make_folder(folder)
    plan = {"source": settings.source, "volume_shape_zyx": list(volume.shape_zyx)}
    plan |= settings.shown()
    with files.locked(folder):
        if not _pages(folder):  # without pages, another plan may start here
            files.remove(folder / "plan.json")
        output_folders.require_same(folder / "plan.json", plan)
        pages = _fetch(folder, settings, volume)
        if not pages:
            raise UserError(
                f"{settings.source} lists no synapse; check these settings: {plan}"
            )
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
    """Writes the pages that are still missing, and returns the files of all pages."""
    pages = _pages(folder)
    after, rows = None, 0
    for path in pages:
        table = feather.read_table(path)
        after, rows = int(table.schema.metadata[_AFTER]), rows + len(table)
    progress = Progress("listed", None, "synapses", rows)
    if pages:
        print(f"continuing after {rows:,} synapses", flush=True)
    for sites, last in sources.listing(settings, after):
        coordinates = {axis: sites[axis].to_numpy() for axis in "xyz"}
        positions = sources.to_volume_nm_zyx(coordinates, volume.shape_zyx, settings)
        if not pages and (doubt := spaces.doubt(positions, volume)):
            raise UserError(
                f"{doubt}; check that --volume is the volume of {settings.source}"
            )
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
