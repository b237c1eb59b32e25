"""Patterns of module names: what PEFT's own expression finds, and nothing that takes for ever."""

import re

import pytest

from worker.engine.catalog.checkpoints.patterns import Budget, ModulePatterns, Pattern

NAMES = (
    "query",
    "bert.encoder.layer.0.attention.self.query",
    "bert.encoder.layer.10.attention.self.query",
    "bert.encoder.layer.0.attention.self.key_query",
    "model.layers.3.mlp.up_proj",
    "model.layers.31.mlp.up_proj",
    "h.3.c-attn",
    "xquery",
    "",
)
PATTERNS = (
    "query",
    "uery",
    "self.query",
    r"self\.query",
    "self_query",
    "^query",
    "^bert.encoder.layer.0.attention.self.query",
    r"^bert\.encoder\..*query",
    ".*",
    ".*query",
    ".+proj",
    r"layers\.\d+\.mlp\.up_proj",
    r"layers\.\d\.mlp\.up_proj",
    r"layers\.[0-9]+\.mlp\.(up|down)_proj",
    r"layers\.[^3]+\.mlp\..*",
    r"(?:key|up)_?\w*",
    "query|up_proj",
    "(query|up_proj)",
    "query$",
    "$",
    "^$",
    "",
    "h.3.c-attn",
    ".*?attention.*?",
    "a*",
    "x?query",
    r"\w+",
    "bert",
    "(bert|encoder|layer|[.0-9])*.*query",
    r"(?:.*?(?:language|bert).*?(?:self|mlp).*?(?:key|query).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    r"layers\.\d{2}\.mlp\..*",
    r"layers\.\d{0,1}\.mlp\..*",
    r".*\b(query)\b",
    r"\D+",
    "((x)?query)",
    "(a*)*query",
    "q{0}query",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_names_that_it_matches_in_peft(pattern: str) -> None:
    patterns = ModulePatterns({pattern: 1})
    found = [name for name in NAMES if patterns.value(name, 0) == 1]
    assert found == [name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_whole_names_and_parts_of_them_as_in_peft(pattern: str) -> None:
    found = Pattern(pattern, Budget())
    assert [name for name in NAMES if found.is_all_of(name)] == [name for name in NAMES if re.fullmatch(pattern, name)]
    expected = [name for name in NAMES if re.match(rf"(^|.*\.)(?:{pattern})($|\..*)", name)]
    assert [name for name in NAMES if found.is_part_of(name)] == expected


def test_the_first_pattern_that_matches_counts() -> None:
    patterns = ModulePatterns({"0.attention.self.query": 1, "query": 2, r"bert.*": 3})
    values = [patterns.value(name, 4) for name in (NAMES[1], NAMES[2], NAMES[3], NAMES[4])]
    assert values == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a{3,2}", "a{1000}", r"(a)\1", "[z-a]", "(?=a)", "(?i:a)", "a**", "a*+", "*", "^*", "(" * 21 + ")" * 21],
)
def test_more_than_names_need_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        ModulePatterns({pattern: 1})


def test_a_pattern_of_any_length_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1000 characters"):
        ModulePatterns({"a" * 1001: 1})


def test_many_patterns_that_could_match_in_many_ways_are_given_up() -> None:
    patterns = ModulePatterns({".*" * 400 + str(number): 1 for number in range(100)})
    with pytest.raises(ValueError, match="too long to match"):
        patterns.value("a" * 1000, 0)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(" * 20 + "a" + ")*" * 20, "((.*)*)*b"])
def test_groups_that_repeat_are_matched_at_once(pattern: str) -> None:
    assert not Pattern(pattern, Budget()).is_all_of("a" * 500 + "c")


@pytest.mark.parametrize("pattern", ["((a{0,999}){999}){999}b", "(((){999}){999}){999}b"])
def test_groups_that_repeat_very_often_are_given_up(pattern: str) -> None:
    with pytest.raises(ValueError, match="too long to match"):
        Pattern(pattern, Budget()).is_all_of("a" * 500 + "c")
