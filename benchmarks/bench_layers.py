# SPDX-License-Identifier: Apache-2.0
"""Each layer of the network alone, against what the machine could do at most.

    python benchmarks/bench_layers.py --folder=FOLDER [--config=configs/skeleton.py] \
        [--plot=FILE.png --results=results.json] [--rounds=5]

A layer is one jitted function: convolution or matrix product, bias and ReLU, of random
input at the size that it has in the network, for a batch of `--config.batch_size`, crop
by crop where the network in inference takes them so.
Layers alternate; medians. Its intensity is peaks.flops_per_crop's: operations for each
byte that must be moved at least (input, output and weights, once), so the roof above
it, the smaller of the peak rate and of intensity times bandwidth, is what no layer by
itself can pass. Norms and pooling are not timed here. The picture (roofline.py) has
the whole network's rates too where `--results`, from run_all.py, has those. One
device is used. Prints one line of JSON.
"""

import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import peaks
import roofline
import side_by_side
from absl import flags
from ml_collections import config_flags

from synister_jax.base import command, files
from synister_jax.network import convolution, inference

_FOLDER = flags.DEFINE_string(
    "folder", None, "Where the compiled layers are kept.", required=True
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 2, "Of a round.", lower_bound=1)
_PLOT = flags.DEFINE_string("plot", None, "Draw the roofline here (PNG).")
_RESULTS = flags.DEFINE_string("results", None, "For the whole network's rates.")


def main() -> None:
    config = _CONFIG.value
    folder = files.make_folder(_FOLDER.value)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    work = peaks.flops_per_crop(config)
    peak, peak_is = peaks.peak_flops(config.compute_dtype)
    bandwidth = peaks.memory_bandwidth()
    rates = side_by_side.alternate(dict(_layers(config)), _ROUNDS.value)
    medians = side_by_side.summary(rates, next(iter(rates)))["rates"]
    # A roof is the best that the machine can: another look, at another time.
    peak, peak_is = max((peak, peak_is), peaks.peak_flops(config.compute_dtype))
    bandwidth = max(bandwidth, peaks.memory_bandwidth())
    layers = []
    for layer in work["layers"]:
        flops, intensity = layer["flops"], layer["flops"] / layer["bytes"]
        rate = medians[layer["name"]] * flops
        layers.append(
            {
                "name": layer["name"],
                "gflop_per_crop": flops / 1e9,
                "mb_per_crop": layer["bytes"] / 1e6,
                "flop_per_byte": intensity,
                "gflops": rate / 1e9,
                "share_of_roof": rate / min(peak, intensity * bandwidth),
                "seconds_per_crop": 1 / medians[layer["name"]],
            }
        )
    total_bytes = sum(layer["bytes"] for layer in work["layers"])
    report = {
        "benchmark": "layers",
        "layers": layers,
        "gflop_per_crop": work["forward"] / 1e9,
        "flop_per_byte": work["forward"] / total_bytes,
        "seconds_per_crop": sum(layer["seconds_per_crop"] for layer in layers),
        "peak_gflops": peak / 1e9,
        "peak_is": peak_is,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "batch_size": config.batch_size,
        "batches": _BATCHES.value,
        "rounds": _ROUNDS.value,
        "crop_shape_zyx": list(config.crop_shape_zyx),
        "parameters": peaks.parameters(config),
        "compute_dtype": config.compute_dtype,
    }
    report |= side_by_side.about("synister_jax", "jax", "jaxlib", "torch", "numpy")
    if _PLOT.value:
        results = files.read_json(_RESULTS.value) if _RESULTS.value else {}
        others = roofline.whole_network(results.get(report["backend"], {}))
        files.write_bytes(pathlib.Path(_PLOT.value), roofline.draw(report, others))
    print(json.dumps(report))


def _layers(
    config: ml_collections.ConfigDict,
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name and timed round of each."""
    parameters = inference.abstract_variables(config)["params"]
    shape = np.array(config.crop_shape_zyx)
    settings = config.model
    for level, factors in enumerate(settings.downsample_factors):
        for i in range(settings.convolutions[level]):
            name = f"level{level}_conv{i}"
            kernel = parameters[name]["kernel"].shape
            yield name, _round(config, (*shape, kernel[3]), kernel, _convolution)
        shape //= np.array(factors)
    for name in ("dense0", "dense1", "logits"):
        kernel = parameters[name]["kernel"].shape
        yield name, _round(config, kernel[:1], kernel, _dense)


def _convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    def convolve(x: jax.Array) -> jax.Array:
        return convolution.conv3d_relu(x, kernel, bias)

    if convolution.calls_library(x.dtype):
        return jax.lax.map(lambda crop: convolve(crop[None])[0], x)
    return convolve(x)


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ kernel + bias)


def _round(
    config: ml_collections.ConfigDict,
    input_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    layer: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> Callable[[], float]:
    dtype = jnp.dtype(config.compute_dtype)
    batch_size = config.batch_size

    jitted = jax.jit(layer, compiler_options=convolution.compiler_options())
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.uniform(keys[0], (batch_size, *map(int, input_shape)), dtype)
    reach = 1 / math.sqrt(math.prod(kernel_shape[:-1]))
    kernel = jax.random.uniform(keys[1], kernel_shape, dtype, -reach, reach)
    bias = jax.random.uniform(keys[2], kernel_shape[-1:], dtype)

    def one_round() -> float:
        start = time.perf_counter()
        for _ in range(_BATCHES.value):
            result = jitted(x, kernel, bias)
        jax.block_until_ready(result)
        return _BATCHES.value * batch_size / (time.perf_counter() - start)

    return one_round


if __name__ == "__main__":
    command.run(main)
