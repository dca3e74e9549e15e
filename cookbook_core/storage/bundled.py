"""The models that come with this package, by name: "tiny", and "tiny-vl", which reads images.

tiny-vl has Qwen3-VL's architecture: the weights of "tiny", bit for bit, under a small vision tower
of random numbers. Its folder is written once, from what the package has, into the folder where the
Hub's files are kept (HF_HOME). The numbers are drawn by a generator whose stream NumPy froze, and
only multiplied, so the folder has the same bytes on every machine.

Its special tokens for images take the ids of bytes that no UTF-8 text has, so that the vocabulary
and the logprobs of text are those of "tiny".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cookbook_core.errors import ModelError
from cookbook_core.storage.paths import asset_path

BUNDLED = ("tiny", "tiny-vl")
"""Names of the bundled models."""

_TOKENS = ("vision_start", "vision_end", "image", "video")
_CONTENT = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
_PREFIX = "model.visual."


def bundled_model(name: str) -> Path:
    """Locate the folder of a bundled model; write it first, where it is not there yet.

    Args:
        name: one of BUNDLED.
    Raises:
        ModelError: the folder cannot be written.
    """
    if name == "tiny":
        return asset_path("tiny_model")
    from huggingface_hub import constants

    home = Path(constants.HF_HOME) / "cookbook"
    folder = home / f"{name}-{_digest()}"
    if folder.is_dir():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
        try:
            made.chmod(0o755)
            _write(made)
            os.rename(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        if folder.is_dir():  # another process was faster
            return folder
        fix = "Set HF_HOME to a folder that can be written."
        raise ModelError("base_model", f"{name} cannot be made", got=error, fix=fix) from error
    return folder


def _digest() -> str:
    """Names what the folder is made from, this code included."""
    paths = [*asset_path("tiny_model").iterdir(), *asset_path("tiny_vl").iterdir(), Path(__file__)]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _write(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for path in asset_path("tiny_vl").iterdir():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_tokenizer(folder, {name: config[f"{name}_token_id"] for name in _TOKENS})
    text = load_file(asset_path("tiny_model", "model.safetensors"))
    weights = {f"model.language_model.{name.removeprefix('model.')}": x for name, x in text.items()}
    weights |= _tower(config["vision_config"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, ids: dict[str, int]) -> None:
    """Write the tokenizer of "tiny" in which some ids are special tokens for images."""
    contents = {_CONTENT.get(name, f"<|{name}|>"): i for name, i in ids.items()}
    source = asset_path("tiny_model", "tokenizer.json")
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    names = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    names |= {i: content for content, i in contents.items()}
    tokenizer["model"]["vocab"] = {names[i]: i for i in sorted(names)}
    special = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [
        {**special, "id": i, "content": content} for content, i in contents.items()
    ]
    source = asset_path("tiny_model", "tokenizer_config.json")
    settings = json.loads(source.read_text(encoding="utf-8"))
    settings["extra_special_tokens"] += list(contents)
    for name, values in (("tokenizer", tokenizer), ("tokenizer_config", settings)):
        text = json.dumps(values, ensure_ascii=False, indent=2)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _tower(config: dict[str, Any]) -> dict[str, Any]:
    """The weights of the vision tower, by name: linear layers about keep their inputs' scale."""
    import numpy as np

    stream = np.random.RandomState(0)
    weights: dict[str, Any] = {}

    def draw(name: str, shape: tuple[int, ...], scale: float) -> None:
        """Uniform numbers with mean 0 and standard deviation `scale`."""
        unit = 12**0.5 * (stream.random_sample(shape) - 0.5)
        weights[_PREFIX + name] = (scale * unit).astype(np.float32)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        draw(f"{name}.weight", (rows, columns), gain / columns**0.5)
        draw(f"{name}.bias", (rows,), 0.1)

    def norm(name: str, size: int) -> None:
        weights[f"{_PREFIX}{name}.weight"] = np.ones(size, np.float32)
        weights[f"{_PREFIX}{name}.bias"] = np.zeros(size, np.float32)

    def merger(name: str, normed: int) -> None:
        norm(f"{name}.norm", normed)
        linear(f"{name}.linear_fc1", merged, merged, 2.0)
        linear(f"{name}.linear_fc2", config["out_hidden_size"], merged)

    width, inner = config["hidden_size"], config["intermediate_size"]
    merged = width * config["spatial_merge_size"] ** 2
    patch = config["in_channels"], config["temporal_patch_size"], *[config["patch_size"]] * 2
    draw("patch_embed.proj.weight", (width, *patch), 2 / math.prod(patch) ** 0.5)
    draw("patch_embed.proj.bias", (width,), 0.1)
    draw("pos_embed.weight", (config["num_position_embeddings"], width), 0.2)
    for layer in range(config["depth"]):
        block = f"blocks.{layer}."
        norm(f"{block}norm1", width)
        norm(f"{block}norm2", width)
        linear(f"{block}attn.qkv", 3 * width, width)
        linear(f"{block}attn.proj", width, width, 0.5)
        linear(f"{block}mlp.linear_fc1", inner, width)
        linear(f"{block}mlp.linear_fc2", width, inner, 0.5)
    merger("merger", width)
    for i in range(len(config["deepstack_visual_indexes"])):
        merger(f"deepstack_merger_list.{i}", merged)
    return weights
