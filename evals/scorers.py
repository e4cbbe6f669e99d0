"""How an answer is scored: (what the model said, the item) -> 1.0 for right, 0.0 for wrong, or something between."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prune.evals.tasks import Item

# English, as most benchmarks are. No numbers are parsed: "1,000" is not "1000", "5.0" is not "5".
_ARTICLES = ("a", "an", "the")
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))))
_LEADING = re.compile(r"""^(?:[,;:!?"'“”‘’()\[\]{}*`]|\.(?!\d))+""")  # .5 keeps its point, -5 its sign
_TRAILING = re.compile(r"""[.,;:!?"'“”‘’()\[\]{}*`]+$""")
_LETTER = re.compile(r"(?<![\w'’/.-])[A-Za-z](?![\w'’/-]|\.\w)")
_NOUN = re.compile(r"[ \t]+(?!(?:and|as|because|is|or|since)\b)\w")  # what follows an article or a pronoun


def exact(said: str, item: Item) -> float:
    """1 if what was said is an accepted answer, in whole.

    Both lose upper case, punctuation around words and an article in front; zero to ten are written in digits.
    """
    return float(_normal(said) in map(_normal, accepted(item)))


def contains(said: str, item: Item) -> float:
    """1 if an accepted answer occurs in what was said, as whole words in a row.

    Case, punctuation around words and an article in front of the answer do not count.

    Number words stay words, since "one" is not always a number: list "2" and "two" if both are right. "not red"
    contains "red", and so does an enumeration of all colours.
    """
    text = f" {' '.join(_words(said))} "
    return float(any(f" {' '.join(_no_article(_words(answer))) or answer} " in text for answer in accepted(item)))


def choice(said: str, item: Item) -> float:
    """1 if the first letter that stands alone is an accepted answer's, in either case: "(B)", "B.", "Answer: b".

    Letters joined to anything by a hyphen, slash, apostrophe or point ("T-shirt", "A/B", "it's", "e.g.") do not stand
    alone. Before a word "I" is a pronoun, "a" an article, and so is "A" at the start of a sentence or after a colon: "A
    cat" scores 0 against A as it does against B, or a model that names what it sees would be right whenever the answer
    is A. "A", "A.", "A: cat", "(A) cat", "A is right" and "the answer is A since" are the choice A.
    """
    letter = _choice_letter(said)
    return float(letter is not None and letter in map(_choice_letter, accepted(item)))


def vqa(said: str, item: Item) -> float:
    """How many of the annotators gave this answer, divided by 3, at most 1. Equality is that of `exact`."""
    return min(1.0, [_normal(answer) for answer in accepted(item)].count(_normal(said)) / 3)


SCORERS: dict[str, Callable[[str, Item], float]] = dict(exact=exact, contains=contains, choice=choice, vqa=vqa)
WANTS = {  # what a scorer needs of the answers, or no reply could score 1
    "choice": ("one letter, such as B", lambda answers: all(re.fullmatch(r"[a-z]", _normal(one)) for one in answers)),
    "vqa": ("the answers of at least 3 annotators", lambda answers: len(answers) >= 3),
}


def accepted(item: Item) -> list[str]:
    return [item.answer] if isinstance(item.answer, str) else list(item.answer)


def _words(text: str) -> list[str]:
    """Words in lower case without the punctuation around them."""
    words = unicodedata.normalize("NFC", text).casefold().split()
    return [word for word in (_TRAILING.sub("", _LEADING.sub("", word)) for word in words) if word]


def _no_article(words: list[str]) -> list[str]:
    return words[1:] if len(words) > 1 and words[0] in _ARTICLES else words  # the answer "A" is no article


def _normal(text: str) -> str:
    return " ".join(_NUMBERS.get(word, word) for word in _no_article(_words(text))) or text.strip()  # "?" is not ""


def _choice_letter(text: str) -> str | None:
    for match in _LETTER.finditer(text):
        letter, before = match[0], text[: match.start()]
        starts = re.search(r"(?:^|[.!?:\n])\W*$", before)
        english = letter in "aiI" or (letter == "A" and starts)
        if not (english and _NOUN.match(text, match.end())):
            return letter.upper()
    return None
