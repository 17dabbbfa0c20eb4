# SPDX-License-Identifier: Apache-2.0
"""Reads the pixels of a picture, so that a test can check them."""

import io

import numpy as np
from matplotlib import image


def pixels(png_content: bytes) -> np.ndarray:
    """Returns the colours of a PNG file, uint8 [height, width, 3]."""
    read = image.imread(io.BytesIO(png_content), format="png")
    return (read[..., :3] * 255).round().astype(np.uint8)
