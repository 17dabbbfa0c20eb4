# SPDX-License-Identifier: Apache-2.0
r"""Converts a checkpoint of the original PyTorch systems to a run of this project.

    python tools/import_torch.py --setup=02_train/setup_t3 \
        --checkpoint=02_train/setup_t3/model_checkpoint_500000 --workdir=runs/fafb
    python tools/import_torch.py --config=configs/banc.py \
        --checkpoint=model_checkpoint_1020000.pth --workdir=runs/banc

With `--setup`, classes, crop and network come from the .ini file of the setup, and
`--config` gives the rest. Without `--setup`, `--config` gives everything. The commands
`predict` and `evaluate` use the new run like a run that was trained here. A checkpoint
can contain Python code, which is not executed.
"""

import math
import pathlib
import re

from absl import flags
from ml_collections import config_flags

from synister_jax.base import command
from synister_jax.base.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/skeleton.py", lock_config=True
)
_SETUP = flags.DEFINE_string(
    "setup",
    None,
    "Read this folder of an original setup (VGG3D only), or its train_config.ini.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Convert this PyTorch file.", required=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Write the run into this folder.", required=True
)
_STEP = flags.DEFINE_integer(
    "step",
    None,
    "Save the checkpoint of the run with this step. By default, use the number at the "
    "end of the file name of --checkpoint.",
    lower_bound=0,
)


def main() -> None:
    # JAX and PyTorch take seconds to import: --help answers without them.
    import jax

    from synister_jax.network import checkpoint, torch_weights

    path = pathlib.Path(_CHECKPOINT.value)
    step = _STEP.value if _STEP.value is not None else _step_of(path)
    config = _CONFIG.value
    network = config.model.get("network", "vgg3d")
    if network != "vgg3d" and _SETUP.value is not None:
        raise UserError(
            f"--setup={_SETUP.value}: a setup always describes a vgg3d, but --config "
            f"has a {network}; leave one of the two flags out"
        )
    if _SETUP.value is not None:
        config = torch_weights.read_setup(pathlib.Path(_SETUP.value), config)
    convert = torch_weights.resnet18 if network == "resnet18" else torch_weights.vgg3d
    variables = convert(torch_weights.load(path), config)
    checkpoint.save_imported(pathlib.Path(_WORKDIR.value), step, variables, config)
    leaves = jax.tree.leaves(variables["params"])
    print(
        f"{_WORKDIR.value}: step {step}, {network} of "
        f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters from {path}; "
        f"classes {', '.join(config.classes)}; crop {tuple(config.crop_shape_zyx)} "
        f"voxels of {tuple(config.voxel_size_nm_zyx)} nm (z, y, x)"
    )


def _step_of(path: pathlib.Path) -> int:
    """Returns the number at the end of a name like model_checkpoint_1020000.pth."""
    found = re.search(r"_(\d+)$", path.stem)
    if not found:
        raise UserError(
            f"--checkpoint: {path.name} does not end in a step; give --step"
        )
    return int(found[1])


if __name__ == "__main__":
    command.run(main)
