"""What stands between two answers: against the rendered whole, in known templates' styles."""

from __future__ import annotations

from typing import Any

from cookbook_core import chat, datum_from_turns
from cookbook_core.errors import DataError, ModelError
from tests.test_chat import CHAT, CHATML, make_tokenizer
from tests.test_chat_templates import STYLES, THINK, tokenizer_of

import pytest

ASKED, REPLY = CHAT[:2], [{"role": "tool", "content": "7 - 3 = 4"}]
SEVERAL = [style for style in STYLES if style != "eos at the end only"]


def answer_of(tokenizer: Any, asked: list[Any], text: str) -> list[int]:
    answer = [{"role": "assistant", "content": text}]
    return chat.render_completion(tokenizer, asked, answer)[1]


@pytest.mark.parametrize("style", SEVERAL)
def test_turns_in_a_row_are_the_whole_conversation(style: str) -> None:
    """Prompt, answer, reply and so on, three answers long, token for token."""
    tokenizer = tokenizer_of(style)
    messages = [*CHAT[1:], {"role": "user", "content": "the mus?"}]
    tokens = chat.render_prompt(tokenizer, messages[:1])
    for i in (1, 3):
        answer = answer_of(tokenizer, messages[:i], messages[i]["content"])
        more = chat.reply_tokens(tokenizer, messages[:i], answer, messages[i + 1 : i + 2])
        tokens += answer + more
        assert tokens == chat.render_prompt(tokenizer, messages[: i + 2])


def test_the_newline_after_the_end_token_is_kept() -> None:
    """It is part of what the template puts there, and lost if the reply is rendered by itself."""
    tokenizer = make_tokenizer()
    more = chat.reply_tokens(tokenizer, ASKED, answer_of(tokenizer, ASKED, "it is"), REPLY)
    expected = "\n<|im_start|>tool\n7 - 3 = 4<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(more) == expected


def test_several_replies_at_once() -> None:
    tokenizer = make_tokenizer()
    replies = [*REPLY, {"role": "user", "content": "and?"}]
    more = chat.reply_tokens(tokenizer, ASKED, answer_of(tokenizer, ASKED, "it is"), replies)
    assert tokenizer.decode(more).count("<|im_start|>") == 3


def test_a_truncated_answer_gets_the_end_token_it_lacks() -> None:
    """As a token that was not sampled: it stands in what is given, with weight 0."""
    tokenizer = make_tokenizer()
    whole = answer_of(tokenizer, ASKED, "it is 4")
    more = chat.reply_tokens(tokenizer, ASKED, whole, REPLY)
    assert chat.reply_tokens(tokenizer, ASKED, whole[:-1], REPLY) == [whole[-1], *more]
    assert chat.reply_tokens(tokenizer, ASKED, [], REPLY) == [whole[-1], *more]
    datum = datum_from_turns([([1], whole[:-1]), ([whole[-1], *more], whole)])
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    weights = datum.loss_fn_inputs["weights"].tolist()
    assert targets[len(whole) - 1] == whole[-1]
    assert weights == [1.0] * (len(whole) - 1) + [0.0] * (1 + len(more)) + [1.0] * len(whole)


def test_sampled_tokens_that_encode_otherwise_stay() -> None:
    """Pitfall 10: "museum" written letter by letter; its text would be encoded as fewer tokens."""
    tokenizer = make_tokenizer()
    letters = [tokenizer.encode(letter)[0] for letter in "museum"]
    end = tokenizer.eos_token_id
    assert tokenizer.encode(tokenizer.decode(letters)) != letters
    more = chat.reply_tokens(tokenizer, ASKED, [*letters, end], REPLY)
    assert more == chat.reply_tokens(tokenizer, ASKED, answer_of(tokenizer, ASKED, "museum"), REPLY)
    prompt = chat.render_prompt(tokenizer, ASKED)
    datum = datum_from_turns([(prompt, [*letters, end]), (more, [*letters, end])])
    inputs = datum.loss_fn_inputs
    both = zip(inputs["target_tokens"].tolist(), inputs["weights"].tolist(), strict=True)
    assert [token for token, weight in both if weight] == [*letters, end] * 2


