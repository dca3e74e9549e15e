"""Print the table of docs/memory.md: `cookbook memory` for the shapes of Qwen3.

python -m scripts.memory_table
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cookbook_core.commands.memory import table

_NAMES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size tie_word_embeddings"
).split()
SHAPES: dict[str, Sequence[int | bool]] = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, 128, 151_936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151_936, True),
    "Qwen3-8B": (4096, 12_288, 36, 32, 8, 128, 151_936, False),
    "Qwen3-14B": (5120, 17_408, 40, 40, 8, 128, 151_936, False),
    "Qwen3-32B": (5120, 25_600, 64, 64, 8, 128, 151_936, False),
}


def make_folders(parent: Path, shapes: Mapping[str, Sequence[int | bool]]) -> list[str]:
    """Write a config.json for each; return the folders."""
    folders = []
    for name, shape in shapes.items():
        (parent / name).mkdir()
        config = {"model_type": "qwen3", "max_position_embeddings": 40_960}
        config |= dict(zip(_NAMES, shape, strict=True))
        (parent / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        folders.append(str(parent / name))
    return folders


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(table(make_folders(Path(folder), SHAPES), ["24GB", "48GB", "80GB"]))
