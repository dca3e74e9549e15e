"""The bundled model folder and example datasets: they load, agree, and can be made again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "cookbook_core" / "assets"
MODEL = ASSETS / "tiny_model"
DATA = ASSETS / "data"
SPLITS = ("sft", "dpo", "grpo", "token_set_kl", "multiple_choice", "calculator")

pytest.importorskip("transformers")


def plain(value):
    """Returns the text of a turn that is a list of one message; anything else as it is."""
    one_turn = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
    return value[0]["content"] if one_turn else value


def read(name: str) -> list[dict]:
    with open(DATA / f"{name}.jsonl", encoding="utf-8") as file:
        return [{k: plain(v) for k, v in json.loads(line).items()} for line in file]


def user_turn(row: dict) -> str:
    """Returns the column that holds the prompt: the first one of every dataset."""
    return next(iter(row.values()))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def scripts():
    """Returns the modules that made the assets."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import tiny_data
        import tiny_text
        import tiny_words
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return {"data": tiny_data, "text": tiny_text, "words": tiny_words}


def render(tokenizer, messages: list[dict], **options) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer.encode(rendered, add_special_tokens=False)


# ---- the model folder ----------------------------------------------------------------------


def test_weights_are_small_float32_and_finite(model):
    import torch

    assert (MODEL / "model.safetensors").stat().st_size < 12_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_one_bos_and_eos_policy(tokenizer, model):
    assert tokenizer.bos_token is None
    assert model.config.bos_token_id is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == plain
    assert not (MODEL / "generation_config.json").exists()


def test_model_and_tokenizer_agree_on_sizes(tokenizer, model):
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512


@pytest.mark.parametrize(
    "string",
    [
        "hello world",
        " yes",
        "12 + 7 = 19",
        "äöü ñ 漢字 🙂",
        "a\n\n  b\t\u00a0c",
        "x" * 50,
        "\x00\x7f",
    ],
)
def test_any_text_round_trips(tokenizer, string):
    ids = tokenizer.encode(string, add_special_tokens=False)
    assert tokenizer.decode(ids) == string
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_digits_are_split_and_task_words_are_not(tokenizer, scripts):
    assert len(tokenizer.encode("2026", add_special_tokens=False)) == 4
    for word in scripts["words"].single_token_words():
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word


# ---- the chat template ---------------------------------------------------------------------


@pytest.mark.parametrize("completion", ["19", " yes", "\nleading newline", "\n\n  two", "漢字 🙂"])
def test_prompt_tokens_are_a_prefix_of_the_whole(tokenizer, completion):
    user = {"role": "user", "content": "What is 12 + 7?"}
    assistant = {"role": "assistant", "content": completion}
    prompt = render(tokenizer, [user], add_generation_prompt=True)
    answer = tokenizer.encode(completion, add_special_tokens=False)
    whole = render(tokenizer, [user, assistant])
    assert whole == [*prompt, *answer, tokenizer.eos_token_id]


def test_assistant_masks_mark_answers_with_their_eos(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "copy: red cat"},
        {"role": "assistant", "content": "red cat"},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "red cat<|im_end|>2<|im_end|>"


def test_training_text_is_rendered_as_the_template_does(tokenizer, scripts):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_tiny_model
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    source = scripts["text"].TrainingText(set(), set())
    chats = make_tiny_model.conversations(source, tokenizer, seed=3)
    for _ in range(50):
        ids, weights = next(chats)
        string = tokenizer.decode(ids)
        pieces = string.removeprefix("<|im_start|>").split("\n<|im_start|>")
        messages = [
            dict(
                zip(
                    ("role", "content"),
                    piece.removesuffix("<|im_end|>").split("\n", 1),
                    strict=True,
                )
            )
            for piece in pieces
        ]
        assert render(tokenizer, messages) == ids
        assert len(weights) == len(ids)


# ---- the datasets --------------------------------------------------------------------------


def test_datasets_are_made_again_byte_for_byte(scripts):
    tables = scripts["data"].build()
    assert {p.stem for p in DATA.glob("*.jsonl")} == set(tables)
    for name, rows in tables.items():
        assert (DATA / f"{name}.jsonl").read_bytes() == scripts["data"].to_jsonl(rows).encode()


@pytest.mark.parametrize("name", SPLITS)
def test_held_out_prompts_are_not_training_prompts(name):
    train, test = read(f"{name}_train"), read(f"{name}_test")
    assert 500 <= len(train) <= 2000
    assert 100 <= len(test) <= 200
    assert not {user_turn(r) for r in train} & {user_turn(r) for r in test}
    assert all(list(r) == list(train[0]) for r in train + test)


def test_the_base_never_sees_held_out_prompts(scripts):
    import random

    prompts, questions = scripts["data"].held_out(scripts["data"].build())
    expressions = {f"{a} {op} {b}" for a, op, b in questions}
    turns = scripts["text"].TrainingText(prompts, questions).turns(random.Random(5))
    for _ in range(20_000):
        for user, _ in next(turns):
            assert user not in prompts
            words = user.rstrip("?").replace("?", "").split()
            assert not any(
                " ".join(words[i : i + 3]) in expressions for i in range(len(words) - 2)
            ), user


def test_label_words_are_single_tokens_with_their_space(tokenizer, scripts):
    labels = [*scripts["words"].SENTIMENT_LABELS, *scripts["words"].LETTERS]
    for label in [*labels, *scripts["words"].VERDICTS]:
        assert label.startswith(" ")
        assert len(tokenizer.encode(label, add_special_tokens=False)) == 1, label


def test_rows_are_well_formed():
    for name in ("token_set_kl_train", "token_set_kl_test"):
        assert all(abs(sum(r["label_probs"]) - 1) < 1e-9 for r in read(name))
        assert {len(r["label_probs"]) for r in read(name)} == {5}
    for name in ("dpo_train", "dpo_test"):
        assert all(r["chosen"] != r["rejected"] for r in read(name))
    assert {r["answer"] for r in read("multiple_choice_test")} == set("ABCD")
    assert sum(p.stat().st_size for p in DATA.iterdir()) < 2_000_000


def test_length_does_not_decide_the_preference():
    rows = read("dpo_test")
    longer = sum(len(r["chosen"]) > len(r["rejected"]) for r in rows) / len(rows)
    assert 0.4 < longer < 0.6


@pytest.mark.parametrize("name", SPLITS)
def test_token_ids_are_in_range_and_fit_the_context(tokenizer, name):
    for row in read(f"{name}_test"):
        for value in row.values():
            if isinstance(value, str):
                ids = tokenizer.encode(value, add_special_tokens=False)
                assert len(ids) < 200
                assert all(0 <= i < len(tokenizer) for i in ids)
