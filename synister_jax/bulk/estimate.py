# SPDX-License-Identifier: Apache-2.0
"""Estimates the time and the bytes that a plan needs, before it is executed."""

import math
import time

import jax
import numpy as np

from synister_jax.base.progress import duration
from synister_jax.bulk.planning import Plan
from synister_jax.em import crops
from synister_jax.em.volumes import Volume
from synister_jax.network import inference

# The chunks of about this many units are counted. Of a larger plan, evenly spaced units
# are taken.
_UNITS_COUNTED = 32
_SECONDS_TIMED = 2.0


def text(plan: Plan, classifier: inference.Classifier, volume: Volume) -> str:
    """Returns the lines to print: the rows, units, bytes and time of the plan."""
    about = plan.about
    counts = about["status_by_position"]
    without = sum(counts.values()) - plan.predicted_rows
    shape = about["crop_shape_zyx"]
    shown = ", ".join(f"{n:,} {name}" for name, n in counts.items()) or "none"
    rate = crops_per_second(classifier)
    needed = _bytes(plan.predicted_rows * math.prod(shape))
    decoded = _bytes(decoded_bytes(plan, volume))
    time_needed = duration(plan.predicted_rows / rate)
    return (
        f"rows: {about['rows']:,} ({shown}); {without:,} without a crop "
        "in the volume\n"
        f"units: {len(plan):,} of up to {about['unit_rows']:,} synapses\n"
        f"bytes needed: {needed} in crops of {'×'.join(map(str, shape))}\n"
        f"chunk bytes to decode: about {decoded}, if each unit decodes a chunk once\n"
        f"time: about {time_needed} for the network at {rate:,.1f} crops/s on "
        f"{jax.device_count()} {jax.default_backend()} device(s) here"
    )


def decoded_bytes(plan: Plan, volume: Volume) -> float:
    """Estimates the bytes of all chunks that the units read, from a sample of units.

    A chunk counts once for every unit that reads it, and a voxel is one byte.
    """
    sample = range(0, len(plan), max(1, len(plan) // _UNITS_COUNTED))
    shape, total = plan.about["crop_shape_zyx"], 0
    for unit in sample:
        _, starts = plan.unit(unit)
        total += crops.count_chunks(starts, shape, volume)
    scale = len(plan) / max(len(sample), 1)
    return total * scale * math.prod(volume.chunk_shape_zyx)


def crops_per_second(classifier: inference.Classifier) -> float:
    """Measures the crops per second of the network alone, for about two seconds.

    The crops are on the devices already, so reading and copying are not measured.

    Raises:
      UserError: the batch size does not fit into the memory of the devices.
    """
    shape = (classifier.batch_size, *classifier.config.crop_shape_zyx)
    with inference.told_if_too_large(classifier.batch_size):
        batch = classifier.put(np.zeros(shape, np.uint8))
        jax.block_until_ready(classifier.start(batch))  # compiles the network
    start, batches = time.perf_counter(), 0
    while batches == 0 or time.perf_counter() - start < _SECONDS_TIMED:
        jax.block_until_ready(classifier.start(batch))
        batches += 1
    return batches * classifier.batch_size / (time.perf_counter() - start)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"
