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
        ("a: [1e-3, 1e5, .5, 5., -1.5E+2, +12, -0, 0o17, 0x1F]", {"a": [0.001, 1e5, 0.5, 5.0, -150.0, 12, 0, 15, 31]}),
        ("a: [~, null, Null, true, TRUE, False]\nb:", {"a": [None, None, None, True, True, False], "b": None}),
        ("a: ['010', '1', 'true', !!str 12]", {"a": ["010", "1", "true", "12"]}),
        (r'a: "\ud83d\ude00 \U0001F600"', {"a": "😀 😀"}),  # as in JSON, which YAML 1.2 contains
        ("%YAML 1.2\n---\na: 1", {"a": 1}),
        ("yes: 1\non: 2", {"yes": 1, "on": 2}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {p: 1}\nb:\n  <<: *x\n  q: 2", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ("a: &x {p: 1}\nb:\n  <<: *x\n  p: 2", {"a": {"p": 1}, "b": {"p": 2}}),
        ("\ufeffa: ä", {"a": "ä"}),
    ],
)
def test_values_that_json_has(text: str, value: Any) -> None:
    assert parse_yaml(text.encode()) == value


@pytest.mark.parametrize(
    "word",
    [
        "1:30", "1:30:45.5", "190:20:30", "1_000", "1_0.5", "0b1", "0b_", "-0x1f", "yes", "Yes", "NO", "no", "on",
        "Off", "y", "n", "2024-01-31", "2024-01-31T10:00:00Z", "=", "685.230_15e+03", "1e", "0o8", "0xg", "tRUE",
        "nULL", "1.2.3",
    ],
)  # fmt: skip
def test_what_yaml_1_1_alone_reads_as_something_else_is_text(word: str) -> None:
    assert parse_yaml(f"a: {word}\nb: [{word}]\nc: {{d: {word} }}".encode()) == {
        "a": word,
        "b": [word],
        "c": {"d": word},
    }


NINE = [", ".join([f"*a{i}"] * 9) for i in range(8)]
BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [{nine}]" for i, nine in enumerate(NINE))])
MERGED = "\n".join(["a0: &a0 {k: v}", *(f"a{i + 1}: &a{i + 1}\n  <<: [{nine}]" for i, nine in enumerate(NINE))])
REFUSED = {
    "not YAML": ("a: [1, 2", "line 1"),
    "two documents": ("a: 1\n---\nb: 2", "document"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
    "a key twice inside": ("x:\n  - {p: 1, p: 2}", "'p' is there twice"),
    "a key that is a number": ("1: x", "line 1: a key that is no text; put it in quotes"),
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
    "a long number": ("a: " + "9" * 50_000, "is too long"),
    "a long decimal": ("a: 0." + "9" * 50_000, "no number that JSON has"),
    "an octal or decimal number": ("a: 1\nb: 010", "010 is an octal number in YAML 1.1 and a decimal one in 1.2"),
    "an octal number with a sign": ("b: -08", "-08 is an octal number"),
    "infinity": ("a: .inf", ".inf is no number that JSON has"),
    "no number": ("a: -.INF", "no number"),
    "NaN": ("a: .nan", ".nan is no number"),
    "a number beyond all": ("a: 1e400", "1e400 is no number that JSON has"),
    "a tag that its text is not": ("a: !!int 1:30", "'1:30' is no int"),
    "a boolean of YAML 1.1": ("a: !!bool yes", "'yes' is no bool"),
    "a number of YAML 1.1": ("a: !!float 1_0.5", "no float"),
    "merged twice": ("<<: {a: 1}\n<<: {a: 2}", "'<<' is there twice"),
    "YAML 1.1": ("%YAML 1.1\n---\na: 1", "not YAML 1.2"),
    "an escape of no character": (r'a: "\UFFFFFFFF"', "no character"),
    "a line end of YAML 1.1": ("a: x\u2028b: y", r"write \u2028, in double quotes"),
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
