# SPDX-License-Identifier: Apache-2.0
"""Lists the benchmarks that run_all.py runs, and what RESULTS.md shows of each.

Each benchmark is a dictionary:
  module: the module of the program.
  full: the arguments for a measurement.
  quick: the arguments for a test of some seconds, which shows that the program works.
  title: the heading of the section in RESULTS.md.
  about: the text of the section, which says what is measured.
  rows: the rows of the section, {label: keys in the report, joined by dots}. If the
    value is a dictionary, each of its entries is a row.
  allocators: the place of each allocator's numbers in the report. This text replaces
    the {} in the keys.
  targets: {label: (keys, number)}. A ratio must be at least this number, and seconds
    must be at most this number.
  tables: lists of points, each shown as a table, {title: keys}.
  texture: whether the program has the flag --texture.
  needs: a file that must exist already.
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
    "about": "The seconds from the start of `predict` to its first prediction, and to "
    "its end. JAX can keep compiled programs in a cache for later starts. `cache` "
    "keeps the slow programs (a second or more to compile). `cache of all` keeps "
    "all programs, and `no cache` keeps none. `predict` itself sets no cache. On a CPU "
    "the network is compiled at each start, with every cache.",
    "rows": {
        "seconds to the first prediction,": "seconds_to_first_prediction",
        "seconds to the end,": "seconds_to_exit",
        "programs in the cache,": "programs_in_cache",
    },
    "targets": {
        "seconds to the first prediction": ("seconds_to_first_prediction.cache", 5)
    },
}

BENCHMARKS: dict[str, dict[str, Any]] = {
    "input": {
        "module": "bench_input",
        "quick": [*_QUICK, "--seconds=1"],
        "texture": True,
        "title": "Training input",
        "about": "Training examples per second, compared with gunpowder. gunpowder "
        "runs the nodes that the original trains with, and gives augmented crops. "
        "`ours host` reads records from shards and does not augment them. `ours with "
        "augmentation` also makes augmented crops of them on the device. The time to "
        "cut the shards does not count.",
        "allocators": ("", "allocator_huge."),
        "rows": {
            "volume read": "texture",
            "examples per second,": "{}rates",
            "ratio to gunpowder,": "{}ratio_to_gunpowder",
        },
        "targets": {
            "ratio of ours, unaugmented, to gunpowder": (
                "{}ratio_to_gunpowder.ours_host",
                20,
            ),
            "ratio of ours, augmented, to gunpowder": (
                "{}ratio_to_gunpowder.ours_with_augmentation",
                5,
            ),
        },
    },
    "train": {
        "module": "bench_train",
        "quick": _QUICK,
        "title": "Training step",
        "about": "One training step of the full-size network: the forward pass, the "
        "backward pass and the update by Adam. `as written` is PyTorch as the original "
        "runs it, and `tuned` is PyTorch made faster. Ours runs in turns with one of "
        "them at a time, so there are two comparisons with a rate of ours each.",
        "allocators": _ALLOCATORS,
        "rows": {
            "crops per second,": "{}.as_written.rates",
            "ratio of ours to": "{}.as_written.ratio",
            "share of the peak,": "{}.as_written.share_of_peak",
            "second comparison, crops per second,": "{}.tuned.rates",
            "second comparison, ratio of ours to": "{}.tuned.ratio",
        },
        "targets": {
            "ratio to PyTorch as written": ("{}.as_written.ratio.as_written", 2),
            "ratio to PyTorch tuned": ("{}.tuned.ratio.tuned", 1),
        },
    },
    "predict": {
        "module": "bench_predict",
        "quick": _QUICK,
        "title": "Inference",
        "about": "Predictions of the full-size network alone. `as written` is PyTorch "
        "as the original runs it, `inference mode` is the same without the data for "
        "gradients, and `tuned` is PyTorch made faster.",
        "allocators": _ALLOCATORS,
        "rows": {
            "crops per second,": "{}.rates",
            "ratio of ours to": "{}.ratio",
            "share of the peak,": "{}.share_of_peak",
            "peak, GFLOP/s": "{}.peak_gflops",
        },
        "targets": {
            "ratio to PyTorch as written": ("{}.ratio.as_written", 2.5),
            "ratio to PyTorch tuned": ("{}.ratio.tuned", 1),
        },
    },
    "end_to_end": {
        "module": "bench_end_to_end",
        "quick": _QUICK,
        "title": "End to end",
        "about": "A whole prediction, from a volume and synapses to the table of "
        "predictions. `original` is the original's loop, one crop after the other. "
        "`network alone` is our network with crops that are on the device already. The "
        "ratio to `network alone` shows the cost of reading, waiting and writing.",
        "allocators": _ALLOCATORS,
        "rows": {
            "synapses per second,": "{}.rates",
            "ratio of ours to": "{}.ratio",
            "share of the time that the device is busy": "{}.device_busy",
        },
        "targets": {"ratio to the loop of the original": ("{}.ratio.original", 2.5)},
    },
    "start": _START | {"full": [_DEMO], "title": "Cold start, demonstration"},
    "start_full": _START | {"title": "Cold start, full size"},
    "read": {
        "module": "bench_read",
        "quick": ["--rounds=1", "--crops=500", "--sample=20"],
        "texture": True,
        "title": "Reading crops",
        "about": "Crops read per second. `chunk order` reads the crops in the order of "
        "the volume's chunks, through a cache. `loop` reads one crop after the other "
        "without a cache, as the original does.",
        "rows": {
            "volume read": "texture",
            "crops per second,": "rates",
            "ratio of chunk order to": "ratio",
            "bytes decoded per byte needed,": "decoded_over_needed",
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
        "about": "Three measurements. First, records are cut in the order of the "
        "volume's chunks, or in a loop with one read per synapse. Second, a program "
        "that only waits reads training batches, with several numbers of threads and "
        "of waiting batches (buffer). Third, records are written and read with several "
        "codecs.",
        "rows": {
            "volume read": "texture",
            "crops per second,": "cut.rates",
            "ratio of chunk order to": "cut.ratio",
            "bytes decoded per byte needed,": "cut.decoded_over_needed",
            "used in training,": "stream.in_data_py",
        },
        "tables": {
            "Training examples read per second": "stream.examples_per_second",
            "Codecs": "codecs",
        },
    },
    "table": {
        "module": "bench_table",
        "full": ["--rows=10000,1000000,10000000"],
        "quick": ["--rows=10000", "--split_synapses=50000"],
        "title": "Tables of synapses",
        "about": "The time and the memory to plan, merge, aggregate and split tables. "
        "No other program is compared.",
        "rows": {"split,": "split"},
        "tables": {"By the number of rows": "sizes"},
    },
    "augmentation": {
        "module": "bench_augmentation",
        "quick": _QUICK,
        "title": "Augmentation",
        "about": "The share of the augmentation in a training step. `augmented` is a "
        "step with augmentation, `plain` is a step without, and `alone` is only the "
        "augmentation.",
        "rows": {
            "seconds,": "seconds",
            "alone, as a share of augmented": "augmentation_of_step",
        },
    },
    "accuracy": {
        "module": "accuracy_against_torch",
        "full": [_DEMO, f"--shards={_SHARDS}", "--config.num_train_steps=300"],
        "quick": [_DEMO, f"--shards={_SHARDS}", "--seed=0", *_FOUR_STEPS],
        "needs": f"{_SHARDS}/manifest.json",
        "title": "Accuracy",
        "about": "The accuracy per synapse after training with our trainer, and with a "
        "simple PyTorch loop on the same batches.",
        "rows": {"ours,": "ours.accuracy", "PyTorch,": "plain_loop.accuracy"},
    },
    "layers": {
        "module": "bench_layers",
        "quick": _QUICK,
        "title": "Layers and the roofline",
        "about": "The rate of each layer in inference, and the limits of the machine. "
        "The roof is the highest rate that the peak and the memory bandwidth allow for "
        "a layer.",
        "rows": {
            "peak, GFLOP/s": "peak_gflops",
            "memory bandwidth, GB/s": "bandwidth_gb_per_s",
            "all layers, seconds per crop": "seconds_per_crop",
        },
        "tables": {"Each layer": "layers"},
    },
}
