# SPDX-License-Identifier: Apache-2.0
r"""Makes a demonstration data set: a volume with painted synapses, and its tables.

    python tools/make_demo.py --output=demo

The command writes `demo/volume.n5` (data set `volumes/raw/s0`), the three JSON files of
an export v3 and `demo/demo.json`. The differences between the classes are invented (see
`demo_synapses`). The data show that the pipeline works, and say nothing about real
neurotransmitters. The same flags give the same bytes. If the command stops before its
end, it leaves only the folder `demo.partial`; run the same command again.
"""

import pathlib
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import demo_synapses
import numpy as np
from absl import flags

from synister_jax.base import command, files
from synister_jax.base.errors import UserError
from synister_jax.base.progress import Progress
from synister_jax.em import volumes

_OUTPUT = flags.DEFINE_string("output", None, "Write this folder.", required=True)
_BACKGROUND = flags.DEFINE_string(
    "background",
    None,
    "Paint the synapses into this volume. By default they are painted into synthetic "
    "tissue. A volume smaller than --shape_zyx is continued by its mirror image. Its "
    "voxels are used as voxels of 40x4x4 nm (z, y, x), whatever their real size is.",
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Draw all random numbers from this seed.", lower_bound=0
)
_NEURONS = flags.DEFINE_integer("neurons", 120, "Make this many neurons.")
_SYNAPSES = flags.DEFINE_integer("synapses", 1800, "Make this many synapses.")
_SHAPE = flags.DEFINE_list(
    "shape_zyx", ["48", "1536", "1536"], "Make a volume of this many voxels (z, y, x)."
)

_FORMAT_VERSION = 2
# The neurons and the hemilineages per class in the default data set. Their numbers
# differ between classes, like in the real data (397 acetylcholine, 165 GABA, 5
# octopamine), but every class has enough neurons to be learnt.
_NEURON_WEIGHTS = dict(zip(demo_synapses.CLASSES, (24, 40, 15, 9, 9, 14), strict=True))
_HEMILINEAGES = dict(zip(demo_synapses.CLASSES, (4, 6, 3, 2, 2, 3), strict=True))
_UNKNOWN_SHARE = 8 / 120  # neurons that have no transmitter in the tables
# One neuron releases both. Its synapses are painted as the first.
_CO_RELEASED = ("gaba", "octopamine")
# Enough for six neurons per class, so that each of the three parts gets two, and for
# the neurons without a known transmitter.
_MIN_NEURONS = 40
_BRAIN_REGIONS = ("AL", "MB", "LH", "EB", "PB", "LAL", "SMP", "AVLP")
# This fraction of the synapses is so near the border that a part of their crops is
# outside the volume. All other synapses have at least the margin from the border.
_BORDER_SHARE = 0.02
_MARGIN_VX_ZYX = np.array([4, 32, 32])
# Two synapses are at least this far apart along at least one axis.
_SEPARATION_VX_ZYX = np.array([6, 56, 56])
_HEMILINEAGE_TABLE, _NEURON_TABLE, _PLACES, _OWNERS, _REGIONS, _IDS = range(
    10, 16
)  # streams


@dataclass(frozen=True)
class Neuron:
    """A neuron whose synapses are all painted as the class `class_name`.

    The tables say that the neuron releases `known`, or nothing if `known` is None.
    """

    id: int
    class_name: str
    known: tuple[str, ...] | None
    hemilineage_id: int
    synapse_count: int


def main() -> None:
    output = pathlib.Path(_OUTPUT.value)
    parameters = _parameters()
    if _is_there(output, parameters):
        print(f"{output} exists already, made with the same parameters")
        return
    background = _read_background(parameters)
    hemilineages = _draw_hemilineages(_SEED.value)
    neurons = _draw_neurons(parameters, hemilineages)
    places_vx_zyx = _draw_places(parameters)
    # The synapses of every neuron are distributed over the whole volume.
    owners = np.repeat(np.arange(len(neurons)), [n.synapse_count for n in neurons])
    owners = demo_synapses.generator(_SEED.value, _OWNERS).permutation(owners).tolist()
    # The folder gets its final name at the end, so that the output is never incomplete.
    partial = files.make_folder(output.parent) / f"{output.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    synapses = [
        demo_synapses.draw_synapse(_SEED.value, index, neurons[owner].class_name, place)
        for index, (owner, place) in enumerate(zip(owners, places_vx_zyx, strict=True))
    ]
    _write_volume(partial / "volume.n5", parameters, synapses, background)
    _write_tables(partial, parameters, hemilineages, neurons, owners, places_vx_zyx)
    partial.rename(output)  # this also replaces an empty folder
    print(f"{output}: {len(synapses):,} synapses of {len(neurons)} neurons")


