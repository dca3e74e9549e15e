"""Measures the bundled tiny model on the held-out rows of the example datasets.

All log-probabilities are exact (float32, teacher forced), and greedy answers end at EOS.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import tiny_words as words
import torch
from tiny_data import ROLES

BRADLEY_TERRY_QUESTION = "Was that a good answer?"  # the default of recipes/bradley_terry.py

Row = dict[str, object]
Pair = tuple[list[int], list[int]]


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a JSON-lines file, each one-message turn as its plain text."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        {
            key: value[0]["content"] if key in ROLES and isinstance(value, list) else value
            for key, value in row.items()
        }
        for row in rows
    ]


def prompt_ids(tokenizer, user: str) -> list[int]:
    """Returns the tokens of one user turn, ready for the assistant to answer."""
    return encode_chat(tokenizer, [{"role": "user", "content": user}])


def encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    """Returns the tokens of a conversation, ready for the assistant to answer."""
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(rendered, add_special_tokens=False)


def completion_ids(tokenizer, completion: str) -> list[int]:
    """Returns the tokens of an answer with its EOS."""
    return [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]


def pad_rows(rows: list[list[int]], pad: int, device: torch.device) -> torch.Tensor:
    """Right-pads token lists to one (D, N) tensor; causal attention never reads the pads."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)


def pair_logprobs(model, pairs: list[Pair]) -> torch.Tensor:
    """Returns log p(completion | prompt) of each (prompt, completion), shape (D,), in nats."""
    tokens = pad_rows([p + c for p, c in pairs], 0, model.device)
    logprobs = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    picked = logprobs.gather(-1, tokens[:, 1:, None])[..., 0]
    mask = torch.zeros_like(picked)
    for row, (prompt, completion) in enumerate(pairs):
        mask[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)] = 1
    return (picked * mask).sum(-1)


def last_logits(model, rows: list[list[int]]) -> torch.Tensor:
    """Returns the next-token logits after each row, shape (D, V)."""
    tokens = pad_rows(rows, 0, model.device)
    ends = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    return model(input_ids=tokens).logits[torch.arange(len(rows)), ends].float()


@torch.no_grad()
def greedy(model, tokenizer, users: list[str], max_tokens: int = 40) -> list[str]:
    """Returns the greedy answer to each user turn."""
    rows = [prompt_ids(tokenizer, user) for user in users]
    starts = [len(row) for row in rows]
    open_rows = list(range(len(rows)))
    for _ in range(max_tokens):
        best = last_logits(model, [rows[i] for i in open_rows]).argmax(-1).tolist()
        for i, token in zip(open_rows, best, strict=True):
            rows[i].append(token)
        open_rows = [i for i in open_rows if rows[i][-1] != tokenizer.eos_token_id]
        if not open_rows:
            break
    answers = [row[start:] for row, start in zip(rows, starts, strict=True)]
    return [tokenizer.decode([t for t in a if t != tokenizer.eos_token_id]) for a in answers]


@torch.no_grad()
def mean_logprobs(model, tokenizer, rows: list[Row], column: str) -> torch.Tensor:
    """Returns log p of a column given the prompt, shape (D,), in nats."""
    pairs = [
        (prompt_ids(tokenizer, str(r["prompt"])), completion_ids(tokenizer, str(r[column])))
        for r in rows
    ]
    return torch.cat([pair_logprobs(model, pairs[i : i + 100]) for i in range(0, len(pairs), 100)])


def verdict_score(model, tokenizer, rows: list[Row], column: str) -> torch.Tensor:
    """Returns log p(" yes") - log p(" no") after the question about an answer, (D,), nats."""
    prompts = []
    for row in rows:
        turns = [row["prompt"], row[column], BRADLEY_TERRY_QUESTION]
        roles = ("user", "assistant", "user")
        prompts.append(
            encode_chat(
                tokenizer, [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
            )
        )
    yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in words.VERDICTS)
    logits = last_logits(model, prompts)
    return logits[:, yes] - logits[:, no]


def label_logprobs(model, tokenizer, users: list[str], labels: list[str]) -> torch.Tensor:
    """Returns the answer's log-distribution renormalised over labels, shape (D, K)."""
    ids = [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]
    logits = last_logits(model, [prompt_ids(tokenizer, user) for user in users])
    return logits[:, ids].log_softmax(-1)


def kl_to_target(target: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Returns KL(target || model) of each row, shape (D,), in nats; 0 log 0 is 0."""
    return (torch.special.xlogy(target, target) - target * logprobs).sum(-1)


def accuracy(margin: torch.Tensor) -> float:
    """Returns the share of positive margins; ties count one half."""
    return ((margin > 0).float() + 0.5 * (margin == 0).float()).mean().item()


@torch.no_grad()
def abilities(model, tokenizer, data: Path) -> dict[str, float]:
    """Returns the measured abilities on held-out rows, rounded to four digits."""
    model.eval()
    rows = {path.stem: read_rows(path) for path in sorted(data.glob("*_test.jsonl"))}
    measured: dict[str, float] = {}

    sft = rows["sft_test"]
    answers = greedy(model, tokenizer, [str(r["prompt"]) for r in sft])
    hits = [a == r["completion"] for a, r in zip(answers, sft, strict=True)]
    measured["sft_greedy_exact_match"] = sum(hits) / len(hits)
    lengths = [len(completion_ids(tokenizer, str(r["completion"]))) for r in sft]
    measured["sft_token_nll"] = -mean_logprobs(
        model, tokenizer, sft, "completion"
    ).sum().item() / sum(lengths)

    grpo = rows["grpo_test"]
    measured["grpo_mean_probability_right"] = (
        mean_logprobs(model, tokenizer, grpo, "answer").exp().mean().item()
    )
    answers = greedy(model, tokenizer, [str(r["prompt"]) for r in grpo], max_tokens=6)
    hits = [a == r["answer"] for a, r in zip(answers, grpo, strict=True)]
    measured["grpo_greedy_accuracy"] = sum(hits) / len(hits)

    dpo = rows["dpo_test"]
    chosen = mean_logprobs(model, tokenizer, dpo, "chosen")
    rejected = mean_logprobs(model, tokenizer, dpo, "rejected")
    measured["dpo_raw_accuracy"] = accuracy(chosen - rejected)
    measured["dpo_chosen_logprob"] = chosen.mean().item()
    measured["dpo_rejected_logprob"] = rejected.mean().item()

    margin = verdict_score(model, tokenizer, dpo, "chosen") - verdict_score(
        model, tokenizer, dpo, "rejected"
    )
    measured["bradley_terry_accuracy"] = accuracy(margin)

    reviews = rows["token_set_kl_test"]
    target = torch.tensor([r["label_probs"] for r in reviews], device=model.device)
    users = [str(r["text"]) for r in reviews]
    measured["token_set_kl"] = (
        kl_to_target(target, label_logprobs(model, tokenizer, users, list(words.SENTIMENT_LABELS)))
        .mean()
        .item()
    )
    quiz = rows["multiple_choice_test"]
    letters = label_logprobs(
        model, tokenizer, [str(r["question"]) for r in quiz], list(words.LETTERS)
    )
    right = torch.tensor(["ABCD".index(str(r["answer"])) for r in quiz], device=model.device)
    measured["multiple_choice_accuracy"] = (letters.argmax(-1) == right).float().mean().item()
    measured["multiple_choice_nll"] = -letters.gather(1, right[:, None]).mean().item()
    assert all(math.isfinite(value) for value in measured.values()), measured
    return {name: round(value, 4) for name, value in measured.items()}
