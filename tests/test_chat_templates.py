"""Chat templates in the styles of known models: the tokens trained on, or the error."""

from __future__ import annotations

from cookbook_core import chat
from cookbook_core.errors import DataError
from tests.test_chat import CHAT, CHATML, make_tokenizer, trained_text

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> <|system|> "
    "<|user|> <|assistant|> <|end|> <\uff5cUser\uff5c> <\uff5cAssistant\uff5c>"
).split()
THINK = ["<think>\nadd\n</think>\n\nit is 4", "<think>\n</think>\n\n22"]
TURN = "{{ raise_exception('After the optional system message, roles must alternate') }}"
ALTERNATE = (
    "{% if (messages[0]['role'] == 'system') %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}" + TURN + "{% endif %}{% endfor %}"
)
HEADER = "'<|start_header_id|>' + {0} + '<|end_header_id|>\n\n'"
STYLES = {
    # name: (template, EOS, the token that ends an answer)
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ "
        + HEADER.format("m['role']")
        + " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + HEADER.format("'assistant'") + " }}{% endif %}",
        "</s>",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}"
        + ALTERNATE
        + "{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.index0 == 0 and messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "</s>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
        " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "</s>",
        "<end_of_turn>",
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        "</s>",
        "<|end|>",
    ),
    "full width": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<\uff5cUser\uff5c>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
        "{{ '<\uff5cAssistant\uff5c>' + m['content'] + eos_token }}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}",
        "</s>",
        "</s>",
    ),
    "thinking": (
        "{% set last = namespace(at=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set content = m['content'] %}"
        "{% if '</think>' in content and loop.index0 < last.at %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "eos at the end only": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ eos_token }}{% endif %}",
        "</s>",
        "</s>",
    ),
    "dated": (
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
        + CHATML,
        "<|im_end|>",
        "<|im_end|>",
    ),
}


def tokenizer_of(style: str) -> PreTrainedTokenizerFast:
    template, eos, _ = STYLES[style]
    tokenizer = make_tokenizer(template, eos=eos, adds_bos=True)
    added = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_answers_are_trained_on_with_their_end_token(style: str) -> None:
    """Pitfalls 7, 9 and 11: only content and end token are trained on, after exactly the tokens
    that a sampler is given; and sampling stops at the end token."""
    tokenizer, end = tokenizer_of(style), STYLES[style][2]
    messages = CHAT if style != "gemma" else CHAT[1:]
    space = " " if style in ("mistral", "eos at the end only") else ""  # added by the template
    last = "\n" if style == "eos at the end only" else ""
    tokens, weights = chat.render_messages(tokenizer, messages)
    assert trained_text(tokenizer, tokens, weights) == f"{space}22{last}{end}"
    assert tokens[: weights.index(1.0)] == chat.render_prompt(tokenizer, messages[:-1])
    assert tokens.count(tokenizer.bos_token_id) <= 1
    whole = f"{space}it is 4{last or end}{space}22{last}{end}"
    assert trained_text(tokenizer, *chat.render_messages(tokenizer, messages, "all")) == whole
    before, after = chat.render_completion(tokenizer, messages[:-1], messages[-1:])
    assert tokenizer.decode(after) == f"{space}22{last}{end}"
    assert tokens[: len(before + after)] == before + after
    assert tokenizer.convert_tokens_to_ids(end) in chat.stop_tokens(tokenizer)
    assert trained_text(tokenizer, *chat.render_messages(tokenizer, messages[:-1])) in (
        f"{space}it is 4{last or end}"
    )


@pytest.mark.parametrize("style", ["llama3", "gemma", "phi"])
def test_whitespace_around_an_answer_is_rendered_by_the_template(style: str) -> None:
    """Some templates strip it; the tokens trained on are those rendered."""
    tokenizer, end = tokenizer_of(style), STYLES[style][2]
    padded = [CHAT[1], {**CHAT[2], "content": " it is 4\n"}, *CHAT[3:]]
    text = " it is 4\n" if style == "phi" else "it is 4"
    tokens, weights = chat.render_messages(tokenizer, padded, "all")
    assert trained_text(tokenizer, tokens, weights) == f"{text}{end}22{end}"


def test_a_special_token_may_end_an_answer() -> None:
    tokenizer = tokenizer_of("phi")
    messages = [CHAT[1], {**CHAT[2], "content": "it is <|eot_id|>"}]
    tokens, weights = chat.render_messages(tokenizer, messages)
    assert trained_text(tokenizer, tokens, weights) == "it is <|eot_id|><|end|>"


def test_thinking_of_earlier_turns_is_dropped() -> None:
    """So the whole cannot train them: "all" raises, naming the turn; "last" works."""
    tokenizer = tokenizer_of("thinking")
    first, last = ({**CHAT[2], "content": text} for text in THINK)
    messages = [CHAT[1], first, CHAT[3], last]
    tokens, weights = chat.render_messages(tokenizer, messages)
    assert trained_text(tokenizer, tokens, weights) == f"{THINK[1]}<|im_end|>"
    assert "add" not in tokenizer.decode(tokens)
    with pytest.raises(DataError, match=r"messages\[1\], character \d+.*--train_on each"):
        chat.render_messages(tokenizer, messages, "all")


@pytest.mark.parametrize(
    ("style", "messages", "pattern"),
    [
        ("gemma", CHAT, r"messages\[0\]: refused .*System role.*before the first user's"),
        ("mistral", [CHAT[1], *CHAT[1:]], r"messages\[1\]: refused .*must alternate.*neighbours"),
        ("mistral", [*CHAT[:3], *CHAT[2:]], r"messages\[3\]: refused .*must alternate"),
    ],
)
def test_a_refusal_names_the_turn_and_the_fix(style: str, messages: list, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        chat.render_messages(tokenizer_of(style), messages)


def test_a_template_that_renders_the_time() -> None:
    ticking = "{{ strftime_now('%S.%f') }}" + CHATML
    for render in (
        lambda t: chat.render_messages(t, CHAT[:3]),
        lambda t: chat.render_completion(t, CHAT[:2], CHAT[2:3]),
    ):
        with pytest.raises(DataError, match=r"the same messages differently each time.*the time"):
            render(make_tokenizer(ticking))


def test_a_generation_prompt_that_ends_in_a_space() -> None:
    """The space and the answer's first word meet in one token that is never sampled there."""
    template, _, _ = STYLES["eos at the end only"]
    tokenizer = make_tokenizer(template.replace("'assistant:'", "'assistant: '"), eos="</s>")
    with pytest.raises(DataError, match=r"messages\[2\], token \d+.*whitespace at the end of"):
        chat.render_messages(tokenizer, CHAT[:3])
