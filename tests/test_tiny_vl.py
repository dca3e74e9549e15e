"""The bundled model that reads images, and the bundled datasets with images."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

from cookbook_core.backend.local.engine import Engine
from cookbook_core.backend.local.model.loading import load_base_model, resolve_model
from cookbook_core.data import load_rows
from cookbook_core.errors import ModelError
from cookbook_core.storage import bundled
from cookbook_core.token_set import label_distribution, single_tokens

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield Path(resolve_model("tiny-vl"))


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(load_base_model(str(folder), "cpu", "float32"))


@pytest.fixture(scope="module")
def text_engine():
    return Engine(load_base_model("tiny", "cpu", "float32"))


def test_the_folder_has_the_same_bytes_whenever_it_is_made(folder, tmp_path):
    assert bundled.bundled_model("tiny-vl") == folder
    bundled._write(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == "b81335cffb67e05e"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"base_model: tiny-vl cannot be made.*HF_HOME"):
        resolve_model("tiny-vl")


def test_text_is_that_of_the_text_model_bit_for_bit(engine, text_engine):
    tokenizer, own = engine.base.tokenizer(), text_engine.base.tokenizer()
    text = own.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 7? äöü 漢字 🙂"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = own(text, return_tensors="pt")["input_ids"]
    assert torch.equal(tokenizer(text, return_tensors="pt")["input_ids"], ids)
    with torch.no_grad():
        logits = [each.base.model(input_ids=ids).logits for each in (engine, text_engine)]
    assert torch.equal(*logits)
    assert len(tokenizer) == len(own) == logits[0].shape[-1]


def test_its_images_are_read_in_packed_rows(engine):
    """`tower()` compares with the model's own forward on its own processor's output."""
    tower = engine.scorer.tower()
    file = io.BytesIO()
    Image.linear_gradient("L").resize((8, 8)).save(file, "PNG")
    chunk = tower.reader.chunk(file.getvalue())
    assert chunk.expected_tokens == 4  # 32 x 32 pixels: a position for each 16 x 16
    rows = tower.features(chunk).rows
    assert rows.shape == (4, 192)
    assert rows.unique(dim=0).shape[0] == 4


def test_the_template_puts_an_image_where_it_stands(engine):
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    tokenizer = engine.base.tokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": parts}])["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words[:2] == ["<|im_start|>", "user"]
    assert words[3:6] == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


# ---- datasets ------------------------------------------------------------------------------------


def rows_of(name, split):
    columns = ("image", "text", "labels", "label_probs")
    return load_rows(f"tiny/{name}", columns, split, all_columns=True)


@pytest.mark.parametrize(
    ("name", "counts", "size"), [("digits", (1597, 200), 8), ("faces", (800, 200), 32)]
)
def test_rows_with_images_are_well_formed(name, counts, size, text_engine):
    both = [rows_of(name, split) for split in ("train", "test")]
    assert tuple(map(len, both)) == counts
    labels = both[0][0]["labels"]
    assert len(single_tokens(text_engine.base.tokenizer(), labels)) == len(labels)
    for row in both[0] + both[1]:
        assert row["labels"] == labels
        label_distribution(row, labels, "row")
    files = [{pixels_of(row).tobytes() for row in rows} for rows in both]
    assert not files[0] & files[1]
    assert pixels_of(both[1][0]).size == (size, size)


def pixels_of(row):
    return Image.open(io.BytesIO(row["image"].data()))


def test_faces_are_drawn_again_pixel_for_pixel():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import tiny_pictures
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    made = tiny_pictures.face_rows(20)
    for row, kept in zip(made, rows_of("faces", "train"), strict=False):
        drawn = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert drawn.tobytes() == pixels_of(kept).tobytes()
        assert {**row, "image": 0} == {**kept, "image": 0}
