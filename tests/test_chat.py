"""Conversations to tokens and weights, on tokenizers built in memory."""

from __future__ import annotations

import random

from cookbook_core import chat
from cookbook_core.errors import ConfigError, DataError, ModelError

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the museum opens on wednesday, the museum closes on monday",
    "what is 12 + 30? it is 42. what is 7 - 3? it is 4. 11 + 11 = 22",
    "mirror: fox corn book. museums must amuse us all; a muse, the mus",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tagged(inside: str, after: str = "", header: str = "") -> str:
    """Build a ChatML template whose answers have generation tags around header + inside."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + ("" if header else "{{ '<|im_start|>assistant\n' }}")
        + "{% generation %}{{ "
        + (f"{header} + " if header else "")
        + inside
        + " }}{% endgeneration %}"
        + (f"{{{{ {after} }}}}" if after else "")
        + "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def make_tokenizer(
    template: str | None = CHATML,
    eos: str | None = "<|im_end|>",
    pad: str | None = None,
    adds_bos: bool = False,
    adds_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE; optionally it adds BOS and EOS to plain text by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if adds_eos else "<s> $A",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )
    bos = "<s>" if adds_bos else None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is 7 - 3?"},
    {"role": "assistant", "content": "it is 4"},
    {"role": "user", "content": "and 11 + 11?"},
    {"role": "assistant", "content": "22"},
]


def trained_text(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], weights: list[float]
) -> str:
    return tokenizer.decode([t for t, w in zip(tokens, weights, strict=True) if w])


# ---- plain text ----------------------------------------------------------------------------


@pytest.mark.parametrize("adds_eos", [False, True])
def test_plain_text_has_one_bos_and_one_eos(adds_eos: bool) -> None:
    """Pitfalls 7 and 8: also where the text spells them out, and the tokenizer adds both itself."""
    tokenizer = make_tokenizer(eos="</s>", adds_bos=True, adds_eos=adds_eos)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for prompt in ("what is", "<s>what is"):
        for completion in (" 7 - 3?", " 7 - 3?</s>", " 7 - 3?</s>\n"):
            before, after = chat.render_completion(tokenizer, prompt, completion)
            assert before == chat.render_prompt(tokenizer, prompt)
            assert before[0] == bos
            assert after[-1] == eos
            assert (before + after).count(bos) == 1
            assert (before + after).count(eos) == 1
            assert tokenizer.decode(before + after) == "<s>what is 7 - 3?</s>"


def test_final_eos_is_trained_on_when_pad_is_eos() -> None:
    """Pitfall 6: masking the padding token would mask EOS too."""
    tokenizer = make_tokenizer(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert chat.render_completion(tokenizer, "the", " museum")[1][-1] == tokenizer.eos_token_id
    tokens, weights = chat.render_messages(tokenizer, CHAT[1:3])
    assert (tokens[-2], weights[-2]) == (tokenizer.eos_token_id, 1.0)


def test_random_splits_keep_the_prompt_a_prefix() -> None:
    """Pitfall 9: "check" raises exactly where a token spans the split; "split" never merges."""
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    raised = 0
    for _ in range(300):
        text = rng.choice(CORPUS)
        cut = rng.randrange(1, len(text) - 1)
        prompt, completion = text[:cut], text[cut:]
        alone, joint = tokenizer.encode(prompt), tokenizer.encode(text)
        before, after = chat.render_completion(tokenizer, prompt, completion, boundary="split")
        assert before == alone
        assert tokenizer.decode(before + after) == text + "<|im_end|>"
        if joint[: len(alone)] == alone:
            expected = (alone, [*joint[len(alone) :], tokenizer.eos_token_id])
            assert (before, after) == expected
            assert chat.render_completion(tokenizer, prompt, completion) == expected
        else:
            raised += 1
            with pytest.raises(DataError, match=r"prompt, token \d+ of .*boundary"):
                chat.render_completion(tokenizer, prompt, completion)
    assert 30 < raised < 270


def test_split_raises_rather_than_change_the_text() -> None:
    """A whitespace word tokenizer would put a space between "mus" and "eum"."""
    backend = Tokenizer(
        models.WordLevel({"[UNK]": 0, "mus": 1, "eum": 2, "museum": 3, "$": 4}, "[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="$")
    with pytest.raises(DataError, match=r"the text changes.*museum.*mus eum"):
        chat.render_completion(tokenizer, "mus", "eum", boundary="split")


def test_plain_errors() -> None:
    tokenizer = make_tokenizer(template=None)
    with pytest.raises(DataError, match="no tokens"):
        chat.render_prompt(tokenizer, "")
    with pytest.raises(DataError, match="completion: not in the form of the prompt"):
        chat.render_completion(tokenizer, "a", CHAT[2:3])
    with pytest.raises(DataError, match="completion: empty"):
        chat.render_completion(tokenizer, "a", "")
    with pytest.raises(DataError, match=r"completion: an end token before.*position 2 of"):
        chat.render_completion(tokenizer, "a", " the museum<|im_end|> opens")
    with pytest.raises(ConfigError, match='Did you mean "split"'):
        chat.render_completion(tokenizer, "a", " b", boundary="splitt")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no chat template"):
        chat.render_prompt(tokenizer, CHAT[:2])
    with pytest.raises(ModelError, match="eos_token: not set"):
        chat.render_completion(make_tokenizer(eos=None), "a", " b")


# ---- prompt and completion as messages -----------------------------------------------------


def test_chat_completion_ends_at_eos_and_follows_the_generation_prompt() -> None:
    tokenizer = make_tokenizer()
    before, after = chat.render_completion(tokenizer, CHAT[:2], CHAT[2:3])
    assert (
        before == tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    )
    assert before == chat.render_prompt(tokenizer, CHAT[:2])
    assert tokenizer.decode(after) == "it is 4<|im_end|>"  # the template's "\n" is cut


def test_chat_has_one_bos_when_tokenizer_and_template_both_add_it() -> None:
    """Pitfall 8; also if the template itself doubles it."""
    for bos in ("{{ bos_token }}", "{{ bos_token + bos_token }}"):
        tokenizer = make_tokenizer(template=bos + CHATML, adds_bos=True, adds_eos=True)
        before, after = chat.render_completion(tokenizer, CHAT[:2], CHAT[2:3])
        assert (before + after).count(tokenizer.bos_token_id) == 1
        assert before[0] == tokenizer.bos_token_id
        tokens, _ = chat.render_messages(tokenizer, CHAT[:3])
        assert tokens[: len(before + after)] == before + after
        assert tokenizer.decode(tokens[-1:]) == "\n"


def test_end_of_turn_that_is_not_eos() -> None:
    """A template may end turns with another special token: it is trained, and sampling stops."""
    tokenizer = make_tokenizer(eos="</s>")
    _, after = chat.render_completion(tokenizer, CHAT[:2], CHAT[2:3])
    assert tokenizer.decode(after) == "it is 4<|im_end|>"
    ids = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert chat.stop_tokens(tokenizer) == ids
    assert chat.stop_tokens(make_tokenizer()) == ids[1:]
    assert chat.stop_tokens(make_tokenizer(template=None, eos="</s>")) == ids[:1]


def test_template_without_end_tokens_gets_eos_once() -> None:
    plain = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template=plain)
    _, after = chat.render_completion(tokenizer, CHAT[:2], CHAT[2:3])
    assert tokenizer.decode(after) == " it is 4\n<|im_end|>"
    tokens, weights = chat.render_messages(tokenizer, CHAT, train_on="all")
    assert trained_text(tokenizer, tokens, weights) == " it is 4\n 22\n<|im_end|>"


def test_chat_boundary_merge() -> None:
    """The end of the header and the start of the answer may meet in one token, "museum"."""
    template = (
        CHATML.replace("assistant\n", "assistant: mus")
        .replace("m['content']", "('eum' if m['role'] == 'assistant' else '') + m['content']")
        .replace("m['role'] + '\n'", "m['role'] + (': mus' if m['role'] == 'assistant' else ': ')")
    )
    tokenizer = make_tokenizer(template=template)
    with pytest.raises(DataError, match=r"prompt, token \d+ of"):
        chat.render_completion(tokenizer, CHAT[:2], CHAT[2:3])
    before, after = chat.render_completion(tokenizer, CHAT[:2], CHAT[2:3], boundary="split")
    assert before == chat.render_prompt(tokenizer, CHAT[:2])
    assert tokenizer.decode(after) == "eumit is 4<|im_end|>"


def test_chat_completion_errors() -> None:
    tokenizer = make_tokenizer()
    for content in ("", " "):
        empty = [*CHAT[:2], {**CHAT[2], "content": content}]
        with pytest.raises(DataError, match=r"prompt\[2\]: an assistant message at the end"):
            chat.render_completion(tokenizer, empty, CHAT[2:3])
    with pytest.raises(DataError, match=r"one assistant message, got .*'user'"):
        chat.render_completion(tokenizer, CHAT[:2], CHAT[1:2])
    rewriting = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match=r"prompt, character 0 of .*renders it differently"):
        chat.render_completion(make_tokenizer(template=rewriting), CHAT[:2], CHAT[2:3])


# ---- conversations -------------------------------------------------------------------------

TEMPLATES = {
    "chatml": CHATML,
    "tags": tagged("m['content'] + '<|im_end|>'", "'\n'"),
    "tags around the newline": tagged("m['content'] + '<|im_end|>\n'"),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_weights_are_on_answers_and_their_eos_only(template: str) -> None:
    """Pitfalls 7 and 11: header and trailing newline are not trained on, the end token is."""
    tokenizer = make_tokenizer(template=template)
    tokens, weights = chat.render_messages(tokenizer, CHAT)
    assert tokens == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert set(weights) == {0.0, 1.0}
    assert trained_text(tokenizer, tokens, weights) == "22<|im_end|>"
    tokens, weights = chat.render_messages(tokenizer, CHAT, train_on="all")
    assert trained_text(tokenizer, tokens, weights) == "it is 4<|im_end|>22<|im_end|>"
    start = weights.index(1.0)
    assert tokens[:start] == chat.render_prompt(tokenizer, CHAT[:2])


def test_last_answer_may_be_followed_by_another_message() -> None:
    tokenizer = make_tokenizer(template=TEMPLATES["tags"])
    tokens, weights = chat.render_messages(tokenizer, CHAT[:4])
    assert trained_text(tokenizer, tokens, weights) == "it is 4<|im_end|>"
    assert tokenizer.decode(tokens).endswith("and 11 + 11?<|im_end|>\n")


def test_message_weights() -> None:
    """Pitfall 13: weight 0 gets no loss, another weight scales it; all zero raises (12)."""
    tokenizer = make_tokenizer(template=TEMPLATES["tags"])
    first, last = {**CHAT[2], "weight": 0}, {**CHAT[4], "weight": 0.5}
    tokens, weights = chat.render_messages(tokenizer, [*CHAT[:2], first, CHAT[3], last], "all")
    assert trained_text(tokenizer, tokens, weights) == "22<|im_end|>"
    assert max(weights) == 0.5
    with pytest.raises(DataError, match="every trained message has weight 0"):
        chat.render_messages(tokenizer, [*CHAT[:2], first])
    for message in ({**CHAT[1], "weight": 1}, {**CHAT[1], "weight": "1"}):
        with pytest.raises(DataError, match=r"messages\[1\] weight: .*[Gg]ot '?1'?"):
            chat.render_messages(tokenizer, [CHAT[0], message, CHAT[2]])


@pytest.mark.parametrize(
    ("template", "position_of"),
    [
        (tagged("m['content']", "'<|im_end|>\n'"), "<|im_end|>"),  # EOS left out of the tags
        (tagged("m['content'] + '<|im_end|>\n'", header="'<|im_start|>assistant\n'"), "Ċ"),
    ],
    ids=["no end token", "header inside"],
)
@pytest.mark.parametrize("train_on", ["last", "all"])
def test_tags_that_disagree_name_the_token(template: str, position_of: str, train_on: str) -> None:
    tokenizer = make_tokenizer(template=template)
    name = position_of if train_on == "last" or position_of == "<|im_end|>" else "<|im_start|>"
    with pytest.raises(DataError, match="generation %} tags disagree") as error:
        chat.render_messages(tokenizer, CHAT, train_on=train_on)  # type: ignore[arg-type]
    assert f"('{name}')" in str(error.value)


def test_template_that_rewrites_earlier_turns() -> None:
    """Templates that drop earlier reasoning: "all" raises, "last" works."""
    rewriting = CHATML.replace("m['content'] +", "('' if loop.last else 'x') + m['content'] +")
    rewriting = rewriting.replace(
        "('' if loop.last", "('' if loop.last or m['role'] != 'assistant'"
    )
    tokenizer = make_tokenizer(template=rewriting)
    tokens, weights = chat.render_messages(tokenizer, CHAT, "last")
    assert trained_text(tokenizer, tokens, weights) == "22<|im_end|>"
    with pytest.raises(DataError, match=r"messages\[2\], character \d+.*--train_on each"):
        chat.render_messages(tokenizer, CHAT, "all")


@pytest.mark.parametrize(
    ("messages", "pattern"),
    [
        ([], "not a conversation"),
        (CHAT[0], "not a conversation"),
        ([*CHAT[:2], {"role": "assistent", "content": "a"}], r'messages\[2\].*mean "assistant"'),
        ([*CHAT[:2], {"from": "gpt", "value": "a"}], r"messages\[2\].*got \['from', 'value'\]"),
        ([*CHAT[:2], {"role": "assistant", "content": None}], r"messages\[2\] content.*got None"),
        (CHAT[:2], "nothing to train on"),
        (CHAT[2:4], "nothing to train on"),
        (
            [*CHAT[:2], {**CHAT[2], "content": "4<|im_end|>5"}],
            r"messages\[2\]: an end token before",
        ),
    ],
)
def test_malformed_conversations(messages: list, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        chat.render_messages(make_tokenizer(), messages)


def test_template_refusals_are_data_errors() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    with pytest.raises(DataError, match=r"refused by the chat template .No system"):
        chat.render_messages(make_tokenizer(template=strict + CHATML), CHAT)
