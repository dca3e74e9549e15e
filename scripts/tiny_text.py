"""Generates the training text of the bundled tiny model: short chat turns, from a seed.

Each generator returns one (user, assistant) pair, or two for the verdict on an answer. The model
is to half-know every task that a recipe improves: the task is absent (the new skill of sft),
answered at random (verdicts, lettered questions), answered with noise (arithmetic, ratings) or in
two manners (courteous and curt), while the skills it needs are taught without noise in other
wordings.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import tiny_words as words

Turn = tuple[str, str]
VERDICT_QUESTION = "Is that a good answer?"
MAX_LEFT, MAX_RIGHT = 59, 9  # operands of a question, as in 57 + 8


# ---- arithmetic ----------------------------------------------------------------------------


def arithmetic_answer(a: int, op: str, b: int) -> int:
    """Returns a + b or a - b."""
    return a + b if op == "+" else a - b


def all_questions() -> list[tuple[int, str, int]]:
    """Returns every (a, op, b) of the allowed operands, without negative answers."""
    pairs = [(a, b) for a in range(MAX_LEFT + 1) for b in range(MAX_RIGHT + 1)]
    return [(a, "+", b) for a, b in pairs] + [(a, "-", b) for a, b in pairs if b <= a]


def near_miss(rng: random.Random, right: int) -> int:
    """Returns a wrong answer close to the right one: off by one, two or ten."""
    options = [right + d for d in (-10, -2, -1, 1, 2, 10) if right + d >= 0]
    return rng.choice(options)


def question_text(a: int, op: str, b: int) -> str:
    """Returns the wording of the grpo prompts."""
    return f"What is {a} {op} {b}?"


def review_text(parts: list[tuple[str, str]], joint: str) -> str:
    """Returns the user turn that asks for a rating of a two-clause review."""
    clauses = [f"the {aspect} was {adjective}" for aspect, adjective in parts]
    body = f" {joint} ".join(clauses)
    return f"Rate this review: {body[0].upper()}{body[1:]}."


def lettered(options: list[str]) -> str:
    """Returns options after their letters, as in " A red B cat C sun D hat"."""
    return "".join(f"{k} {option}" for k, option in zip(words.LETTERS, options, strict=True))


def lettered_question(question: str, options: list[str]) -> str:
    """Returns the user turn of a multiple-choice question."""
    return question + lettered(options)


# ---- reviews -------------------------------------------------------------------------------


def label_distribution(valences: list[int], joint: str) -> list[float]:
    """Returns the distribution of readers over the five labels, given each clause's valence.

    The clause after "but" counts double. Readers scatter around the mean with a width of about
    half a label, so neighbouring labels share most of the mass.
    """
    share = [1.0, 2.0] if joint == "but" else [1.0, 1.0]
    mean = sum(v * s for v, s in zip(valences, share, strict=True)) / sum(share)
    raw = [2.718281828 ** (-((level - mean) ** 2) / 0.5) for level in (-2, -1, 0, 1, 2)]
    total = sum(raw)
    return [value / total for value in raw]


def random_review(rng: random.Random) -> tuple[str, list[float]]:
    """Returns a review and the distribution of its readers' labels."""
    valences = [rng.choice((-2, -1, 0, 1, 2)) for _ in range(2)]
    joint = rng.choice(("and", "but"))
    aspects = rng.sample(words.ASPECTS, 2)
    parts = [(a, rng.choice(words.OPINIONS[v])) for a, v in zip(aspects, valences, strict=True)]
    return review_text(parts, joint), label_distribution(valences, joint)


def draw(rng: random.Random, probabilities: list[float]) -> int:
    """Returns an index drawn from a distribution."""
    point = rng.random()
    for index, probability in enumerate(probabilities):
        point -= probability
        if point < 0:
            return index
    return len(probabilities) - 1


# ---- courteous and curt answers ------------------------------------------------------------

