"""Makes the example datasets with pictures, as parquet files.

    pip install --target /tmp/sklearn --no-deps scikit-learn
    python scripts/tiny_pictures.py --digits /tmp/sklearn/sklearn/datasets/data/digits.csv.gz

digits: scans of handwriting; see cookbook_core/assets/data/DIGITS.md for where they come from.
faces: drawn here from a seed, with the votes of 20 simulated annotators on how each one feels.
"""

from __future__ import annotations

import argparse
import gzip
import io
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

Row = dict[str, Any]
SEED = 0
ANNOTATORS = 20
HELD_OUT = {"digits": 200, "faces": 200}
DIGITS = [str(digit) for digit in range(10)]
FEELINGS = [" happy", " wonderful", " quiet", " sad", " cold", " dreadful"]
SIZE = 32
"""Width and height of a face, in pixels."""


def png(pixels: np.ndarray) -> bytes:
    """The file of a grey image, `(height, width)`, from 0 to 255; the parquet file compresses."""
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def row(pixels: np.ndarray, text: str, labels: list[str], probs: list[float]) -> Row:
    image = {"bytes": png(pixels), "path": None}
    return {"image": image, "text": text, "labels": labels, "label_probs": probs}


def digit_rows(path: Path) -> list[Row]:
    """Returns rows with 0.82 on the digit that was written and 0.02 on each of the others."""
    rows = []
    with gzip.open(path, "rt", encoding="ascii") as file:
        for line in file:
            *ink, digit = (round(float(value)) for value in line.split(","))  # ink: 0 to 16
            pixels = np.array(ink).reshape(8, 8) * 255 // 16
            probs = [0.82 if label == str(digit) else 0.02 for label in DIGITS]
            rows.append(row(pixels, "Which digit is this?", DIGITS, probs))
    return rows


# ---- faces ---------------------------------------------------------------------------------------


def face(rng: random.Random) -> tuple[np.ndarray, list[float]]:
    """Draws a face; returns its pixels and how likely each feeling is to be voted for."""
    smile, opened, anger = rng.uniform(-1, 1), rng.uniform(0, 1), rng.uniform(-1, 1)
    scores = [  # in the order of FEELINGS
        3 * smile - 2 * opened,
        3 * smile + 3 * opened - 3,
        3 - 4 * abs(smile) - 3 * opened - abs(anger),
        -3 * smile - 2 * opened - anger,
        -smile - 2 * opened + 3 * anger,
        -2 * smile + 4 * opened - 2 - 2 * anger,
    ]
    shares = [math.exp(1.5 * score) for score in scores]
    x0, y0 = 15.5 + rng.uniform(-0.4, 0.4), 15.5 + rng.uniform(-0.4, 0.4)
    wide, tall = rng.uniform(11.8, 12.2), rng.uniform(12.8, 13.2)
    ink, skin = rng.uniform(0, 40), rng.uniform(220, 255)
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    x, y = (x - x0) / wide, (y - y0) / tall  # the head is the unit circle
    image = np.where(x**2 + y**2 < 1, skin, 100.0)
    side = np.abs(x)
    mouth = 0.4 + smile * (0.5 - 3 * x**2) * 0.25  # y of the middle of the lips
    near = (side < 0.5) & (np.abs(y - mouth) < 0.07 + 0.22 * opened * (1 - 4 * x**2))
    eyes = (side - 0.4) ** 2 + (y + 0.2) ** 2 < 0.016 + 0.02 * opened
    brow = -0.5 + 0.45 * anger * (0.4 - side)  # inner ends down: anger
    brows = (np.abs(side - 0.4) < 0.22) & (np.abs(y - brow) < 0.06)
    image[near | eyes | brows] = ink
    return image // 16 * 17, [share / sum(shares) for share in shares]


def face_rows(count: int, seed: int = SEED) -> list[Row]:
    """Returns faces with the share of votes for each feeling, and what the votes were drawn from.

    drawn_from has the likelihoods themselves, which no recipe reads: KL(votes || drawn_from) is
    the scatter of the votes, below which nothing that has not seen them can get.
    """
    rng, rows = random.Random(seed), []
    for _ in range(count):
        pixels, likely = face(rng)
        votes = [0] * len(FEELINGS)
        for _ in range(ANNOTATORS):
            point, at = rng.random(), 0
            while at < len(likely) - 1 and point >= likely[at]:
                point -= likely[at]
                at += 1
            votes[at] += 1
        shares = [n / ANNOTATORS for n in votes]
        made = row(pixels, "How does this person feel?", FEELINGS, shares)
        rows.append({**made, "drawn_from": [round(p, 4) for p in likely]})
    return rows


def write(folder: Path, name: str, rows: list[Row]) -> None:
    cut = len(rows) - HELD_OUT[name]
    for split, part in (("train", rows[:cut]), ("test", rows[cut:])):
        table = pyarrow.Table.from_pylist(part)
        path = folder / f"{name}_{split}.parquet"
        pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=19)
        print(f"{path}: {len(part)} rows, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, required=True, help="scikit-learn's digits.csv.gz")
    parser.add_argument("--out", type=Path, default=Path("cookbook_core/assets/data"))
    options = parser.parse_args()
    write(options.out, "digits", digit_rows(options.digits))
    write(options.out, "faces", face_rows(1000))


if __name__ == "__main__":
    main()