@pytest.mark.parametrize("end", ["</s>", "<|im_start|>"])
def test_another_special_token_does_not_end_the_turn(end: str) -> None:
    """It stays, as sampled, and the template's own end token follows."""
    tokenizer = make_tokenizer(eos="<|im_end|>")
    answer = answer_of(tokenizer, ASKED, "it is 4")
    stray = [*answer[:-1], tokenizer.convert_tokens_to_ids(end)]
    more = chat.reply_tokens(tokenizer, ASKED, answer, REPLY)
    assert chat.reply_tokens(tokenizer, ASKED, stray, REPLY) == [answer[-1], *more]


def test_whitespace_that_a_template_trims_does_not_matter() -> None:
    """Llama 3 trims contents; what was sampled keeps its spaces."""
    tokenizer = tokenizer_of("llama3")
    answer = answer_of(tokenizer, ASKED, "it is 4")
    more = chat.reply_tokens(tokenizer, ASKED, answer, REPLY)
    for text in ("it is 4 ", "\nit is 4\n\n"):
        spaced = [*tokenizer.encode(text, add_special_tokens=False), answer[-1]]
        assert chat.reply_tokens(tokenizer, ASKED, spaced, REPLY) == more


def test_a_template_that_strips_thinking_is_refused() -> None:
    """After a user's turn, not after a tool's; also where the thinking was in an earlier answer."""
    tokenizer, user = tokenizer_of("thinking"), [{"role": "user", "content": "and?"}]
    asked, answer = CHAT[1:2], answer_of(tokenizer_of("thinking"), CHAT[1:2], THINK[0])
    match = r"^the sampled answer: .*renders it differently when a reply follows.*<think>"
    with pytest.raises(DataError, match=match):
        chat.reply_tokens(tokenizer, asked, answer, user)
    assert tokenizer.decode(chat.reply_tokens(tokenizer, asked, answer, REPLY)).startswith("\n<|im")
    longer = [*asked, {"role": "assistant", "content": THINK[0]}, *REPLY]
    match = r"^messages, character \d+: .*differently when an answer and a reply follow.*<think>"
    with pytest.raises(DataError, match=match):
        chat.reply_tokens(tokenizer, longer, answer_of(tokenizer, longer, "22"), user)


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        ([{"role": "assistant", "content": "4"}], r"^reply: contains an answer.*\['assistant'\]"),
        ([{"role": "tool", "content": 4}], r"^reply\[0\] content: not text.*got 4"),
        ([{"role": "robot", "content": "4"}], r"^reply\[0\] role: unknown.*'robot'"),
        ([], "^reply: not a conversation"),
        ({"role": "tool", "content": "4"}, "^reply: not a conversation"),
    ],
)
def test_malformed_replies(reply: Any, match: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=match):
        chat.reply_tokens(tokenizer, ASKED, answer_of(tokenizer, ASKED, "it is"), reply)


def test_templates_without_several_turns() -> None:
    """No end token between turns, none at all, or a role that the template refuses."""
    tokenizer = tokenizer_of("eos at the end only")
    answer = answer_of(tokenizer, ASKED, "4")
    with pytest.raises(DataError, match=r"^the sampled answer: .*ends an answer in another way"):
        chat.reply_tokens(tokenizer, ASKED, answer, REPLY)
    with pytest.raises(ModelError, match="no end token"):
        chat.reply_tokens(make_tokenizer(CHATML.replace("<|im_end|>", "")), ASKED, [5], REPLY)
    with pytest.raises(ModelError, match="no chat template"):
        chat.reply_tokens(make_tokenizer(None), ASKED, [5], REPLY)
    with pytest.raises(DataError, match=r"messages\[4\]: refused by the chat template"):
        chat.reply_tokens(tokenizer_of("gemma"), CHAT[1:4], [5], [{**CHAT[0]}])
