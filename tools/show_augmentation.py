# SPDX-License-Identifier: Apache-2.0
r"""Draws augmented training crops, so that you can check them before you train.

    python tools/show_augmentation.py --config=configs/skeleton.py \
        --shards=/data/fafb/shards --output=sheet.png

The examples are of different classes, and each example has two rows. The upper row
shows the record with a frame around the crop, the middle sections of `--variants`
augmentations, and the first augmentation cut along z. The lower row shows the sections
of the first augmentation. Training gets exactly these crops from the same config and
shards.
"""

import pathlib

import numpy as np
from absl import flags
from ml_collections import config_flags

from synister_jax.base import command, files

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_SHARDS = flags.DEFINE_string(
    "shards", None, "Read the crops from this folder of shards.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Write this PNG file.", required=True)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 6, "Draw this many examples.", lower_bound=1
)
_VARIANTS = flags.DEFINE_integer(
    "variants", 5, "Draw this many augmentations of each example.", lower_bound=1
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Draw examples and augmentations from this seed.", lower_bound=0
)
flags.mark_flag_as_required("config")


def main() -> None:
    # JAX takes seconds to import. --help and errors in the flags do not wait for it.
    import jax

    from synister_jax.base import figures
    from synister_jax.training import augment, input_pipeline

    config = _CONFIG.value
    config.shards, config.seed = _SHARDS.value, _SEED.value
    config.batch_size = _EXAMPLES.value
    shards = input_pipeline.open_shards(config)
    examples = input_pipeline.TrainBatches.of(shards, config)
    rows = examples.rows(0)
    batch = examples.read(rows)
    settings = augment.AugmentSettings.of(config)
    apply = jax.jit(lambda records, keys: augment.augment(records, keys, settings))
    crops = [
        apply(
            np.repeat(record[None], _VARIANTS.value, axis=0),
            augment.batch_keys(config.seed, row, _VARIANTS.value),
        )
        for row, record in enumerate(batch["crop"])
    ]
    ids = shards.index["synapse_id"].to_numpy()[rows]
    names = [
        f"{config.classes[label]}\n{synapse}"
        for label, synapse in zip(batch["label"], ids, strict=True)
    ]
    figure = figures.augmentations(
        batch["crop"], np.stack(crops), names, config.voxel_size_nm_zyx
    )
    output = pathlib.Path(_OUTPUT.value)
    files.make_folder(output.parent)
    files.write_bytes(output, figures.png(figure, dpi=150))
    print(f"{output}: {_VARIANTS.value} augmentations of {len(rows)} train crops")


if __name__ == "__main__":
    command.run(main)
