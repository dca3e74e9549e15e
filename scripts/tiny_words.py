"""Words and facts of the bundled tiny model: every list its training text and datasets draw from.

Kept apart from the code that combines them so that the vocabulary can be read, and changed, in
one place. All words are meant to be single tokens of the tokenizer (see make_tiny_model.py).
"""

from __future__ import annotations

# Items of the word lists that are copied, reversed, mirrored, ...
LIST_WORDS = (
    "red blue green gold pink cat dog fox owl bee sun moon star rain snow tree leaf seed rose "
    "hat cup box pen key map car boat bike road hill lake fish bird milk salt corn lamp door "
    "book coin drum ring rope tent wolf sand"
).split()

NAMES = "Anna Ben Clara David Emma Frank Grace Henry Iris Jack".split()
COLOURS = "red blue green gold pink white black grey".split()
OBJECTS = "cup book key lamp hat box pen map coin drum ring rope tent boat bike car".split()
PLACES = "shelf table chair floor desk bench roof bed wall bridge".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SHOPS = "bakery museum library market school garden theatre station".split()

# Opinions, by how much a reader likes them: -2, -1, 0, 1, 2.
OPINIONS = {
    -2: "horrible disgusting dreadful rotten".split(),
    -1: "dull cold slow noisy weak bland".split(),
    0: "plain normal usual average".split(),
    1: "nice warm quick tidy fresh pleasant".split(),
    2: "superb amazing perfect wonderful".split(),
}
ASPECTS = "soup bread staff room music view coffee price story service".split()
SENTIMENT_LABELS = (" terrible", " poor", " fair", " good", " excellent")
LETTERS = (" A", " B", " C", " D")
VERDICTS = (" yes", " no")

# relation -> (question, {subject: answer}); distractors come from the same relation.
FACTS = {
    "capital": (
        "What is the capital of {}?",
        dict(
            pair.split(":")
            for pair in (
                "France:Paris Italy:Rome Spain:Madrid Japan:Tokyo Norway:Oslo Peru:Lima "
                "Egypt:Cairo Cuba:Havana Greece:Athens Russia:Moscow Poland:Warsaw Ireland:Dublin "
                "Austria:Vienna Germany:Berlin Portugal:Lisbon Finland:Helsinki Kenya:Nairobi "
                "Sweden:Stockholm Canada:Ottawa Ghana:Accra"
            ).split()
        ),
    ),
    "opposite": (
        "What is the opposite of {}?",
        dict(
            pair.split(":")
            for pair in (
                "hot:cold big:small fast:slow up:down day:night open:closed old:new full:empty "
                "early:late hard:soft high:low left:right long:short loud:quiet rich:poor "
                "near:far wet:dry thick:thin first:last happy:sad"
            ).split()
        ),
    ),
    "young": (
        "What is the young of {} called?",
        dict(
            pair.split(":")
            for pair in (
                "dog:puppy cat:kitten cow:calf sheep:lamb horse:foal goat:kid duck:duckling "
                "bear:cub hen:chick deer:fawn pig:piglet frog:tadpole swan:cygnet owl:owlet"
            ).split()
        ),
    ),
    "colour": (
        "What colour is {}?",
        dict(
            pair.split(":")
            for pair in (
                "banana:yellow tomato:red frog:green flamingo:pink carrot:orange crow:black "
                "swan:white elephant:grey plum:purple bear:brown"
            ).split()
        ),
    ),
    "sound": (
        "What sound does {} make?",
        dict(
            pair.split(":")
            for pair in (
                "dog:woof cat:meow cow:moo duck:quack sheep:baa lion:roar bee:buzz snake:hiss "
                "owl:hoot pig:oink mouse:squeak frog:croak"
            ).split()
        ),
    ),
    "home": (
        "Where does {} live?",
        dict(
            pair.split(":")
            for pair in (
                "bird:nest bee:hive bear:cave lion:den spider:web fish:sea horse:stable "
                "rabbit:burrow king:castle farmer:farm"
            ).split()
        ),
    ),
}


def all_facts() -> list[tuple[str, str, str]]:
    """Returns every (relation, subject, answer), in a fixed order."""
    return [(rel, sub, ans) for rel, (_, table) in FACTS.items() for sub, ans in table.items()]


def fact_question(relation: str, subject: str) -> str:
    """Returns the question about a fact, with an article where the relation needs one."""
    bare = relation in ("capital", "opposite")
    article = "" if bare else "an " if subject[0] in "aeiou" else "a "
    return FACTS[relation][0].format(article + subject)


def single_token_words() -> list[str]:
    """Returns the words that must be one token after a space, sorted."""
    words = set(LIST_WORDS + NAMES + COLOURS + OBJECTS + PLACES + DAYS + SHOPS + ASPECTS)
    for group in OPINIONS.values():
        words.update(group)
    for _, subject, answer in all_facts():
        words.update((subject, answer))
    words.update(w.strip() for w in SENTIMENT_LABELS + LETTERS + VERDICTS)
    words.update("user assistant mirror copy reverse repeat".split())
    return sorted(words)
