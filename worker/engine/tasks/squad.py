"""Exact match and F1 of answers, as SQuAD's own script computes them (Rajpurkar et al. 2016, 2018)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> str:
    """Return the answer in lower case, without punctuation and articles, and with single spaces."""
    return " ".join(ARTICLES.sub(" ", answer.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, wanted: Sequence[str]) -> float:
    """Return 1 if an answer is one of those that are right, else 0. Without any, only an empty answer is right."""
    return max(float(normalised(answer) == normalised(one)) for one in wanted or ("",))


def f1(answer: str, wanted: Sequence[str]) -> float:
    """Return F1 of an answer's words, by that of the right answers to which it is most alike."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in wanted or ("",))


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    hits = sum((Counter(found) & Counter(wanted)).values())
    return 2 * hits / (len(found) + len(wanted))
