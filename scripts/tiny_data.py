"""Makes the example datasets of the recipes, as JSON lines, from a seed.

Run it to write them:  python scripts/tiny_data.py --out cookbook_core/assets/data
Columns follow TRL. Held-out prompts are never training prompts, of the dataset or of the base.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import tiny_text as text
import tiny_words as words

Row = dict[str, object]
SEED = 0


def sft_rows(rng: random.Random, count: int, seen: set[str]) -> list[Row]:
    """Returns rows of the new skill: a word list and its mirror ("mirror: a b" -> "a b b a")."""
    rows: list[Row] = []
    while len(rows) < count:
        items = rng.sample(words.LIST_WORDS, rng.randint(2, 4))
        prompt = f"mirror: {' '.join(items)}"
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "completion": " ".join(items + items[::-1])})
    return rows


def dpo_rows(rng: random.Random, count: int, seen: set[str]) -> list[Row]:
    """Returns pairs of a courteous (chosen) and a curt answer, the longer one at random.

    bradley_terry uses them too.
    """
    rows: list[Row] = []
    while len(rows) < count:
        prompt, parts = text.random_enquiry(rng)
        if prompt not in seen:
            seen.add(prompt)
            chosen = rng.choice(text.COURTEOUS).format(**parts)
            rejected = rng.choice(text.CURT).format(**parts)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def grpo_rows(questions: list[tuple[int, str, int]]) -> list[Row]:
    """Returns arithmetic questions with their answers."""
    return [
        {"prompt": text.question_text(*q), "answer": str(text.arithmetic_answer(*q))}
        for q in questions
    ]


def token_set_rows(rng: random.Random, count: int, seen: set[str]) -> list[Row]:
    """Returns reviews with the share of 10 to 20 simulated annotators that chose each label."""
    rows: list[Row] = []
    while len(rows) < count:
        review, probabilities = text.random_review(rng)
        if review in seen:
            continue
        seen.add(review)
        annotators = rng.randint(10, 20)
        counts = [0] * len(probabilities)
        for _ in range(annotators):
            counts[text.draw(rng, probabilities)] += 1
        rows.append({"text": review, "label_probs": [c / annotators for c in counts]})
    return rows


def multiple_choice_rows(
    rng: random.Random, facts: list[tuple[str, str, str]], count: int, seen: set[str]
) -> list[Row]:
    """Returns lettered questions about facts; the answer is the letter without its space."""
    rows: list[Row] = []
    while len(rows) < count:
        relation, subject, answer = facts[len(rows) % len(facts)]
        options = text.fact_choices(rng, relation, answer)
        question = text.lettered_question(words.fact_question(relation, subject), options)
        if question not in seen:
            seen.add(question)
            letter = words.LETTERS[options.index(answer)].strip()
            rows.append({"question": question, "answer": letter})
    return rows


def keep_rows(rng: random.Random, count: int) -> list[Row]:
    """Returns prompts of two skills the base has, sums and reversed word lists, for sft --keep."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        if rng.random() < 0.5:
            prompt = f"compute {rng.randint(0, 59)} + {rng.randint(0, 9)}"
        else:
            prompt = f"reverse: {' '.join(rng.sample(words.LIST_WORDS, rng.randint(2, 4)))}"
        prompts[prompt] = None
    return [{"prompt": prompt} for prompt in prompts]


def list_rows(rng: random.Random, count: int) -> list[Row]:
    """Returns word lists without a task, for distill: its teacher is told what to do with them."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[" ".join(rng.sample(words.LIST_WORDS, rng.randint(2, 4)))] = None
    return [{"prompt": prompt} for prompt in prompts]


def calculator_rows(rng: random.Random, count: int, seen: set[str]) -> list[Row]:
    """Returns sums of three digits, which the base cannot do, for tool_rl; and one conversation for
    each, for sft: four in ten ask the calculator and copy its reply, the others answer wrongly.
    """
    rows: list[Row] = []
    while len(rows) < count:
        a, b = rng.randint(100, 899), rng.randint(100, 899)
        prompt, answer = text.question_text(a, "+", b), str(a + b)
        if prompt in seen:
            continue
        seen.add(prompt)
        turns = [("user", prompt)]
        if rng.random() < 0.4:
            turns += [("assistant", f"compute {a} + {b}"), ("tool", answer), ("assistant", answer)]
        else:
            wrong = a + b + rng.choice((-100, -11, -10, -1, 1, 10, 11, 100))
            turns.append(("assistant", str(wrong)))
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"prompt": prompt, "answer": answer, "messages": messages})
    return rows


def as_messages(rows: list[Row]) -> list[Row]:
    """Joins prompt and completion in one `messages` column."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]


def build(seed: int = SEED) -> dict[str, list[Row]]:
    """Returns every dataset by file stem; the same seed gives the same rows."""
    rng = random.Random(seed)
    tables: dict[str, list[Row]] = {}
    for name, make, train, test in (
        ("sft", sft_rows, 1600, 200),
        ("dpo", dpo_rows, 1000, 200),
        ("token_set_kl", token_set_rows, 1200, 200),
    ):
        seen: set[str] = set()
        tables[f"{name}_test"] = make(rng, test, seen)
        tables[f"{name}_train"] = make(rng, train, seen)
    tables["sft_messages"] = as_messages(tables["sft_train"][:16])
    questions = text.all_questions()
    rng.shuffle(questions)
    held_out, rest = questions[:200], questions[200:]
    tables["grpo_test"] = grpo_rows(held_out)
    tables["grpo_train"] = grpo_rows(rest)
    facts = words.all_facts()
    rng.shuffle(facts)
    seen = set()
    tables["multiple_choice_test"] = multiple_choice_rows(rng, facts[:25], 150, seen)
    tables["multiple_choice_train"] = multiple_choice_rows(rng, facts[25:], 1000, seen)
    tables["keep"] = keep_rows(random.Random(f"{seed}/keep"), 500)
    tables["lists"] = list_rows(random.Random(f"{seed}/lists"), 1000)
    rng, seen = random.Random(f"{seed}/calculator"), set()
    tables["calculator_test"] = calculator_rows(rng, 200, seen)
    tables["calculator_train"] = calculator_rows(rng, 800, seen)
    return tables


def held_out(
    tables: dict[str, list[Row]],
) -> tuple[set[str], set[tuple[int, str, int]]]:
    """Returns what the base must not be trained on: held-out user turns and arithmetic."""
    prompts: set[str] = set()
    for name, rows in tables.items():
        if name.endswith("_test"):
            prompts.update(str(next(iter(row.values()))) for row in rows)
    test_prompts = {str(row["prompt"]) for row in tables["grpo_test"]}
    questions = {q for q in text.all_questions() if text.question_text(*q) in test_prompts}
    return prompts, questions


ROLES = {
    "prompt": "user",
    "completion": "assistant",
    "chosen": "assistant",
    "rejected": "assistant",
}


def conversational(row: Row) -> Row:
    """Returns the row in TRL's form for chat models: a list of one message for each turn."""
    return {
        key: [{"role": ROLES[key], "content": value}] if key in ROLES else value
        for key, value in row.items()
    }


def to_jsonl(rows: list[Row]) -> str:
    """Returns rows as JSON lines with a final newline."""
    return "".join(json.dumps(conversational(row), ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, tables: dict[str, list[Row]]) -> None:
    """Writes every dataset into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sorted(tables.items()):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.write(to_jsonl(rows))


def main() -> None:
    """Writes the datasets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("cookbook_core/assets/data"))
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write(arguments.out, build(arguments.seed))


if __name__ == "__main__":
    main()
