# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess

import numpy as np
import pytest

from synister_jax.base import figures
from tests.helpers import commands, pictures
from tests.helpers.small_data import CLASSES, ROOT


def show(
    folder: pathlib.Path, shards: pathlib.Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command with `tiny_config` as its configuration."""
    config = folder / "config.py"
    config.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.helpers.small_data import tiny_config as get_config\n"
    )
    command = ["tools/show_augmentation.py", f"--config={config}"]
    command += [f"--shards={shards}", f"--output={folder / 'sheet.png'}", *options]
    return commands.run(*command)


@pytest.mark.long
def test_a_sheet_of_every_class(
    tmp_path: pathlib.Path, shards_folder: pathlib.Path
) -> None:
    finished = show(tmp_path, shards_folder, "--examples=3", "--variants=2")
    assert finished.returncode == 0, finished.stderr
    assert "2 augmentations of 3 train crops" in finished.stdout
    first = (tmp_path / "sheet.png").read_bytes()
    assert len(np.unique(pictures.pixels(first))) > 50  # EM has many greys
    show(tmp_path, shards_folder, "--examples=3", "--variants=2")
    assert (tmp_path / "sheet.png").read_bytes() == first
    show(tmp_path, shards_folder, "--examples=3", "--variants=2", "--seed=1")
    assert (tmp_path / "sheet.png").read_bytes() != first


def test_other_shards_are_refused(
    tmp_path: pathlib.Path, shards_folder: pathlib.Path
) -> None:
    finished = show(tmp_path, shards_folder, "--config.crop_shape_zyx=(4, 32, 32)")
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1 and "crop_shape" in finished.stderr
    assert not (tmp_path / "sheet.png").exists()


def test_the_figure_shows_each_crop_where_it_says() -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (2, 6, 20, 24), dtype=np.uint8)
    crops = rng.uniform(-1, 1, (2, 3, 4, 16, 20)).astype(np.float32)
    figure = figures.augmentations(records, crops, CLASSES[:2], (40, 4, 4), sections=3)
    first, *middles, along_z, below = (
        axes.get_images()[0].get_array() for axes in figure.axes[:6]
    )
    np.testing.assert_array_equal(first, records[0, 3])
    for number, middle in enumerate(middles):
        np.testing.assert_array_equal(middle, crops[0, number, 2])
    np.testing.assert_array_equal(along_z, crops[0, 0, :, 8])
    for place, z in enumerate((0, 2, 3)):
        section = below[:, place * 21 : place * 21 + 20]
        np.testing.assert_array_equal(section, crops[0, 0, z])
    [frame] = figure.axes[0].patches
    assert frame.get_bbox().bounds == (1.5, 1.5, 20, 16)
    assert [axes.get_title(loc="left") for axes in figure.axes[::6]] == [*CLASSES[:2]]
    figures.png(figure)  # closes the figure