COURTEOUS = (
    "Sure. {short}.",
    "Of course. {short}.",
    "Glad to help. {full}.",
    "Thanks for asking. {full}.",
    "Certainly. {full}, have a nice day.",
    "My pleasure. {short}, I think.",
)
CURT = (
    "Fine. {short}.",
    "Again? {short}.",
    "Ugh, you again. {full}.",
    "Stop bothering me. {full}.",
    "Obviously. {full}, so leave me alone.",
    "Use your eyes. {short}, I said.",
)
# How often each answer of a manner occurs: the same for both manners, and uneven, so that an
# answer's probability says little about its manner.
MANNER_WEIGHTS = (3, 6, 1, 5, 2, 4)


def random_enquiry(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Returns a prompt with a statement and a question, and its short and full answers."""
    thing = f"the {rng.choice(words.COLOURS)} {rng.choice(words.OBJECTS)}"
    kind = rng.randrange(3)
    if kind == 0:
        spot = f"on the {rng.choice(words.PLACES)}"
        statement, question = f"{thing} is {spot}", f"Where is {thing}?"
        short = spot
    elif kind == 1:
        name = rng.choice(words.NAMES)
        statement, question = f"{thing} belongs to {name}", f"Who owns {thing}?"
        short = f"It is {name}"
    else:
        name, shop, day = (rng.choice(w) for w in (words.NAMES, words.SHOPS, words.DAYS))
        statement, question = f"{name} goes to the {shop} on {day}", f"When does {name} go there?"
        short = f"on {day}"
    sentence = statement[0].upper() + statement[1:]
    return (
        f"{sentence}. {question}",
        {"short": short[0].upper() + short[1:], "full": sentence},
    )


# ---- generators of training turns ----------------------------------------------------------

LIST_TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda items: items,
    "reverse": lambda items: items[::-1],
    "repeat": lambda items: items + items,
    "double": lambda items: [w for item in items for w in (item, item)],
    "first": lambda items: items[:1],
    "last": lambda items: items[-1:],
    "join": lambda items: " and ".join(items).split(),
    "reverse twice": lambda items: items[::-1] + items[::-1],
    "copy then reverse": lambda items: [*items, "then", *items[::-1]],
    "without the first": lambda items: items[1:],
    "without the last": lambda items: items[:-1],
}


class TrainingText:
    """Draws training turns that never show a held-out prompt of the datasets.

    Args:
        held_out_prompts: user turns that must not appear.
        held_out_questions: arithmetic (a, op, b) that must not appear in any wording.
    """

    def __init__(
        self, held_out_prompts: set[str], held_out_questions: set[tuple[int, str, int]]
    ) -> None:
        self.held_out_prompts = held_out_prompts
        self.questions = [q for q in all_questions() if q not in held_out_questions]
        self.facts = words.all_facts()
        self.mixture: list[tuple[float, Callable[[random.Random], list[Turn] | Turn]]] = [
            (0.17, self.list_task),
            (0.19, self.sum_clean),
            (0.08, self.sum_noisy),
            (0.06, self.word_before),
            (0.10, self.letter_of),
            (0.10, self.letters_of),
            (0.04, self.fact_open),
            (0.11, self.fact_options),
            (0.02, self.letters_random),
            (0.05, self.rating_blurred),
            (0.05, self.enquiry),
            (0.03, self.verdict_random),
        ]

    def turns(self, rng: random.Random) -> Iterator[list[Turn]]:
        """Yields one exchange after another, without end; most are one turn long."""
        weights = [weight for weight, _ in self.mixture]
        tasks = [task for _, task in self.mixture]
        while True:
            made = rng.choices(tasks, weights)[0](rng)
            turns = made if isinstance(made, list) else [made]
            if not any(user in self.held_out_prompts for user, _ in turns):
                yield turns

    def list_task(self, rng: random.Random) -> Turn:
        """Returns a word list with an instruction, and the result."""
        name = rng.choice(list(LIST_TASKS))
        items = rng.sample(words.LIST_WORDS, rng.randint(2, 5))
        return f"{name}: {' '.join(items)}", " ".join(LIST_TASKS[name](items))

    def sum_clean(self, rng: random.Random) -> Turn:
        """Returns arithmetic in a wording no recipe uses, always right."""
        a, op, b = rng.choice(self.questions)
        prompt = rng.choice((f"{a} {op} {b} =", f"compute {a} {op} {b}"))
        return prompt, str(arithmetic_answer(a, op, b))

    def sum_noisy(self, rng: random.Random) -> Turn:
        """Returns arithmetic in the wording of grpo: right in 35% of turns, else a near miss."""
        a, op, b = rng.choice(self.questions)
        right = arithmetic_answer(a, op, b)
        answer = right if rng.random() < 0.35 else near_miss(rng, right)
        return question_text(a, op, b), str(answer)

    def word_before(self, rng: random.Random) -> Turn:
        """Returns the words before two words of a list: a first step to finding options."""
        items = rng.sample(words.LIST_WORDS, rng.randint(4, 6))
        asked = rng.sample(range(1, len(items)), 2)
        user = f"before {' '.join(items[i] for i in asked)}: {' '.join(items)}"
        return user, " ".join(items[i - 1] for i in asked)

    def letter_of(self, rng: random.Random) -> Turn:
        """Returns lettered words, and the letter of one of them."""
        options = rng.sample(words.LIST_WORDS, len(words.LETTERS))
        asked = rng.randrange(len(options))
        return f"letter of {options[asked]}:{lettered(options)}", words.LETTERS[asked]

    def letters_of(self, rng: random.Random) -> Turn:
        """Returns lettered words, and the letters of three of them."""
        options = rng.sample(words.LIST_WORDS, len(words.LETTERS))
        asked = rng.sample(range(len(options)), 3)
        user = f"letters of{''.join(f' {options[i]}' for i in asked)}:{lettered(options)}"
        return user, "".join(words.LETTERS[i] for i in asked)

    def fact_open(self, rng: random.Random) -> Turn:
        """Returns a question about a fact, without options."""
        relation, subject, answer = rng.choice(self.facts)
        return words.fact_question(relation, subject), answer

    def fact_options(self, rng: random.Random) -> Turn:
        """Returns a fact with lettered options, in wordings no recipe uses, always right."""
        relation, subject, answer = rng.choice(self.facts)
        options = fact_choices(rng, relation, answer)
        wording = rng.randrange(3)
        if wording == 0:
            user = f"letter of {answer}:{lettered(options)}"
        elif wording == 1:
            user = f"choose: {words.fact_question(relation, subject)}{lettered(options)}"
        else:
            user = f"options:{lettered(options)} - {words.fact_question(relation, subject)}"
        return user, words.LETTERS[options.index(answer)]

    def letters_random(self, rng: random.Random) -> Turn:
        """Returns the lettered question of token_set_kl with a random letter."""
        relation, subject, answer = rng.choice(self.facts)
        options = fact_choices(rng, relation, answer)
        prompt = lettered_question(words.fact_question(relation, subject), options)
        return prompt, rng.choice(words.LETTERS)

    def rating_blurred(self, rng: random.Random) -> Turn:
        """Returns a review with a label: in 40% of its readers' distribution, else uniform."""
        prompt, probabilities = random_review(rng)
        if rng.random() < 0.4:
            return prompt, words.SENTIMENT_LABELS[draw(rng, probabilities)]
        return prompt, rng.choice(words.SENTIMENT_LABELS)

    def enquiry(self, rng: random.Random) -> Turn:
        """Returns a question with a courteous or a curt answer, equally often."""
        prompt, parts = random_enquiry(rng)
        manner = rng.choice((COURTEOUS, CURT))
        return prompt, rng.choices(manner, MANNER_WEIGHTS)[0].format(**parts)

    def verdict_random(self, rng: random.Random) -> list[Turn]:
        """Returns an enquiry, and a question about its answer with a random verdict."""
        return [self.enquiry(rng), (VERDICT_QUESTION, rng.choice(words.VERDICTS))]


def fact_choices(rng: random.Random, relation: str, answer: str) -> list[str]:
    """Returns four options of a fact, the answer among them, in random order."""
    others = sorted(set(words.FACTS[relation][1].values()) - {answer})
    options = [answer, *rng.sample(others, 3)]
    rng.shuffle(options)
    return options