def _parameters() -> dict[str, Any]:
    """Returns the values of the flags, after it has checked them."""
    try:
        z, y, x = shape_zyx = [int(size) for size in _SHAPE.value]
    except ValueError:
        raise UserError("--shape_zyx needs three integers, like 48,1536,1536") from None
    if z < 12 or min(y, x) < 192:
        raise UserError("--shape_zyx is too small; use at least 12,192,192")
    if _NEURONS.value < _MIN_NEURONS:
        raise UserError(f"--neurons is too small; use at least {_MIN_NEURONS}")
    if _SYNAPSES.value < 2 * _NEURONS.value:
        raise UserError(f"--synapses is too small; use at least {2 * _NEURONS.value}")
    return {
        "seed": _SEED.value,
        "neurons": _NEURONS.value,
        "synapses": _SYNAPSES.value,
        "shape_zyx": shape_zyx,
        "background": _BACKGROUND.value,
        "ambiguous_fraction": demo_synapses.AMBIGUOUS_FRACTION,
        "jitter": demo_synapses.JITTER,
    }


def _is_there(output: pathlib.Path, parameters: dict[str, Any]) -> bool:
    """Returns whether this data set exists; raises if something else is there."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "demo.json").is_file():
        raise UserError(f"{output} exists and is not empty; choose another --output")
    made = files.read_json(output / "demo.json")
    same = {"format_version": _FORMAT_VERSION, "parameters": parameters}
    if isinstance(made, dict) and same.items() <= made.items():
        return True
    raise UserError(
        f"{output} was made with other parameters; remove this folder first"
    )


def _read_background(parameters: dict[str, Any]) -> np.ndarray | None:
    """Reads the background, uint8, and extends it to the shape by mirror images."""
    if parameters["background"] is None:
        return None
    volume = volumes.open(parameters["background"])
    sizes = f"{volume.voxel_size_nm_zyx} nm are used as {demo_synapses.VOXEL_NM_ZYX} nm"
    print(f"background {volume.uri}: voxels (z, y, x) of {sizes}", flush=True)
    stop_vx_zyx = np.minimum(volume.shape_zyx, parameters["shape_zyx"])
    tile = volume.read((0, 0, 0), stop_vx_zyx)
    lacking = parameters["shape_zyx"] - stop_vx_zyx
    return np.pad(tile, [(0, count) for count in lacking], mode="symmetric")


def _draw_hemilineages(seed: int) -> dict[int, str]:
    """Returns the one transmitter that each hemilineage releases, by its id."""
    rng = demo_synapses.generator(seed, _HEMILINEAGE_TABLE)
    class_names = np.repeat(list(_HEMILINEAGES), list(_HEMILINEAGES.values()))
    ids = _draw_ids(rng, 1_000, 90, class_names.size)
    return dict(zip(ids, rng.permutation(class_names).tolist(), strict=True))


def _draw_neurons(
    parameters: dict[str, Any], hemilineages: dict[int, str]
) -> list[Neuron]:
    rng = demo_synapses.generator(parameters["seed"], _NEURON_TABLE)
    total = parameters["neurons"]
    unknown = round(_UNKNOWN_SHARE * total)
    weights = np.array([_NEURON_WEIGHTS[name] for name in demo_synapses.CLASSES], float)
    floor = np.full(weights.size, min(9, (total - unknown - 1) // weights.size))
    rest = total - unknown - 1 - floor.sum()
    counts = floor + _apportion(rest, np.maximum(weights - floor, 0))
    drawn: list[tuple[str, tuple[str, ...] | None]] = [
        (name, (name,)) for name in np.repeat(demo_synapses.CLASSES, counts).tolist()
    ]
    drawn += [
        (name, None) for name in rng.choice(demo_synapses.CLASSES, unknown).tolist()
    ]
    drawn += [(_CO_RELEASED[0], _CO_RELEASED)]
    size = np.clip(rng.lognormal(0, 0.5, total), 0.4, 2.7)
    synapse_counts = 2 + _apportion(parameters["synapses"] - 2 * total, size)
    ids = _draw_ids(rng, 1_000_000, 20_000, total)
    neurons = []
    for index, at in enumerate(rng.permutation(total)):
        class_name, known = drawn[at]
        homes = [id_ for id_, name in hemilineages.items() if name == class_name]
        home, count = homes[rng.integers(len(homes))], int(synapse_counts[index])
        neurons.append(Neuron(ids[index], class_name, known, home, count))
    return neurons


def _draw_ids(rng: np.random.Generator, start: int, step: int, count: int) -> list[int]:
    return (start + np.cumsum(rng.integers(1, step, count))).tolist()


def _apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Divides the total into integers in proportion to the weights.

    The largest remainders are rounded up, so that the sum is the total.
    """
    exact = total * weights / weights.sum()
    parts = np.floor(exact).astype(int)
    order = np.argsort(parts - exact, kind="stable")
    parts[order[: total - parts.sum()]] += 1
    return parts


