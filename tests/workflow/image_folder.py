"""A folder of real image files, small and different enough to learn from."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path) -> Path:
    """Writes two classes: 16 + 16 images to train on, 4 + 4 held out; returns the folder."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 128, (12, 12, 3)) + 127 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    return root
