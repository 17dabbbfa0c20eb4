# SPDX-License-Identifier: Apache-2.0
"""What run_all.py runs, at full and at small sizes, and what is shown of it."""

import dataclasses

import roofline
from results_page import Section

_DEMO = "--config=configs/demo.py"
_DEMO_SHARDS = "demo/shards"
_FULL = "configs/skeleton.py"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script with its arguments, {picture} being the file that its section shows.

    Attributes:
      has_folder: takes --folder.
      reads_texture: takes --texture.
      needs: a file that something else makes.
    """

    name: str
    script: str
    full: tuple[str, ...]
    quick: tuple[str, ...]
    section: Section
    has_folder: bool = True
    reads_texture: bool = False
    needs: str = ""


_VOLUME_READ = ("volume read", "texture")


# By allocator, as results_page.page says what it is.
_OF = {"default": "", "huge": ", huge pages"}


def _allocators(sides: tuple[str, ...], unit: str) -> tuple[tuple[str, str], ...]:
    """Rates and ratios of sides that run together, with both allocators."""
    numbers = []
    for allocator, of in _OF.items():
        at = f"allocators.{allocator}"
        numbers += [(f"{s}, {unit}{of}", f"{at}.rates.{s}") for s in ("ours", *sides)]
        numbers += [(f"ours over {s}{of}", f"{at}.ratio.{s}") for s in sides]
    return tuple(numbers)


def _training() -> tuple[tuple[str, str], ...]:
    """Ours and one other in each pair."""
    numbers = []
    for allocator, of in _OF.items():
        for side in ("as_written", "tuned"):
            at = f"allocators.{allocator}.{side}"
            numbers += [
                (f"ours beside {side}, crops/s{of}", f"{at}.rates.ours"),
                (f"{side}, crops/s{of}", f"{at}.rates.{side}"),
                (f"ours over {side}{of}", f"{at}.ratio.{side}"),
            ]
        at = f"allocators.{allocator}.as_written.share_of_peak.ours"
        numbers.append((f"ours, share of the peak{of}", at))
    return tuple(numbers)


_INPUT_SIDES = {
    "ours_host": "ours, unaugmented records of shards",
    "ours_with_augmentation": "ours, augmented",
    "gunpowder": "gunpowder, augmented crops of the volume",
}
_INPUT_ALLOCATORS = (("", ""), ("allocator_huge.", ", huge pages"))

BENCHMARKS = (
    Benchmark(
        "input",
        "bench_input.py",
        (),
        (_DEMO, "--rounds=1", "--seconds=1"),
        Section(
            "Training input",
            "Examples a second, beside gunpowder with the published nodes, which give "
            "augmented crops from the volume. Our host side gives unaugmented records "
            "from shards that were cut beforehand, which is not timed; with the "
            "augmentation, the device makes of them the crops that a step trains with.",
            (
                _VOLUME_READ,
                *(
                    (f"{label}, examples/s{of}", f"{at}rates.{side}")
                    for at, of in _INPUT_ALLOCATORS
                    for side, label in _INPUT_SIDES.items()
                ),
                *(
                    (
                        f"{_INPUT_SIDES[side]} over gunpowder{of}",
                        f"{at}ratio_to_gunpowder.{side}",
                    )
                    for at, of in _INPUT_ALLOCATORS
                    for side in ("ours_host", "ours_with_augmentation")
                ),
            ),
        ),
        reads_texture=True,
    ),
    Benchmark(
        "train",
        "bench_train.py",
        (),
        (_DEMO, "--rounds=1"),
        Section(
            "Training step",
            "Forward, backward and Adam at full size, beside PyTorch.",
            _training(),
        ),
    ),
    Benchmark(
        "predict",
        "bench_predict.py",
        (),
        (_DEMO, "--rounds=1"),
        Section(
            "Inference",
            "The network alone at full size, beside PyTorch.",
            (
                *_allocators(("as_written", "inference_mode", "tuned"), "crops/s"),
                ("ours, share of the peak", "allocators.default.share_of_peak.ours"),
                ("peak, GFLOP/s", "allocators.default.peak_gflops"),
            ),
        ),
    ),
    Benchmark(
        "end_to_end",
        "bench_end_to_end.py",
        (),
        (_DEMO, "--rounds=1"),
        Section(
            "End to end",
            "From a volume and synapses to predictions, beside the original's loop.",
            _allocators(("original",), "synapses/s"),
        ),
    ),
    *(
        Benchmark(
            name,
            "bench_start.py",
            arguments,
            (_DEMO, "--rounds=1"),
            Section(
                title,
                "Seconds from the start of a prediction to its first answers, with "
                "JAX's compile cache for programs that take a second to compile, for "
                "all, and without; predict itself sets none. On a CPU a program that "
                "calls the convolutions' library is in no cache: the network is "
                "compiled at each start.",
                (
                    *(
                        (f"{what}, s, {cache}", f"{path}.{cache}")
                        for what, path in (
                            ("first prediction", "seconds_to_first_prediction"),
                            ("to the end", "seconds_to_exit"),
                        )
                        for cache in ("cache", "cache_of_all", "no_cache")
                    ),
                    ("programs in cache", "programs_in_cache.slow"),
                    ("programs in cache_of_all", "programs_in_cache.all"),
                ),
            ),
        )
        for name, title, arguments in (
            ("start", "Cold start, demonstration", ()),
            ("start_full", "Cold start, full size", (f"--config={_FULL}",)),
        )
    ),
    Benchmark(
        "bulk",
        "bench_bulk.py",
        (),
        (_DEMO, "--rounds=1"),
        Section(
            "Whole prediction and network alone",
            "What reading, waiting and writing cost a prediction.",
            (
                ("prediction, crops/s", "rates.predict"),
                ("network alone, crops/s", "rates.bare"),
                ("ratio", "ratio.bare"),
                ("device busy", "device_busy"),
            ),
        ),
    ),
    Benchmark(
        "read",
        "bench_read.py",
        (),
        ("--rounds=1", "--crops=500", "--sample=20"),
        Section(
            "Reading crops",
            "In chunk order through a cache, beside one read a synapse.",
            (
                _VOLUME_READ,
                ("chunk order, crops/s", "rates.chunk_order"),
                ("one by one, crops/s", "rates.loop"),
                ("ratio", "ratio.loop"),
                (
                    "decoded per byte needed, chunk order",
                    "decoded_over_needed.chunk_order",
                ),
                ("decoded per byte needed, one by one", "decoded_over_needed.loop"),
            ),
        ),
        reads_texture=True,
    ),
    Benchmark(
        "shard",
        "bench_shard.py",
        (),
        ("--rounds=1", "--crops=24", "--sample=6", "--batches=2"),
        Section(
            "Cutting shards, and Grain's threads",
            "Records cut in chunk order, beside one read a synapse; a consumer that "
            "only waits for batches.",
            (
                _VOLUME_READ,
                ("cut in chunk order, crops/s", "cut.rates.chunk_order"),
                ("one by one, crops/s", "cut.rates.loop"),
                ("ratio", "cut.ratio.loop"),
                ("decoded per byte needed", "cut.decoded_over_needed.chunk_order"),
                ("the same, one by one", "cut.decoded_over_needed.loop"),
                ("threads in data.py", "stream.in_data_py.threads"),
                ("waiting batches in data.py", "stream.in_data_py.buffer"),
            ),
            (("Examples a second of the stream", "stream.examples_per_second"),),
        ),
        reads_texture=True,
    ),
    Benchmark(
        "codec",
        "bench_codec.py",
        (),
        ("--rounds=1", "--records=16"),
        Section(
            "Codecs of records",
            "Bytes, and records written and read a second, by codec.",
            (
                _VOLUME_READ,
                *(
                    (
                        f"{kind.replace('_', ' ')}, {codec}, {label}",
                        f"{kind}.{codec}.{at}",
                    )
                    for kind in ("with_margin", "without_margin")
                    for codec in ("uncompressed", "zstd:1", "zstd:3")
                    for label, at in (
                        ("bytes", "bytes_per_record"),
                        ("written/s", "written_per_second"),
                        ("read/s, 1 thread", "read_per_second.1"),
                        ("read/s, 4 threads", "read_per_second.4"),
                    )
                ),
            ),
        ),
        reads_texture=True,
    ),
    Benchmark(
        "table",
        "bench_table.py",
        ("--rows=10000,1000000,10000000",),
        ("--rows=10000", "--split_synapses=50000", "--split_neurons=2000"),
        Section(
            "Tables of synapses",
            "Planning, merging, aggregating and splitting; no other side.",
            tuple(
                (f"{phase}, {unit}", f"{phase}.{at}")
                for phase in ("plan", "replan", "merge", "aggregate", "split")
                for unit, at in (("s", "seconds"), ("GB", "peak_gb"))
            ),
            column="rows",
        ),
    ),
    Benchmark(
        "augmentation",
        "augmentation_cost.py",
        (f"--config={_FULL}",),
        (_DEMO, "--repeats=1"),
        Section(
            "Augmentation",
            "Its share of a training step.",
            (
                ("step with it, s", "seconds.augmented"),
                ("step without, s", "seconds.plain"),
                ("augmentation alone, of the step", "augmentation_of_step"),
            ),
        ),
        has_folder=False,
    ),
    Benchmark(
        "accuracy",
        "accuracy_against_torch.py",
        (f"--shards={_DEMO_SHARDS}", "--config.num_train_steps=300"),
        (
            f"--shards={_DEMO_SHARDS}",
            "--seeds=0",
            "--config.num_train_steps=4",
            "--config.eval_every_steps=4",
        ),
        Section(
            "Accuracy",
            "Our trainer and a plain PyTorch loop on the same batches.",
            (
                ("ours", "ours.accuracy.mean"),
                ("ours, deviation", "ours.accuracy.deviation"),
                ("PyTorch", "torch.accuracy.mean"),
                ("PyTorch, deviation", "torch.accuracy.deviation"),
            ),
        ),
        has_folder=False,
        needs=f"{_DEMO_SHARDS}/manifest.json",
    ),
    Benchmark(
        "scaling",
        "bench_scaling.py",
        ("--plot={picture}",),
        (
            "--plot={picture}",
            "--rounds=1",
            "--batch_sizes=1,4",
            "--crop_sizes=32,48",
            "--devices=1,2",
            "--rows=10000",
            "--crops=8",
        ),
        Section(
            "Scaling",
            "Crops a second against batch, crop size and devices; seconds against "
            "rows.",
            (("crops at once, for crop sizes and devices", "batch_size_elsewhere"),),
            (
                ("By batch", "curves.batch_size"),
                ("By crop size in y and x", "curves.crop_size"),
                ("By devices (on a CPU, cores are shared)", "curves.devices"),
                ("By rows, s and GB", "curves.rows"),
            ),
            picture="scaling.png",
        ),
    ),
    Benchmark(
        "layers",
        "bench_layers.py",
        (),
        (_DEMO, "--rounds=1"),
        Section(
            "Layers and the roofline",
            "Each layer in inference by itself, and the machine's limits.",
            (
                ("peak, GFLOP/s", "peak_gflops"),
                ("bandwidth, GB/s", "bandwidth_gb_per_s"),
                ("all layers, s a crop", "seconds_per_crop"),
            ),
            (("Each layer", "layers"),),
            picture=roofline.FILE,
        ),
    ),
)
