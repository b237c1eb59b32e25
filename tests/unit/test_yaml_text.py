"""YAML from outside: what it may hold, and that none of it takes long or much."""

from typing import Any

import pytest

from app.services.yaml_text import DEEPEST, MOST_BYTES, NotYaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: 1\nb: [x, 2.5, true, null]\n", {"a": 1, "b": ["x", 2.5, True, None]}),
        ('{"json": [1, {"x": "y"}]}', {"json": [1, {"x": "y"}]}),
        ("day: 2024-02-30", {"day": "2024-02-30"}),  # no such date, and no date
        ("rate: 1e-3", {"rate": "1e-3"}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {p: 1}\nb:\n  <<: *x\n  q: 2", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ("a: &x {p: 1}\nb:\n  <<: *x\n  p: 2", {"a": {"p": 1}, "b": {"p": 2}}),
        ("\ufeffa: ä", {"a": "ä"}),
    ],
)
def test_values_that_json_has(text: str, value: Any) -> None:
    assert parse_yaml(text.encode()) == value


NINE = [", ".join([f"*a{i}"] * 9) for i in range(8)]
BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [{nine}]" for i, nine in enumerate(NINE))])
MERGED = "\n".join(["a0: &a0 {k: v}", *(f"a{i + 1}: &a{i + 1}\n  <<: [{nine}]" for i, nine in enumerate(NINE))])
REFUSED = {
    "not YAML": ("a: [1, 2", "line 1"),
    "two documents": ("a: 1\n---\nb: 2", "document"),
    "a key twice": ("a: 1\nb: 2\na: 3", "'a' is there twice, line 3"),
    "a key twice inside": ("x:\n  - {p: 1, p: 2}", "'p' is there twice"),
    "a key that is a number": ("1: x", "put it in quotes, line 1"),
    "a key that is a list": ("? [a]\n: x", "put it in quotes"),
    "a Python object": ("a: !!python/object/apply:os.system [ls]", "python/object"),
    "bytes": ("a: !!binary aGVsbG8=", "binary"),
    "a set": ("a: !!set {x, y}", "set"),
    "an alias of nothing": ("a: *x", "undefined alias"),
    "an alias of itself": ("a: &x [*x]", "an alias inside what it stands for"),
    "a bomb of aliases": (BOMB, "more than 20000 values"),
    "a bomb of merged mappings": (MERGED, "more than 20000 values"),
    "many values": ("[" + "1," * 30_000 + "]", "more than 20000 values"),
    "deep lists": ("[" * 50_000, f"more than {DEEPEST} levels"),
    "deep mappings": ("{a: " * 20_000, f"more than {DEEPEST} levels"),
    "a number of base 60": ("a: " + "59:" * 30_000 + "59", "is no number"),
    "a long number": ("a: " + "9" * 50_000, "is no number"),
    "a number that is none": ("a: 0b_", "is no number"),
    "too long": ("a" * (MOST_BYTES + 1), "at most"),
    "control characters": ("a: \x01", "special characters are not allowed"),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(text: str, says: str) -> None:
    with pytest.raises(NotYaml) as refused:
        parse_yaml(text.encode())
    assert says in str(refused.value)
    assert len(str(refused.value)) < 300


def test_other_encodings_are_refused() -> None:
    with pytest.raises(NotYaml, match="byte 3 is not UTF-8"):
        parse_yaml(b"a: \xff")
