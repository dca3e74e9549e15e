"""Rows with images: read, counted by size, rendered as the model's own processor does, refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from cookbook_core import chat, clients, runs
from cookbook_core.backend.local.model.loading import load_base_model
from cookbook_core.data import load_rows
from cookbook_core.data.images import with_image_files
from cookbook_core.datum_checks import check_data
from cookbook_core.doctor import examine
from cookbook_core.errors import ConfigError, DataError, DatumError
from cookbook_core.image_files import ImageFile, image_file
from cookbook_core.images import ImageReader, ModelImages, load_processor
from cookbook_core.types import ImageChunk, ModelInput, SampledSequence
from recipes import bradley_terry, dpo, grpo, kto, sft, token_set_kl
from tests.test_images import BROKEN, claims
from tests.tiny_vision import FAMILIES, picture, write

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first else '' }}{{ m['role'] }}: "
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% elif p['type'] == 'text' %}"
    "{{ p['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Shows texts as parts alone, as SmolVLM's and LLaVA's do."""
A, B = picture(0), picture(1, (64, 32))


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: Any, small_tokenizer: Any) -> Callable[[str], Any]:
    """The tokenizer of a tiny model of a family, with its images and a chat template."""
    made: dict[str, Any] = {}

    def tokenizer(family: str) -> Any:
        if family not in made:
            folder = write(family, tmp_path_factory.mktemp(family), small_tokenizer)
            own = transformers.AutoTokenizer.from_pretrained(folder)
            own.images = ModelImages(folder)
            place = own.images.reader().placeholder
            place = f"<|vision_start|>{place}<|vision_end|>" if "qwen" in family else place
            own.chat_template = TEMPLATE.replace("IMAGE", place)
            Path(folder, "chat_template.jinja").write_text(own.chat_template, encoding="utf-8")
            made[family] = own
        return made[family]

    return tokenizer


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(size: tuple[int, int] = (64, 32), form: str = "JPEG") -> bytes:
    """An image that its EXIF orientation turns by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(Image.open(io.BytesIO(picture(3, size))), form, exif=exif)


def user(*parts: Any) -> dict[str, Any]:
    texts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": texts}


IMAGE = {"type": "image"}
ANSWER = {"role": "assistant", "content": "yes"}


# ---- rendered as the processor does --------------------------------------------------------------


def own_ids(tokenizer: Any, messages: list[dict[str, Any]], files: list[bytes], **more: Any) -> Any:
    """The ids of the model's own processor for a conversation."""
    processor = tokenizer.images.reader()._processor
    parts = [
        {**m, "content": [{"type": "text", "text": m["content"]}]}
        if isinstance(m["content"], str)
        else m
        for m in messages
    ]
    text = tokenizer.apply_chat_template(parts, tokenize=False, **more)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    images = [images] if images else None
    return list(processor(text=[text], images=images, add_special_tokens=False)["input_ids"][0])


def ids_of(tokenizer: Any, value: Any) -> list[int]:
    """Token ids with the images written out."""
    if isinstance(value, list):
        return value
    reader, ids = tokenizer.images.reader(), []
    for chunk in value.chunks:
        ids += reader.pixels(chunk).ids if isinstance(chunk, ImageChunk) else chunk.tokens
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_prompts_have_the_processors_ids(family, tokenizer_of):
    """Of a prompt, with a completion and in several turns; with 0, 1 and 2 images of two sizes,
    between line breaks, which Gemma's own line breaks may merge with, and directly in a row."""
    tokenizer = tokenizer_of(family)
    reader = tokenizer.images.reader()
    for content, files in (
        (["no image"], []),
        ([IMAGE, "\nwhat?"], [B]),
        (["a\n", IMAGE, "\n\n", IMAGE, "b"], [A, B]),
        ([IMAGE, IMAGE, "\n"], [B, A]),
    ):
        prompt = [user(*content)]
        given: dict[str, Any] = {"images": files} if files else {}
        want = own_ids(tokenizer, prompt, files, add_generation_prompt=True)
        found = chat.render_prompt(tokenizer, prompt, **given)
        assert isinstance(found, ModelInput) == bool(files)
        assert ids_of(tokenizer, found) == want
        assert len(found) == len(want)
        first, answer = chat.render_completion(tokenizer, prompt, [ANSWER], **given)
        whole = own_ids(tokenizer, [*prompt, ANSWER], files)
        assert ids_of(tokenizer, first) == want
        assert ids_of(tokenizer, first) + answer == whole[: len(want) + len(answer)]
        turns = [*prompt, ANSWER, user("more"), ANSWER]
        tokens, weights = chat.render_messages(tokenizer, turns, "all", **given)
        whole = own_ids(tokenizer, turns, files)
        assert ids_of(tokenizer, tokens) == whole
        assert len(weights) == len(tokens) == len(whole)
        assert sum(weights) == 2 * (len("yes") + 1)
    assert reader.longest == max(len(reader.pixels(reader.chunk(data)).ids) for data in (A, B))


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_by_size_are_those_of_the_pixels(family, tokenizer_of):
    reader: ImageReader = tokenizer_of(family).images.reader()
    for size in ((40, 40), (64, 32), (32, 64), (128, 48), (200, 200)):
        data = picture(5, size)
        chunk = reader.stored(image_file(data, "here"))
        assert chunk.length == len(reader.pixels(ImageChunk(data, "png")).ids)
        reader.check(chunk, "here")


