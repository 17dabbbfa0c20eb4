# SPDX-License-Identifier: Apache-2.0
r"""Cuts the crops of a synapse table out of a volume into ArrayRecord shards.

    python tools/shard_crops.py --config=configs/skeleton.py \
        --synapses=data/fafb_v3 --volume=/data/fafb/v14.n5/volumes/raw/s0 \
        --output=/data/fafb/shards

`config.neither_crops` and `config.unknown_per_class` add crops of two pseudo-classes:
`neither` (random places in the volume) and `unknown` (places next to a synapse). Both
depend on `config.seed`, and `unknown` also depends on the parts of `config.split`.

If the command stops before its end, run the same command again: it continues. If all
shards exist already, `--verify` only reads and checks them.
"""

from absl import flags
from ml_collections import config_flags

from synister_jax.base import command
from synister_jax.base.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_SYNAPSES = flags.DEFINE_string(
    "synapses", None, "Cut the crops of this synapse table.", required=True
)
_VOLUME = flags.DEFINE_string(
    "volume", None, "Cut the crops out of this volume.", required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Write the shards into this folder.", required=True
)
_SHARD_MIB = flags.DEFINE_integer(
    "shard_mib",
    128,
    "Put this many MiB of uncompressed crops into each shard.",
    lower_bound=1,
)
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Read every record of the shards back and check it."
)
flags.mark_flag_as_required("config")


def main() -> None:
    # JAX takes seconds to import. --help and errors in the flags do not wait for it.
    from synister_jax.em import spaces, volumes
    from synister_jax.tables import reading, synapses
    from synister_jax.training import augment, cutting, pseudo_classes, shards

    config = _CONFIG.value
    table = reading.load(_SYNAPSES.value)
    volume = volumes.open(_VOLUME.value, config.voxel_size_nm_zyx)
    if doubt := spaces.doubt(synapses.positions_nm_zyx(table), volume):
        raise UserError(
            f"{_SYNAPSES.value}: {doubt}; convert the table with "
            "tools/import_synapses.py"
        )
    options = ("neither_crops", "unknown_per_class", "seed")
    extra = {name: config[name] for name in options}
    margin_vx_zyx = augment.AugmentSettings.of(config).margin_vx_zyx
    both = pseudo_classes.with_extra_classes(
        table,
        volume,
        record_shape_zyx=shards.record_shape_zyx(config.crop_shape_zyx, margin_vx_zyx),
        classes=config.classes,
        split=config.split,
        **extra,
    )
    written = cutting.write(
        _OUTPUT.value,
        both,
        volume,
        crop_shape_zyx=config.crop_shape_zyx,
        margin_vx_zyx=margin_vx_zyx,
        classes=config.classes,
        shard_bytes=_SHARD_MIB.value << 20,
        made_with=extra if len(both) > len(table) else None,
    )
    if _VERIFY.value:
        shards.verify(written)
    manifest = written.manifest
    dropped = ", ".join(f"{n:,} {why}" for why, n in manifest["dropped"].items())
    print(
        f"{_OUTPUT.value}: {manifest['records']:,} crops of {written.record_shape_zyx} "
        f"voxels in {len(manifest['shards'])} shards; left out: {dropped or 'none'}"
    )


if __name__ == "__main__":
    command.run(main)
