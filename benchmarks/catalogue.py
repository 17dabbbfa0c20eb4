# SPDX-License-Identifier: Apache-2.0
"""Says what run_all.py runs, at full and at small sizes, and what is shown of it.

Each benchmark is a dictionary:
  module: Module of the program.
  full, quick: Its arguments for a measurement, and to see in seconds that it works.
  title, about: Heading of its section in RESULTS.md, and what it measures.
  rows: What the section shows, {label: keys in the report joined by dots}. Where there
    is a dictionary, it is a row for each of its entries.
  allocators: Where the report has the numbers of each allocator; it stands for the {}
    in keys.
  targets: {label: (keys, number)}: at least that for a ratio, at most for seconds.
  tables: Lists of points that are shown as tables of their own, {title: keys}.
  texture: Whether it takes --texture.
  needs: A file that something else makes.
"""

from typing import Any

_DEMO = "--config=configs/demo.py"
_QUICK = [_DEMO, "--rounds=1"]
_SHARDS = "demo/shards"
_FOUR_STEPS = ["--config.num_train_steps=4", "--config.eval_every_steps=4"]
_ALLOCATORS = ("allocators.default", "allocators.huge")
_START = {
    "module": "bench_start",
    "quick": _QUICK,
    "about": "Seconds from the start of a prediction, with JAX's compile cache for "
    "programs that take a second to compile (slow), for all, and without; predict sets "
    "none. On a CPU the network is compiled at each start, whatever the cache.",
    "rows": {
        "s to the first prediction,": "seconds_to_first_prediction",
        "s to the end,": "seconds_to_exit",
        "programs in the cache,": "programs_in_cache",
    },
    "targets": {"s to the first prediction": ("seconds_to_first_prediction.cache", 5)},
}

BENCHMARKS: dict[str, dict[str, Any]] = {
    "input": {
        "module": "bench_input",
        "quick": [*_QUICK, "--seconds=1"],
        "texture": True,
        "title": "Training input",
        "about": "Examples a second, beside gunpowder with the published nodes, which "
        "gives augmented crops. Our host side gives unaugmented records of shards, "
        "whose cutting is not timed; with the augmentation, the device makes crops.",
        "allocators": ("", "allocator_huge."),
        "rows": {
            "volume read": "texture",
            "examples/s,": "{}rates",
            "over gunpowder,": "{}ratio_to_gunpowder",
        },
        "targets": {
            "unaugmented over gunpowder": ("{}ratio_to_gunpowder.ours_host", 20),
            "augmented over gunpowder": (
                "{}ratio_to_gunpowder.ours_with_augmentation",
                5,
            ),
        },
    },
    "train": {
        "module": "bench_train",
        "quick": _QUICK,
        "title": "Training step",
        "about": "Forward, backward and Adam at full size, beside PyTorch; ours "
        "alternates with one other side at a time.",
        "allocators": _ALLOCATORS,
        "rows": {
            "crops/s,": "{}.as_written.rates",
            "ours over": "{}.as_written.ratio",
            "share of the peak,": "{}.as_written.share_of_peak",
            "second pair, crops/s,": "{}.tuned.rates",
            "second pair, ours over": "{}.tuned.ratio",
        },
        "targets": {
            "over PyTorch as written": ("{}.as_written.ratio.as_written", 2),
            "over PyTorch tuned": ("{}.tuned.ratio.tuned", 1),
        },
    },
    "predict": {
        "module": "bench_predict",
        "quick": _QUICK,
        "title": "Inference",
        "about": "The network alone at full size, beside PyTorch.",
        "allocators": _ALLOCATORS,
        "rows": {
            "crops/s,": "{}.rates",
            "ours over": "{}.ratio",
            "share of the peak,": "{}.share_of_peak",
            "peak, GFLOP/s": "{}.peak_gflops",
        },
        "targets": {
            "over PyTorch as written": ("{}.ratio.as_written", 2.5),
            "over PyTorch tuned": ("{}.ratio.tuned", 1),
        },
    },
    "end_to_end": {
        "module": "bench_end_to_end",
        "quick": _QUICK,
        "title": "End to end",
        "about": "From a volume and synapses to predictions, beside the original's "
        "loop, and beside the network alone: what reading, waiting and writing cost.",
        "allocators": _ALLOCATORS,
        "rows": {
            "synapses/s,": "{}.rates",
            "ours over": "{}.ratio",
            "device busy": "{}.device_busy",
        },
        "targets": {"over the original's loop": ("{}.ratio.original", 2.5)},
    },
    "start": _START | {"full": [_DEMO], "title": "Cold start, demonstration"},
    "start_full": _START | {"title": "Cold start, full size"},
    "read": {
        "module": "bench_read",
        "quick": ["--rounds=1", "--crops=500", "--sample=20"],
        "texture": True,
        "title": "Reading crops",
        "about": "In chunk order through a cache, beside a loop: one read a synapse.",
        "rows": {
            "volume read": "texture",
            "crops/s,": "rates",
            "chunk order over": "ratio",
            "decoded per byte needed,": "decoded_over_needed",
        },
    },
    "shard": {
        "module": "bench_shard",
        "quick": [
            *_QUICK[1:],
            "--crops=24",
            "--sample=6",
            "--batches=2",
            "--records=16",
        ],
        "texture": True,
        "title": "Shards: cutting, Grain's threads, codecs",
        "about": "Records cut in chunk order, beside a loop: one read a synapse; a "
        "consumer that only waits for batches; bytes and speed of records by codec.",
        "rows": {
            "volume read": "texture",
            "crops/s,": "cut.rates",
            "chunk order over": "cut.ratio",
            "decoded per byte needed,": "cut.decoded_over_needed",
            "in use,": "stream.in_data_py",
        },
        "tables": {
            "Examples a second of the stream": "stream.examples_per_second",
            "Codecs": "codecs",
        },
    },
    "table": {
        "module": "bench_table",
        "full": ["--rows=10000,1000000,10000000"],
        "quick": ["--rows=10000", "--split_synapses=50000"],
        "title": "Tables of synapses",
        "about": "Planning, merging, aggregating and splitting; no other side.",
        "rows": {"split,": "split"},
        "tables": {"By rows": "sizes"},
    },
    "augmentation": {
        "module": "bench_augmentation",
        "quick": _QUICK,
        "title": "Augmentation",
        "about": "Its share of a training step.",
        "rows": {
            "s of a step,": "seconds",
            "augmentation alone, of the step": "augmentation_of_step",
        },
    },
    "accuracy": {
        "module": "accuracy_against_torch",
        "full": [_DEMO, f"--shards={_SHARDS}", "--config.num_train_steps=300"],
        "quick": [_DEMO, f"--shards={_SHARDS}", "--seed=0", *_FOUR_STEPS],
        "needs": f"{_SHARDS}/manifest.json",
        "title": "Accuracy",
        "about": "Our trainer and a plain PyTorch loop on the same batches.",
        "rows": {"ours,": "ours.accuracy", "PyTorch,": "plain_loop.accuracy"},
    },
    "layers": {
        "module": "bench_layers",
        "quick": _QUICK,
        "title": "Layers and the roofline",
        "about": "Each layer in inference by itself, and the machine's limits.",
        "rows": {
            "peak, GFLOP/s": "peak_gflops",
            "bandwidth, GB/s": "bandwidth_gb_per_s",
            "all layers, s a crop": "seconds_per_crop",
        },
        "tables": {"Each layer": "layers"},
    },
}
