"""Images in the data: chunks, keys, targets, truncation, files that cannot be read."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from types import SimpleNamespace
from typing import Any

from cookbook_core import datum_from_prompt_completion, datum_from_tokens_weights
from cookbook_core.backend.local.scoring import packing
from cookbook_core.backend.remote.convert import datums_out
from cookbook_core.backend.sampling_requests import sampling_request
from cookbook_core.datum_checks import check_data
from cookbook_core.datums import shift_sequence
from cookbook_core.errors import ConfigError, DatumError
from cookbook_core.image_files import MOST_PIXELS, rgb
from cookbook_core.images import ImageReader
from cookbook_core.tinker.sdk_objects import own_data
from cookbook_core.token_set import datum_from_token_set
from cookbook_core.types import (
    Datum,
    EncodedTextChunk,
    ImageChunk,
    ModelData,
    ModelInput,
    SamplingParams,
)
from tests.tiny_vision import picture

import numpy as np
import pytest
from PIL import Image, ImageDraw

PNG, OTHER = picture(0), picture(1)


def text(*tokens: int) -> EncodedTextChunk:
    return EncodedTextChunk(list(tokens))


def image(data: bytes = PNG, tokens: int | None = 3) -> ImageChunk:
    return ImageChunk(data, "png", tokens)


# ---- chunks --------------------------------------------------------------------------------------


def test_an_image_takes_its_expected_tokens():
    value = ModelInput([text(5, 6), image(), text(7)])
    assert value.length == 6
    assert value.ids() == [5, 6, 0, 0, 0, 7]
    assert value.append_int(8).ids(9) == [5, 6, 9, 9, 9, 7, 8]
    with pytest.raises(DatumError, match=r"chunks\[1\]"):
        value.to_ints()
    with pytest.raises(ValueError, match="expected_tokens"):  # as the SDK's
        _ = image(tokens=None).length


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("data", {"data": b""}),
        ("data", {"data": [1, 2]}),
        ("format", {"format": "gif"}),
        ("expected_tokens", {"expected_tokens": 0}),
        ("expected_tokens", {"expected_tokens": 2.5}),
    ],
)
def test_a_bad_chunk_names_its_field(field, values):
    good: dict[str, Any] = {"data": PNG, "format": "png", "expected_tokens": 3}
    with pytest.raises(DatumError, match=rf"ImageChunk\.{field}"):
        ImageChunk(**{**good, **values})


def test_keys_tell_images_apart_and_equal_ones_in_a_row():
    one, same, other = (ModelInput([text(5), c, text(6)]) for c in (image(), image(), image(OTHER)))
    one_keys = one.keys()
    assert one_keys == same.keys() != other.keys()
    assert [key < 0 for key in one_keys] == [False, True, True, True, False]
    twice = ModelInput([text(5), image(), image(), text(6)]).keys()
    assert twice != ModelInput([text(5), image(tokens=6), text(6)]).keys()
    assert twice[1:4] == twice[4:7]


def test_a_shared_image_is_laid_out_once_and_never_cut():
    stem = [text(*range(1, 20)), image(tokens=20)]
    a, b = (ModelInput([*stem, text(*end)]).keys() for end in ((7, 8), (9, 1)))
    c = ModelInput([stem[0], image(OTHER, 20), text(7, 8)]).keys()
    layout = packing.lay_out([a, b, c])
    assert len(layout.tokens) == 19 + (20 + 2 + 2) + (20 + 2)
    for keys, rows in zip((a, b, c), layout.rows, strict=True):
        assert layout.tokens[rows].tolist() == keys


# ---- datums --------------------------------------------------------------------------------------


def test_positions_of_an_image_have_target_0_and_weight_0():
    prompt = ModelInput([text(5), image(), text(6)])
    datum = datum_from_prompt_completion(prompt, [7, 8], score_prompt=False)
    assert datum.model_input.ids() == [5, 0, 0, 0, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [0, 0, 0, 6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 0, 0, 0, 1, 1]
    assert datum.loss_fn_inputs["score_mask"].tolist() == [0, 0, 0, 0, 1, 1]
    check_data([datum], vocab_size=10)
    scored = datum_from_token_set(prompt, [3, 4])
    assert scored.loss_fn_inputs["target_tokens"].shape == [5, 2]
    assert scored.loss_fn_inputs["weights"].tolist() == [0, 0, 0, 0, 1]
    check_data([scored], vocab_size=10)


@pytest.mark.parametrize(
    ("length", "kept"),
    [(9, 9), (8, 8), (7, 7), (6, 2), (5, 2), (3, 2), (2, 2)],
)
def test_truncation_never_cuts_an_image(length, kept):
    """And drops one at the end: 2 tokens, an image of 4 positions, 3 tokens."""
    value = ModelInput([text(5, 6), image(tokens=4), text(7, 8, 9)])
    cut = value.first(length)
    assert cut.keys() == value.keys()[:kept]
    datum = datum_from_tokens_weights(value, [1, 1, 0, 0, 0, 0, 1, 1, 1], length)
    assert datum.model_input.length == kept - 1


def test_text_alone_gives_the_same_datum_in_either_form():
    ids = [5, 6, 7, 8]
    assert datum_from_prompt_completion(ids[:2], ids[2:]) == datum_from_prompt_completion(
        ModelInput.from_ints(ids[:2]), ids[2:]
    )


def test_a_sequence_that_ends_with_an_image_is_refused():
    with pytest.raises(DatumError, match=r"tokens\.chunks\[1\].*ends with an image"):
        shift_sequence(ModelInput([text(5), image()]))


@pytest.mark.parametrize(
    ("where", "chunks"),
    [
        (r"\.chunks\[1\]\.expected_tokens: missing", [text(5), image(PNG, None)]),
        (r"\.chunks\[1\]: an image that alone", [text(5), image(PNG, 33)]),
        (r"\[4\]: token id outside", [text(5), image(), text(10)]),
    ],
)
def test_bad_images_in_a_batch_are_named(where, chunks):
    good = Datum(ModelInput([text(5)]), {"target_tokens": [0]})
    bad = Datum(ModelInput(chunks), {"target_tokens": [0] * 5})
    with pytest.raises(DatumError, match=r"data\[1\]\.model_input" + where):
        check_data([good, bad], vocab_size=10, max_context_length=32)


def test_a_weight_on_an_image_is_refused():
    value = ModelInput([text(5, 6), image(), text(7)])
    inputs = {"target_tokens": [6, 0, 0, 0, 7, 8], "weights": [1, 0, 0, 2, 1, 1]}
    with pytest.raises(DatumError, match=r'data\[0\]\.loss_fn_inputs\["weights"\]\[3\]'):
        check_data([Datum(value, inputs)], vocab_size=10)
    inputs["weights"] = [1, 0, 0, 0, 1, 1]
    check_data([Datum(value, inputs)], vocab_size=10)


MODEL = ModelData(vocab_size=10, max_context_length=32)


@pytest.mark.parametrize(
    ("where", "chunks", "more"),
    [
        (r"sample\.prompt\.chunks\[1\]: the prompt ends with an image", [text(5), image()], ()),
        (r"sample\.prompt\.chunks\[1\]\.expected_tokens", [text(5), image(PNG, None), text(6)], ()),
        (r"sample\.prompt\[4\]: token id outside", [text(5), image(), text(10)], ()),
        (r"sample\.topk_prompt_logprobs", [text(5), image(), text(6)], (False, 2)),
        (r"do not fit the model's context", [text(5), image(PNG, 40), text(6)], ()),
    ],
)
def test_bad_prompts_are_refused(where, chunks, more):
    params = SamplingParams(max_tokens=4)
    with pytest.raises((DatumError, ConfigError), match=where):
        sampling_request(MODEL, ModelInput(chunks), 1, params, *(more or (False, 0)))


# ---- the SDK's objects ---------------------------------------------------------------------------


def test_the_sdks_datum_is_converted_and_back():
    sdk = pytest.importorskip("tinker")
    chunk = sdk.types.ImageChunk(data=PNG, format="png", expected_tokens=3)
    assert sdk.types.ImageChunk.model_validate_json(chunk.model_dump_json()) == chunk
    theirs = sdk.types.ModelInput(chunks=[sdk.EncodedTextChunk(tokens=[5, 6]), chunk,
                                          sdk.EncodedTextChunk(tokens=[7])])  # fmt: skip
    targets = sdk.TensorData.from_numpy(np.array([6, 0, 0, 0, 7, 8]))
    (own,) = own_data([sdk.Datum(model_input=theirs, loss_fn_inputs={"target_tokens": targets})])
    assert own.model_input == ModelInput([text(5, 6), image(), text(7)])
    assert own.model_input.length == theirs.length == 6
    (back,) = datums_out(sdk.types, [own])
    assert back.model_input == theirs


def test_what_is_sent_to_a_service_has_the_image_as_it_is():
    """Without the SDK: the chunks that are handed to its classes."""

    def made(**fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    names = ("ModelInput", "ImageChunk", "EncodedTextChunk", "Datum", "TensorData")
    types = SimpleNamespace(**dict.fromkeys(names, made))
    value = ModelInput([text(5), image(), text(6)])
    (out,) = datums_out(types, [Datum(value, {"target_tokens": [0, 0, 0, 6, 7]})])
    _, sent, last = out.model_input.chunks
    assert vars(sent) == {"data": PNG, "format": "png", "expected_tokens": 3}
    assert last.tokens == [6]


def test_base64_is_taken_as_the_sdk_takes_it():
    assert ImageChunk(base64.b64encode(PNG).decode(), "png").data == PNG  # type: ignore[arg-type]


# ---- files ---------------------------------------------------------------------------------------


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def block(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(b"")) + block(b"IEND", b"")


BROKEN = {
    "not an image": b"nothing of the kind",
    "cut short": picture(2, (320, 320))[:-700],
    "a JPEG cut short": picture(2, (320, 320), "JPEG")[:2000],
    "no pixels": claims(8, 8),
    "too many pixels": claims(MOST_PIXELS, 2),
    "far too many pixels": claims(1 << 17, 1 << 17),
    "a GIF": picture(0, form="GIF"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_read_are_refused_by_place(name):
    kind = "jpeg" if "JPEG" in name else "png"
    with pytest.raises(DatumError, match=r"^data\[3\]\.model_input\.chunks\[1\]: ") as error:
        rgb(ImageChunk(BROKEN[name], kind), "data[3].model_input.chunks[1]")
    assert ("too many pixels" in error.value.what) == ("many" in name)


def test_a_chunk_that_names_another_format_is_refused():
    with pytest.raises(DatumError, match="Expected PNG, got a JPEG file"):
        rgb(ImageChunk(picture(0, form="JPEG"), "png"), "image")


def test_exif_orientation_is_applied():
    """6: the camera was turned; the top of the picture is at the right of the stored pixels."""
    stored = Image.new("RGB", (16, 8), "black")
    ImageDraw.Draw(stored).rectangle((8, 0, 15, 7), fill="white")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    turned = np.asarray(rgb(ImageChunk(file.getvalue(), "png"), "image"))
    assert turned.shape == (16, 8, 3)
    assert turned[:8].max() == 0
    assert turned[8:].min() == 255


def test_transparency_and_grey_become_rgb():
    for mode in ("RGBA", "L", "P", "1"):
        file = io.BytesIO()
        Image.new(mode, (8, 8)).save(file, "PNG")
        assert rgb(ImageChunk(file.getvalue(), "png"), "image").mode == "RGB"


class Processor:
    """Four tokens and a tensor for each image; counts its calls."""

    image_token = "<image>"
    tokenizer = SimpleNamespace(all_special_ids=[9], added_tokens_decoder={})

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: Any, images: Any, **_: Any) -> Any:
        self.calls += 1
        if images[0].width > 100:
            raise ValueError("aspect ratio")
        ids = np.array([[1, 9, 9, 9, 9, 1]])
        return {"input_ids": ids, "pixel_values": np.asarray(images[0], dtype=np.float32)}


def test_a_reader_counts_once_and_leaves_out_text_around():
    processor = Processor()
    reader = ImageReader(processor)
    chunk = reader.chunk(PNG)
    assert (chunk.format, chunk.expected_tokens) == ("png", 4)
    reader.check(chunk, "image")
    reader.check(chunk, "image")
    assert reader.pixels(chunk).ids == (9, 9, 9, 9)
    assert processor.calls == 1


@pytest.mark.parametrize("count", [3, None])
def test_another_number_of_positions_is_refused(count):
    with pytest.raises(DatumError, match=r"data\[0\]\.expected_tokens.*Expected 4"):
        ImageReader(Processor()).check(image(PNG, count), "data[0]")


def test_what_the_processor_refuses_is_named():
    with pytest.raises(DatumError, match=r"spot: refused.*160 x 40 pixels \(aspect ratio\)"):
        ImageReader(Processor()).chunk(picture(0, (160, 40)), "spot")


def test_pixels_are_kept_up_to_a_bound(monkeypatch):
    monkeypatch.setattr("cookbook_core.images.KEPT_BYTES", 3 * 40 * 40 * 3 * 4)
    processor = Processor()
    reader = ImageReader(processor)
    chunks = [reader.chunk(picture(seed)) for seed in range(5)]
    assert sum(p.nbytes for p in reader._kept.values()) == 3 * 40 * 40 * 3 * 4
    for chunk in chunks:  # counts stay known
        reader.check(chunk, "image")
    assert processor.calls == 5


def test_positions_that_an_image_only_claims_take_no_memory():
    """A few bytes may say 2^40 positions; nothing of that size is made to refuse them."""
    chunks = [EncodedTextChunk([1]), ImageChunk(b"x", "png", 1 << 40), EncodedTextChunk([2])]
    datum = Datum(ModelInput(chunks), {"target_tokens": [1]})
    with pytest.raises(DatumError, match=r"chunks\[1\]: an image that alone is longer"):
        check_data([datum], vocab_size=100, max_context_length=64)
