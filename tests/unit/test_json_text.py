"""JSON from outside: what the RFC has, and nothing that two readers take for different things."""

from typing import Any

import pytest

from app.services.json_text import DEEPEST, NotJson, parse_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5e-3, true, null, "\\u00e4"]}', {"a": [1, -0.0025, True, None, "\u00e4"]}),
        ('\ufeff{"a": "\u00e4"}', {"a": "\u00e4"}),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ('{"a": {"b": 1}, "b": {"a": 1}}', {"a": {"b": 1}, "b": {"a": 1}}),
        ("9007199254740993", 9007199254740993),
        ("1.7976931348623157e308", 1.7976931348623157e308),
        ("[" * DEEPEST + "]" * DEEPEST, None),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_json(text.encode())
    assert value is None or found == value


REFUSED = {
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is there twice"),
    "a key twice inside": (b'[{"x": {"p": 1, "p": 2}}]', "the key 'p' is there twice"),
    "a key twice in two spellings": (rb'{"a": 1, "\u0061": 2}', "the key 'a' is there twice"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b"[Infinity]", "Infinity is no number"),
    "less than everything": (b"[-Infinity]", "-Infinity is no number"),
    "a number beyond all": (b"[1e400]", "1e400 is too large"),
    "a number of many digits": (b"[" + b"9" * 5000 + b"]", "is too long"),
    "an octal number": (b"[010]", "delimiter, line 1, column 3"),
    "a plus": (b"[+1]", "line 1, column 2"),
    "hex": (b"[0x1]", "line 1"),
    "a comma too many": (b"[1,]", "line 1"),
    "quotes of another kind": (b"{'a': 1}", "line 1, column 2"),
    "a comment": (b"{} // x", "Extra data"),
    "two values": (b"{}\n{}", "Extra data, line 2"),
    "a control character": (b'["\n"]', "control character"),
    "half": (b'{"a', "line 1"),
    "nothing": (b" ", "line 1"),
    "another encoding": ('{"a": "\u00e4"}'.encode("latin-1"), "byte 7 is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
    "UTF-8 that is too long": (b'["\xc0\xaf"]', "byte 2 is not UTF-8"),
    "half a pair as bytes": (b'["\xed\xa0\x80"]', "is not UTF-8"),
    "deep lists": (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), f"more than {DEEPEST} levels"),
    "deep objects": (b'{"a":' * 500 + b"1" + b"}" * 500, f"more than {DEEPEST} levels"),
    "many values of lists": (b"[" + b"[0,0]," * 7_000 + b"0]", "more than 20000 values"),
    "many values of objects": (b"[" + b'{"a":0,"b":0},' * 10_001 + b"0]", "more than 20000 values"),
    "many empty objects": (b"[" + b"{}," * 20_000 + b"0]", "more than 20000 values"),
    "very deep lists": (b"[" * 500_000, "more than"),
}


@pytest.mark.parametrize(("body", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(body: bytes, says: str) -> None:
    with pytest.raises(NotJson) as refused:
        parse_json(body)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 200
