"""Tools, template arguments, thinking and prefills: the ids of the template itself, or an error."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cookbook_core import chat, clients, runs
from cookbook_core.data import load_rows
from cookbook_core.errors import ConfigError, DataError
from cookbook_core.runs import run_folder
from recipes import bradley_terry, dpo, kto, sft
from tests.test_chat import CHATML, make_tokenizer, trained_text
from tests.test_chat_templates import HEADER

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 7, "b": "ü"}},
}
AS_TEXT = {**CALL, "function": {"name": "add", "arguments": '{"a": 7, "b": "ü"}'}}
FLAT = CALL["function"]
CALLING = [
    {"role": "user", "content": "what is 7 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "10", "tool_call_id": "abcdefgh1"},
    {"role": "assistant", "content": "it is 10"},
]
TOOL_LIST = "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>\n' }}"
    + TOOL_LIST
    + "{{ '</tools><|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if call.function is defined %}"
    "{% set call = call.function %}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if tools is not none and tools is defined %}{{ "
    + HEADER.format("'system'")
    + " }}"
    + TOOL_LIST
    + "{{ '<|eot_id|>' }}{% endif %}{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if not m.tool_calls | length == 1 %}{{ raise_exception('single tool-calls only') }}"
    "{% endif %}{% set call = m.tool_calls[0].function %}{{ "
    + HEADER.format("'assistant'")
    + ' + \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}{% elif m.role == 'tool' %}{{ "
    + HEADER.format("'ipython'")
    + " + m.content | tojson + '<|eot_id|>' }}{% else %}{{ "
    + HEADER.format("m['role']")
    + " + m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ " + HEADER.format("'assistant'") + " }}{% endif %}"
)
TEXT = (  # as DeepSeek's: arguments are text, and calls are shown where there is no content
    "{% for t in tools or [] %}{{ t.function.name + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.content is not defined %}{% for call in m.tool_calls %}"
    "{{ call.function.name + '\n' + call.function.arguments + '<|im_end|>\n' }}{% endfor %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')"
    "[-1].strip('\n') %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.at and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}"
    "{{ content }}{% endif %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
STYLES = {  # name: (template, its form of CALLING's second message, what is trained there)
    "hermes": (
        HERMES,
        CALLING[1],
        '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": "ü"}}\n</tool_call><|im_end|>',
    ),
    "llama3": (LLAMA, CALLING[1], '{"name": "add", "parameters": {"a": 7, "b": "ü"}}<|eot_id|>'),
    "text": (
        TEXT,
        {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]},
        'add\n{"a": 7, "b": "ü"}<|im_end|>',
    ),
}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    llama = template is LLAMA
    tokenizer = make_tokenizer(template, eos="<|eot_id|>" if llama else "<|im_end|>", adds_bos=True)
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] if llama else []
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special], special_tokens=True)
    return tokenizer


def template_ids(tokenizer: Any, messages: list, **arguments: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, **arguments)["input_ids"]


def forms(call: dict[str, Any]) -> list[dict[str, Any]]:
    """The message with one call, in every form that users write."""
    return [
        {"role": "assistant", "tool_calls": [given], **content}
        for given in (call, AS_TEXT, FLAT, {**FLAT, "arguments": '{"a": 7, "b": "ü"}'})
        for content in ({"content": ""}, {"content": None}, {})
    ]


# ---- tools --------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", range(12))
def test_calls_in_every_form_give_the_ids_of_the_templates_own(style: str, form: int) -> None:
    """Arguments encoded twice, content null printed as None, and dropped tools change the ids."""
    template, native, trained = STYLES[style]
    tokenizer, given = tokenizer_of(template), forms(CALL)[form]
    messages = [CALLING[0], given, *CALLING[2:]]
    wanted = [CALLING[0], native, *CALLING[2:]]
    tokens, weights = chat.render_messages(tokenizer, messages, "all", tools=TOOLS)
    assert tokens == template_ids(tokenizer, wanted, tools=TOOLS)
    end = trained[trained.rindex("<") :]
    assert trained_text(tokenizer, tokens, weights) == f"{trained}it is 10{end}"
    before, after = chat.render_completion(tokenizer, messages[:1], [given], tools=TOOLS)
    assert before == template_ids(tokenizer, wanted[:1], tools=TOOLS, add_generation_prompt=True)
    assert tokenizer.decode(after) == trained
    assert before == chat.render_prompt(tokenizer, messages[:1], tools=TOOLS)
    longer = chat.render_prompt(tokenizer, messages[:3], tools=TOOLS)
    assert longer == template_ids(tokenizer, wanted[:3], tools=TOOLS, add_generation_prompt=True)
    assert chat.render_prompt(tokenizer, messages[:1]) != before  # without tools they are not there


def test_calls_beside_text_and_several_calls() -> None:
    tokenizer = tokenizer_of(HERMES)
    both = {"role": "assistant", "content": "so:", "tool_calls": [AS_TEXT, FLAT]}
    own = {**both, "tool_calls": [CALL, CALL]}
    messages = [CALLING[0], both, *CALLING[2:]]
    tokens, _ = chat.render_messages(tokenizer, messages)
    assert tokens == template_ids(tokenizer, [CALLING[0], own, *CALLING[2:]])
    with pytest.raises(DataError, match=r"messages\[1\]: refused .*single tool-calls only"):
        chat.render_messages(tokenizer_of(LLAMA), messages)
    shown = '{"name": "add", "arguments": {"a": 7, "b": "\\u00fc"}}'
    assert chat.last_text(messages[:2]) == f"so:\n{shown}\n{shown}"


@pytest.mark.parametrize(
    ("template", "messages", "arguments", "pattern"),
    [
        (CHATML, CALLING[:1], {"tools": TOOLS}, r"^tools: not rendered"),
        (CHATML, CALLING, {}, r"messages\[1\] tool_calls: not rendered"),
        (
            TEXT,
            [CALLING[0], {**CALLING[1], "content": "so:"}, *CALLING[2:]],
            {},
            r"tool_calls: not",
        ),
        (
            HERMES.replace("m.content + '\n</tool", "'\n</tool"),
            CALLING,
            {},
            r"messages\[2\]: not rendered by the chat template",
        ),
        (HERMES, CALLING, {"enable_thinking": False}, r"enable_thinking is no argument"),
        (HERMES, CALLING, {"tokenize": True}, r"chat_template_kwargs: tokenize is no argument"),
        (HERMES, CALLING, {"tools": [{"type": "function"}]}, r"tools\[0\]: not a tool"),
    ],
)
def test_what_a_template_would_drop_is_an_error(
    template: str, messages: list, arguments: dict, pattern: str
) -> None:
    with pytest.raises(DataError, match=pattern):
        chat.render_messages(tokenizer_of(template), [*messages, CALLING[3]], **arguments)


@pytest.mark.parametrize(
    ("message", "pattern"),
    [
        ({"role": "assistant", "content": None}, r"content: not text"),
        ({"role": "user", "content": "", "tool_calls": [CALL]}, r"not allowed on a user message"),
        ({"role": "assistant", "tool_calls": {"name": "add"}}, r"tool_calls: wrong type.*a list"),
        ({"role": "assistant", "tool_calls": [{"function": "add"}]}, r"\[0\]: not a tool call"),
        (
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{a: 1}"}]},
            r"tool_calls\[0\] arguments: not JSON",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"name": "add", "arguments": json.dumps('{"a": 1}')}],
            },
            r"arguments: encoded as JSON twice.*json.dumps\(\) once",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, r"not an object"),
    ],
)
def test_malformed_calls_name_the_message_and_the_call(message: dict, pattern: str) -> None:
    with pytest.raises(DataError, match=r"messages\[1\].*" + pattern):
        chat.render_messages(tokenizer_of(HERMES), [CALLING[0], message, CALLING[3]])


# ---- thinking -----------------------------------------------------------------------------------

THINKING = [
    {"role": "user", "content": "7 - 3?"},
    {"role": "assistant", "content": "<think>\nless\n</think>\n\nit is 4"},
    {"role": "user", "content": "11 + 11?"},
    {"role": "assistant", "content": "22", "reasoning_content": "more"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "42"},
]


def test_each_answer_is_trained_on_as_it_was_generated() -> None:
    """Earlier thinking is dropped from the whole, so all answers need a sequence of their own."""
    tokenizer = tokenizer_of(QWEN3)
    with pytest.raises(DataError, match=r"messages\[1\].*--train_on each"):
        chat.render_messages(tokenizer, THINKING, "all")
    rows = chat.answers_apart([{"messages": THINKING, "tools": []}, {"prompt": "a"}])
    assert rows[-1] == {"prompt": "a"}
    assert [len(row["messages"]) for row in rows[:-1]] == [2, 4, 6]
    texts = []
    for row in rows[:-1]:
        tokens, weights = chat.render_messages(tokenizer, row["messages"])
        assert tokens == template_ids(tokenizer, row["messages"])
        prompt = template_ids(tokenizer, row["messages"][:-1], add_generation_prompt=True)
        assert tokens[: weights.index(1.0)] == prompt
        texts.append(trained_text(tokenizer, tokens, weights))
    assert texts == [
        "<think>\nless\n</think>\n\nit is 4<|im_end|>",
        "<think>\nmore\n</think>\n\n22<|im_end|>",
        "<think>\n\n</think>\n\n42<|im_end|>",
    ]
    assert "less" not in tokenizer.decode(tokens)


def test_answers_of_weight_0_get_no_sequence_and_errors_name_the_row() -> None:
    first = {**THINKING[1], "weight": 0}
    apart = chat.answers_apart([{"messages": [THINKING[0], first, *THINKING[2:4]]}])
    assert [len(row["messages"]) for row in apart] == [4]
    with pytest.raises(DataError, match="nothing to train on"):
        chat.answers_apart([{"messages": THINKING[:1]}])


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_template_arguments_reach_training_and_sampling_alike(arguments: dict) -> None:
    tokenizer, question = tokenizer_of(QWEN3), THINKING[:1]
    prompt = chat.render_prompt(tokenizer, question, **arguments)
    assert prompt == template_ids(tokenizer, question, add_generation_prompt=True, **arguments)
    before, after = chat.render_completion(tokenizer, question, THINKING[5:], **arguments)
    assert before == prompt
    empty = "" if arguments.get("enable_thinking") is False else "<think>\n\n</think>\n\n"
    assert tokenizer.decode(after) == f"{empty}42<|im_end|>"
    tokens, weights = chat.render_messages(tokenizer, [*question, THINKING[5]], **arguments)
    assert tokens[: len(before + after)] == before + after
    assert trained_text(tokenizer, tokens, weights) == tokenizer.decode(after)
    tokenizer.chat_template_kwargs = arguments  # as a run sets it
    assert chat.render_prompt(tokenizer, question) == prompt
    assert chat.render_prompt(tokenizer, question, enable_thinking=True) == chat.render_prompt(
        tokenizer_of(QWEN3), question
    )


# ---- prefills -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prefill", "rest"),
    [
        (CHATML, "it is", " 42"),
        (HERMES, "it is", " 42"),
        (LLAMA, "it is", " 42"),
        (QWEN3, "it is", " 42"),
        (QWEN3, "<think>\nmore\n</think>\n\nit is", " 42"),
    ],
)
def test_a_prefill_is_continued(template: str, prefill: str, rest: str) -> None:
    tokenizer = tokenizer_of(template)
    prompt = [THINKING[2], {"role": "assistant", "content": prefill}]
    before, after = chat.render_completion(
        tokenizer, prompt, [{"role": "assistant", "content": rest}]
    )
    assert before == template_ids(tokenizer, prompt, continue_final_message=True)
    assert before == chat.render_prompt(tokenizer, prompt)
    assert tokenizer.decode(before).endswith("it is")
    assert tokenizer.decode(after) == rest + tokenizer.eos_token
    whole = [prompt[0], {"role": "assistant", "content": prefill + rest}]
    tokens = template_ids(tokenizer, whole)
    assert tokens[: len(before + after)] == before + after


def test_a_prefill_that_no_token_boundary_ends() -> None:
    prompt = [THINKING[2], {"role": "assistant", "content": "mus"}]
    with pytest.raises(DataError, match=r"prompt, token .*one token spans.*End the prefill after"):
        chat.render_completion(
            tokenizer_of(CHATML), prompt, [{"role": "assistant", "content": "eum"}]
        )


# ---- rows ---------------------------------------------------------------------------------------


def test_columns_of_a_row_reach_rendering(tmp_path: Any) -> None:
    """Both columns as such or as JSON text; other rows may lack them; a table adds no nulls."""
    import datasets

    kwargs = {"enable_thinking": False}
    rows = [
        {"prompt": CALLING[:1], "completion": [CALLING[1]], "tools": TOOLS, "other": 1},
        {"prompt": CALLING[:1], "completion": [CALLING[3]], "chat_template_kwargs": kwargs},
        {"prompt": "a", "completion": "b", "tools": json.dumps(TOOLS)},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_rows(str(path), ("prompt", "completion"))
    assert [sorted(set(row) - {"prompt", "completion"}) for row in loaded] == [
        ["tools"],
        ["chat_template_kwargs"],
        ["tools"],
    ]
    assert [chat.template_arguments(row) for row in loaded] == [
        {"tools": TOOLS},
        kwargs,
        {"tools": TOOLS},
    ]
    with (
        pytest.raises(DataError, match=r"rows.jsonl:3, column tools: no effect on plain text"),
        chat.naming(loaded[2]),
    ):
        chat.render_prompt(
            tokenizer_of(HERMES), loaded[2]["prompt"], **chat.template_arguments(loaded[2])
        )
    for value, pattern in (("{", "tools: not JSON"), ({"a": 1}, "wrong type.*a list of JSON")):
        with pytest.raises(DataError, match=pattern):
            chat.template_arguments({"tools": value})
    other = {"type": "function", "function": {"name": "sin", "arguments": {"angle": 1.5}}}
    talks = [[CALLING[0], CALLING[1]], [CALLING[0], {**CALLING[1], "tool_calls": [other]}]]
    datasets.Dataset.from_list([{"messages": talk} for talk in talks]).to_parquet(
        str(tmp_path / "rows.parquet")
    )
    for row, talk in zip(
        load_rows(str(tmp_path / "rows.parquet"), ("messages",)), talks, strict=True
    ):
        assert [c["function"]["arguments"] for c in row["messages"][1]["tool_calls"]] == [
            c["function"]["arguments"] for c in talk[1]["tool_calls"]
        ]


def test_preferences_keep_tools_and_differ_by_their_calls() -> None:
    """Two turns that differ in their calls alone are not shared."""
    other = {**CALLING[1], "tool_calls": [{**FLAT, "arguments": {"a": 1}}]}
    row = {"chosen": CALLING[:2], "rejected": [CALLING[0], other], "tools": TOOLS}
    pair = chat.split_pair(row)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        CALLING[:1],
        [CALLING[1]],
        [other],
    )
    assert pair["tools"] == TOOLS
    rows = chat.labelled([row] * 8, 0)
    assert all(chat.template_arguments(row) == {"tools": TOOLS} for row in rows)


def inputs_of(datums: list) -> list[list[int]]:
    return [datum.model_input.to_ints() for datum in datums]


RECIPES = {
    "sft": lambda row, t: inputs_of(sft.build_data([row], t, 999, "last")[0]),
    "sft prompts": lambda row, t: sft.prompt_tokens([row], t),
    "dpo": lambda row, t: inputs_of(dpo.build_pairs([row], t, 999)[0]),
    "kto": lambda row, t: inputs_of(kto.build_data([{**row, "label": True}], t, 999)[0]),
    "grpo": lambda row, t: [clients.with_prompt_tokens([row], t, 999)[0]["prompt_tokens"]],
    "bradley_terry": lambda row, t: inputs_of(
        bradley_terry.build_pairs([row], bradley_terry.Judge(t, "Good?", (" is", " it")), 999)[0]
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_render_the_whole_row(recipe: str) -> None:
    """Tools and template arguments of a row stand in each of its sequences, calls in answers."""
    tokenizer = tokenizer_of("{{ 'mode ' ~ enable_thinking ~ '\n' }}" + HERMES)
    answer = [CALLING[1]]
    row = {"prompt": CALLING[:1], "completion": answer, "chosen": answer, "rejected": CALLING[3:]}
    row |= {"tools": json.dumps(TOOLS), "chat_template_kwargs": {"enable_thinking": "deep"}}
    texts = [tokenizer.decode(tokens) for tokens in RECIPES[recipe](row, tokenizer)]
    assert texts
    for text in texts:
        assert text.startswith("mode deep\n<|im_start|>system\n<tools>")
        assert "Add two numbers" in text
    assert ('"arguments": {"a": 7' in texts[0]) == (recipe not in ("sft prompts", "grpo"))


def test_sft_expects_the_text_that_the_template_renders() -> None:
    tokenizer = tokenizer_of(QWEN3)
    row = {"messages": THINKING[:4]}
    data, _ = sft.build_data([row], tokenizer, 999, "last")
    assert sft.expected_text(data[0], tokenizer) == "<think>\nmore\n</think>\n\n22"


# ---- the flag of every recipe -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    log_path: str


class Client:
    """A client with a tokenizer alone."""

    def __init__(self, template: str) -> None:
        self._tokenizer = tokenizer_of(template)

    def get_tokenizer(self) -> Any:
        return self._tokenizer


def test_the_flag_is_an_argument_of_every_prompt_and_belongs_to_the_run(tmp_path: Any) -> None:
    config, client = Config(str(tmp_path / "run")), Client(QWEN3)
    off = runs.RunFlags(chat_template_kwargs='{"enable_thinking": false}')
    run = runs.Run.open("x", config, 2, off)
    tokenizer = run.tokenizer(client)  # type: ignore[arg-type]
    assert tokenizer is client.get_tokenizer()
    prompt = chat.render_prompt(client.get_tokenizer(), THINKING[:1])
    wanted = {"add_generation_prompt": True, "enable_thinking": False}
    assert prompt == template_ids(tokenizer_of(QWEN3), THINKING[:1], **wanted)
    saved = {"step": 1, "path": "tinker://run/weights/1"}
    run_folder.write_record(run.path, {**run_folder.read_record(run.path), "checkpoints": [saved]})
    run.close()
    for other in (runs.RunFlags(), runs.RunFlags(chat_template_kwargs='{"enable_thinking": true}')):
        run = runs.Run.open("x", config, 2, other)
        with pytest.raises(ConfigError, match=r"--chat_template_kwargs.*Expected {\"enable_think"):
            run.tokenizer(client)  # type: ignore[arg-type]
        run.close()
    for same in (off, runs.RunFlags(resume=config.log_path)):
        run = runs.Run.open("x", config, 2, same)
        assert run.tokenizer(client).chat_template_kwargs == {"enable_thinking": False}  # type: ignore[arg-type]
        run.close()


def test_a_flag_that_would_have_no_effect_is_an_error(tmp_path: Any) -> None:
    for text in ("enable_thinking=false", "[1]", "{"):
        with pytest.raises(ConfigError, match=r"chat_template_kwargs: out of range.*Expected such"):
            runs.RunFlags(chat_template_kwargs=text)
    off = runs.RunFlags(chat_template_kwargs='{"enable_thinking": false}')
    run = runs.Run.open("x", Config(str(tmp_path / "run")), 2, off)
    with pytest.raises(ConfigError, match=r"not used by this script.*run.tokenizer\(client\)"):
        next(run.steps(Client(QWEN3)))  # type: ignore[arg-type]
    tokenizer = run.tokenizer(Client(HERMES))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="enable_thinking is no argument of the chat template"):
        chat.render_prompt(tokenizer, THINKING[:1])
    with pytest.raises(DataError, match="chat_template_kwargs: no effect on plain text"):
        chat.render_prompt(tokenizer, "plain")
    run.close()