def test_images_without_places_go_before_the_first_users_text(tokenizer_of):
    tokenizer = tokenizer_of("qwen3_vl")
    plain = [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]
    placed = [plain[0], user(IMAGE, IMAGE, "what?")]
    found = [chat.render_prompt(tokenizer, m, images=[A, B]) for m in (plain, placed)]
    assert found[0] == found[1]
    text = chat.render_prompt(tokenizer, "what?", images=[A])
    assert [type(c).__name__ for c in text.chunks] == ["StoredImage", "EncodedTextChunk"]


def test_a_smolvlm_needs_no_package_for_its_videos_alone(tokenizer_of):
    from transformers.models.smolvlm import processing_smolvlm

    before = vars(processing_smolvlm)["num2words"]
    load_processor(tokenizer_of("smolvlm").name_or_path)
    assert vars(processing_smolvlm)["num2words"] is before


# ---- reading -------------------------------------------------------------------------------------


def saved(tmp_path: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def the_files(rows: list[Any]) -> list[ImageFile]:
    return [file for row in rows for file in chat.template_arguments(row).get("images", [])]


def test_a_value_may_be_a_path_bytes_a_dict_or_a_pil_image(tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    forms = ["a.png", A, {"bytes": A, "path": "x.png"}, {"bytes": None, "path": "a.png"}]
    for value in forms:
        row = with_image_files("rows[0]", {"prompt": "p", "image": value}, tmp_path)
        assert row["image"].data() == A
    row = with_image_files("rows[0]", {"images": [Image.open(io.BytesIO(A))]}, tmp_path)
    same = Image.open(io.BytesIO(row["images"][0].data()))
    assert same.tobytes() == Image.open(io.BytesIO(A)).tobytes()


def test_columns_are_read_beside_the_others_from_jsonl_and_parquet(tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    rows = [{"prompt": "p", "image": "a.png"}, {"prompt": "q", "other": 1}]
    first, second = load_rows(saved(tmp_path, *rows), ["prompt"])
    assert [set(first), set(second)] == [{"prompt", "image"}, {"prompt"}]
    table = pa.Table.from_pylist(
        [{"prompt": "p", "images": [{"bytes": x, "path": "x.png"} for x in (A, B)]}]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    loaded = load_rows(str(tmp_path / "rows.parquet"), ["prompt"])
    assert [file.data() for file in the_files(loaded)] == [A, B]
    assert [file.place for file in the_files(loaded)] == [
        "rows.parquet[0], column images[0]",
        "rows.parquet[0], column images[1]",
    ]


def test_the_datasets_librarys_images_are_not_decoded(tmp_path, monkeypatch):
    import datasets

    jpeg = picture(4, form="JPEG")
    features = datasets.Features(
        prompt=datasets.Value("string"), images=datasets.List(datasets.Image())
    )
    rows = {"prompt": ["p"], "images": [[{"bytes": jpeg, "path": None}] * 2]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    loaded = load_rows(str(tmp_path / "set"), ["prompt"])
    assert [file.data() for file in the_files(loaded)] == [jpeg, jpeg]


def test_placeholders_are_filled_in_order_and_parts_carry_their_own(tmp_path):
    for name, data in (("a.png", A), ("b.png", B)):
        (tmp_path / name).write_bytes(data)
    own = {"type": "image", "path": "b.png"}
    rows = [
        {"messages": [user(IMAGE, "x"), ANSWER, user("y", IMAGE), ANSWER],
         "images": ["a.png", "b.png"]},
        {"messages": [user(own, "x"), ANSWER]},
    ]  # fmt: skip
    first, second = load_rows(saved(tmp_path, *rows), ["messages"])
    held = [part["image"].data() for m in (0, 2) for part in first["messages"][m]["content"]
            if part["type"] == "image"]  # fmt: skip
    assert held == [A, B]
    assert "images" not in first
    assert second["messages"][0]["content"][0]["image"].data() == B
    apart = chat.answers_apart([first])  # the first answer comes before the second image
    assert [len(row["messages"]) for row in apart] == [2, 4]


def test_exif_orientation_is_applied_and_other_bytes_are_unchanged(tokenizer_of):
    """A turned file is written anew as a PNG, upright: the only bytes that change."""
    reader: ImageReader = tokenizer_of("qwen3_vl").images.reader()
    for form in ("JPEG", "PNG"):
        data = turned(form=form)
        file = image_file(data, "here")
        assert (file.width, file.height, file.format) == (32, 64, "png")
        upright = Image.open(io.BytesIO(file.data()))
        want = Image.open(io.BytesIO(data)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
        assert upright.tobytes() == want.tobytes()
        assert not upright.getexif()
        reader.check(reader.stored(file), "here")
    for data in (picture(3, form="JPEG"), A):
        assert image_file(data, "here").data() == data


def test_other_formats_are_written_as_png():
    file = image_file(picture(6, form="WEBP"), "here")
    assert file.format == "png"
    assert Image.open(io.BytesIO(file.data())).format == "PNG"


def test_images_are_read_when_their_chunk_is_used(tmp_path, tokenizer_of, monkeypatch):
    (tmp_path / "a.png").write_bytes(A)
    reads: list[Path] = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: reads.append(p) or whole(p))
    (row,) = load_rows(saved(tmp_path, {"prompt": "p", "image": "a.png"}), ["prompt"])
    tokenizer = tokenizer_of("qwen3_vl")
    prompts = [
        chat.render_prompt(tokenizer, row["prompt"], **chat.template_arguments(row))
        for _ in range(2)
    ]
    assert not reads
    (chunk,) = prompts[0].images
    assert (chunk.key, chunk.data) == (ImageChunk(A, "png").key, A)
    assert prompts[1].keys() == prompts[0].keys()
    assert len(reads) == 2  # for the key once, for the data


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("cannot be read any more", lambda path: path.unlink()),
        ("not the one that was counted", lambda path: path.write_bytes(B)),
    ],
)
def test_a_file_that_is_gone_or_changed_names_its_row(what, change, tmp_path, tokenizer_of):
    (tmp_path / "a.png").write_bytes(A)
    (row,) = load_rows(saved(tmp_path, {"prompt": "p", "image": "a.png"}), ["prompt"])
    reader = tokenizer_of("qwen3_vl").images.reader()
    chunk = reader.stored(row["image"])
    change(tmp_path / "a.png")
    with pytest.raises(DatumError, match=rf"rows.jsonl:1, column image: .*{what}"):
        reader.check(chunk, "data[0].model_input.chunks[0]")


@pytest.mark.parametrize("name", [name for name in BROKEN if name not in ("a GIF", "no pixels")])
def test_a_broken_file_names_its_row_when_rows_are_read(name, tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    (tmp_path / "bad.png").write_bytes(BROKEN[name])
    path = saved(tmp_path, {"prompt": "p", "image": "a.png"}, {"prompt": "p", "image": "bad.png"})
    with pytest.raises(DataError, match=r"^rows.jsonl:2, column image: ") as error:
        load_rows(path, ["prompt"])
    assert ("too many pixels" in error.value.what) == ("many" in name)


def test_a_file_broken_inside_names_its_row_when_it_is_used(tokenizer_of):
    file = image_file(claims(16, 16), "rows.jsonl:7, column image")
    reader = tokenizer_of("qwen3_vl").images.reader()
    with pytest.raises(DatumError, match=r"^rows.jsonl:7, column image: the image cannot be read"):
        reader.check(reader.stored(file), "data[0].model_input.chunks[1]")


@pytest.mark.parametrize(
    ("where", "row"),
    [
        ("column image: no such image file", {"image": "gone.png"}),
        ("column image: not a file", {"image": "https://host/a.png"}),
        ("column image: not an image", {"image": 7}),
        ("column images: not a list", {"images": "a.png"}),
        ("column images: a column image beside it", {"image": "a.png", "images": ["a.png"]}),
        (r"column prompt: another number of placeholders", {"prompt": [user(IMAGE)]}),
        (r"column prompt: another number of placeholders",
         {"prompt": [user(IMAGE, IMAGE)], "image": "a.png"}),
        (r"column prompt\[0\] content\[0\]: no such", {"prompt": [user({**IMAGE, "path": "c"})]}),
    ],
)  # fmt: skip
def test_bad_rows_name_row_and_column(where, row, tmp_path):
    (tmp_path / "a.png").write_bytes(A)
    with pytest.raises(DataError, match=rf"^rows.jsonl:1, {where}"):
        load_rows(saved(tmp_path, {"prompt": "p", **row}), ["prompt"])


def test_what_pillow_and_processors_refuse_names_the_row(tmp_path, tokenizer_of):
    """A broken EXIF block; a shape that the model's processor does not take."""
    picture = Image.open(io.BytesIO(A))
    (tmp_path / "a.png").write_bytes(file_of(picture, exif=b"Exif\0\0not tiff"))
    with pytest.raises(DataError, match=r"^rows.jsonl:1, column image: the image cannot be read"):
        load_rows(saved(tmp_path, {"prompt": "p", "image": "a.png"}), ["prompt"])
    (tmp_path / "a.png").write_bytes(file_of(picture.resize((4000, 16))))
    (row,) = load_rows(saved(tmp_path, {"prompt": "p", "image": "a.png"}), ["prompt"])
    refused = r"^rows.jsonl:1, column image: refused by .* 4000 x 16 pixels"
    with pytest.raises(DatumError, match=refused):
        tokenizer_of("qwen3_vl").images.reader().stored(chat.template_arguments(row)["images"][0])


def test_a_part_with_bytes_and_a_path_is_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(B)
    part = {**IMAGE, "bytes": A, "path": "a.png"}
    row = with_image_files("row", {"prompt": [user(part)]}, tmp_path)
    assert row["prompt"][0]["content"][0]["image"].data() == A


def test_a_png_may_be_turned_by_another_block_than_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngInfo()
    profile = f"\nexif\n{len(exif.tobytes()):8d}\n{exif.tobytes().hex()}\n"
    info.add_text("Raw profile type exif", profile)
    file = image_file(file_of(Image.new("RGB", (40, 20)), pnginfo=info), "image")
    assert (file.width, file.height, file.rewritten) == (20, 40, True)


def test_an_answer_may_have_parts_of_text_and_no_image(tokenizer_of):
    tokenizer, prompt = tokenizer_of("qwen3_vl"), [user("p")]
    parts = [{"type": "text", "text": "yes"}]
    answer = {"role": "assistant", "content": parts}
    want = chat.render_completion(tokenizer, prompt, [ANSWER])
    assert chat.render_completion(tokenizer, prompt, [answer]) == want
    seen = {"role": "assistant", "content": [*parts, {**IMAGE, "image": A}]}
    with pytest.raises(DataError, match=r"completion\[0\] content: an image in an answer"):
        chat.render_completion(tokenizer, prompt, [seen])
    with pytest.raises(DataError, match=r"messages\[1\] content: an image in an answer"):
        chat.render_messages(tokenizer, [*prompt, seen])
    reply = {"role": "user", "content": seen["content"]}
    with pytest.raises(DataError, match=r"reply\[0\] content: an image in an answer"):
        chat.reply_tokens(tokenizer, prompt, [5], [reply])


@pytest.mark.parametrize(
    ("text", "images", "what"),
    [
        ("<|image_pad|>", [A], "another number of images.*Expected 2 images, got 1"),
        ("a <|image_pad|>", [], "placeholder of an image, and the row has none"),
    ],
)
def test_placeholders_written_into_texts_are_refused(text, images, what, tokenizer_of):
    tokenizer = tokenizer_of("qwen3_vl")
    tokenizer.images.token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with pytest.raises(DataError, match=f"^image: .*{what}"):
        chat.render_prompt(tokenizer, [{"role": "user", "content": text}], images=images)


def test_a_template_that_shows_no_images_is_refused(tokenizer_of):
    tokenizer = tokenizer_of("llava")
    shown = tokenizer.chat_template
    tokenizer.chat_template = shown.replace("<image>", "")
    with pytest.raises(DataError, match=r"^image: .*Expected 0 images, got 1"):
        chat.render_prompt(tokenizer, [user("a")], images=[A])
    tokenizer.chat_template = shown


def test_a_model_that_reads_text_alone_names_the_row(tmp_path, model_folder):
    (tmp_path / "a.png").write_bytes(A)
    tokenizer = load_base_model(model_folder("qwen3"), "cpu").tokenizer()
    rows = load_rows(saved(tmp_path, {"prompt": "p", "image": "a.png"}), ["prompt"])
    said = r"rows.jsonl:1, column image: .*got 1 images .*reads text only"
    with pytest.raises(DataError, match=said):
        clients.with_prompt_tokens(rows, tokenizer, 100)


# ---- recipes -------------------------------------------------------------------------------------

PAIR = {"chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "no"}]}
QUESTION = [user(IMAGE, "what?")]
CONFIG = token_set_kl.Config(labels=("a", "b"))


def sampled(rows: list[Any], tokenizer: Any) -> Any:
    (row,) = clients.with_prompt_tokens(rows, tokenizer, 100)
    ids, logprobs = np.array([50, 2]), np.array([-1.0, -1.0])
    group = [SampledSequence("stop", str(i), ids, logprobs) for i in range(2)]
    return grpo.build_data([row], [group], [[1.0, 0.0]], grpo.Config())


RECIPES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "token_set_kl": (
        {"text": "what?", "label_probs": [0.3, 0.7]},
        ("text", "label_probs"),
        lambda rows, t: token_set_kl.build_data(rows, t, CONFIG, "train")[0],
    ),
    "sft": (
        {"prompt": QUESTION, "completion": [ANSWER]},
        ("prompt", "completion"),
        lambda rows, t: sft.build_data(rows, t, 100, "last")[0],
    ),
    "sft, messages": (
        {"messages": [*QUESTION, ANSWER]},
        ("messages",),
        lambda rows, t: sft.build_data(rows, t, 100, "all")[0],
    ),
    "dpo": (
        {"prompt": QUESTION, **PAIR},
        chat.PAIRS,
        lambda rows, t: dpo.build_pairs(rows, t, 100)[0],
    ),
    "dpo, whole conversations": (
        {name: [*QUESTION, *answer] for name, answer in PAIR.items()},
        chat.PAIRS,
        lambda rows, t: dpo.build_pairs(rows, t, 100)[0],
    ),
    "grpo": ({"prompt": QUESTION, "answer": "a"}, ("prompt", "answer"), sampled),
    "bradley_terry": (
        {"prompt": QUESTION, **PAIR},
        chat.PAIRS,
        lambda rows, t: bradley_terry.build_pairs(
            rows, bradley_terry.Judge(t, "good?", ("a", "b")), 100
        )[0],
    ),
    "kto": (
        {"prompt": QUESTION, "completion": [ANSWER], "label": True},
        chat.LABELLED,
        lambda rows, t: kto.build_data(rows, t, 100)[0],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_datums_of_rows_with_images(name, tmp_path, tokenizer_of):
    """Each has the image whole, with no target and no weight at it, and is what doctor examines."""
    (tmp_path / "a.png").write_bytes(A)
    row, columns, build = RECIPES[name]
    tokenizer = tokenizer_of("qwen3_vl")
    data = build(load_rows(saved(tmp_path, {**row, "image": "a.png"}), columns), tokenizer)
    check_data(data, vocab_size=len(tokenizer))
    for datum in data:
        (image,) = datum.model_input.images
        at = np.flatnonzero(np.array(datum.model_input.keys()) < 0)
        assert len(at) == image.length == 4
        assert image.data == A
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        assert name in ("token_set_kl", "bradley_terry") or not targets[at[0] - 1 : at[-1]].any()
        assert not datum.loss_fn_inputs["weights"].to_numpy()[at[0] - 1 : at[-1]].any()
    if "sft" in name:
        report = examine(sft.sft_loss, data * 4)
        assert report.ok, str(report)


def test_rows_that_an_image_makes_too_long_are_said_to_be(tmp_path, tokenizer_of):
    (tmp_path / "a.png").write_bytes(picture(9, (64, 64)))
    rows = load_rows(saved(tmp_path, {"messages": [*QUESTION, ANSWER], "image": "a.png"}),
                     ("messages",))  # fmt: skip
    tokenizer = tokenizer_of("qwen3_vl")
    assert sft.build_data(rows, tokenizer, 20, "last") == ([], [])
    client = SimpleNamespace(get_tokenizer=lambda: tokenizer)
    with runs.Run.open("sft", sft.Config(log_path=str(tmp_path / "run")), 1) as run:
        run.tokenizer(cast("Any", client))
        with pytest.raises(ConfigError, match="longer than 20 tokens; images take up to 16"):
            run.report_rows("sequences", 0, 0, 1, 20)