def _draw_places(parameters: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Returns a random voxel (z, y, x) for each synapse."""
    rng = demo_synapses.generator(parameters["seed"], _PLACES)
    shape_zyx, count = np.array(parameters["shape_zyx"]), parameters["synapses"]
    placed = np.empty((count, 3), int)
    done = failures = 0  # synapses at the border are placed first
    while done < count and failures < 20_000:
        at = rng.integers(0, shape_zyx)
        inside = np.all((at >= _MARGIN_VX_ZYX) & (at < shape_zyx - _MARGIN_VX_ZYX))
        near = np.abs(placed[:done] - at) < _SEPARATION_VX_ZYX
        if inside == (done < _BORDER_SHARE * count) or near.all(axis=1).any():
            failures += 1
            continue
        placed[done] = at
        done, failures = done + 1, 0
    if done < count:
        raise UserError(
            f"{count:,} synapses do not fit into {tuple(parameters['shape_zyx'])} "
            f"voxels; use about {int(0.95 * done):,} or enlarge --shape_zyx"
        )
    return [tuple(at) for at in rng.permutation(placed).tolist()]


def _write_volume(
    path: pathlib.Path,
    parameters: dict[str, Any],
    synapses: Sequence[demo_synapses.Synapse],
    background: np.ndarray | None,
) -> None:
    shape_zyx = tuple(parameters["shape_zyx"])
    volume = np.empty(shape_zyx, np.uint8)
    progress = Progress("painting", shape_zyx[0], "sections")
    import demo_em  # imports SciPy, which takes a second

    sections = demo_em.paint(parameters["seed"], shape_zyx, synapses, background)
    for z, section in enumerate(sections):
        volume[z] = section
        progress.add()
    volumes.write_n5(path / "volumes/raw/s0", volume, demo_synapses.VOXEL_NM_ZYX)
    files.write_json(path / "attributes.json", {"n5": "2.0.0"})


def _write_tables(
    folder: pathlib.Path,
    parameters: dict[str, Any],
    hemilineages: dict[int, str],
    neurons: Sequence[Neuron],
    owners: Sequence[int],
    places_vx_zyx: Sequence[tuple[int, int, int]],
) -> None:
    rng = demo_synapses.generator(parameters["seed"], _REGIONS)
    centre = rng.uniform(0, parameters["shape_zyx"][1:], (len(_BRAIN_REGIONS), 2))
    rng = demo_synapses.generator(parameters["seed"], _IDS)
    ids = _draw_ids(rng, 3_000_000, 4_000, len(owners))
    synapse_table: dict[int, Any] = {}
    for id_, owner, place in zip(ids, owners, places_vx_zyx, strict=True):
        neuron_id = neurons[owner].id
        z, y, x = np.multiply(place, demo_synapses.VOXEL_NM_ZYX).tolist()
        region = _BRAIN_REGIONS[np.linalg.norm(centre - place[1:], axis=1).argmin()]
        synapse_table[id_] = {"skeleton_id": neuron_id, "x": x, "y": y, "z": z}
        synapse_table[id_]["brain_region"] = region
        synapse_table[id_]["splits"] = None
    hemilineage_table: dict[int, Any] = {}
    for i, (id_, class_name) in enumerate(hemilineages.items()):
        guess = [class_name] if i % 4 < 3 else None  # a quarter has no guess
        name = f"Demo{'ABCDEFGHIJ'[i // 2]}{i % 2 + 1}"
        hemilineage_table[id_] = {"nt_guess": guess, "hemi_lineage_name": name}
    neuron_table = {
        n.id: {"hemi_lineage_id": n.hemilineage_id, "nt_known": n.known}
        for n in neurons
    }
    summary = {
        "format_version": _FORMAT_VERSION,
        "parameters": parameters,
        "neurons_per_class": Counter(n.class_name for n in neurons),
        "synapses_per_class": Counter(neurons[owner].class_name for owner in owners),
        # The tables do not contain these classes. A reader can compare predictions with
        # them.
        "painted_as": {
            n.id: n.class_name for n in neurons if n.known != (n.class_name,)
        },
    }
    files.write_json(folder / "hemi_lineages_v3.json", hemilineage_table)
    files.write_json(folder / "skeletons_v3.json", neuron_table)
    files.write_json(folder / "synapses_v3.json", synapse_table)
    files.write_json(folder / "demo.json", summary)


if __name__ == "__main__":
    command.run(main)
