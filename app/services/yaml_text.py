"""Reads YAML from outside: only values that JSON has, in bounded space and time.

Plain words mean what YAML 1.2 says (its core schema), which reads JSON as JSON. PyYAML, and so mergekit, reads
YAML 1.1: there `1:30` is the number 90, `0b1` and `1_000` are numbers, and `yes`, `no`, `on`, `off` are true and false.
All of these are texts here. A number that begins with 0 is refused, because 010 is 8 in YAML 1.1 and 10 in 1.2.
"""

import math
import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode

MOST_BYTES = 100_000  # a second's work for the parser
MOST_NODES = 20_000  # counted where an alias repeats them too
DEEPEST = 30
LONGEST_NUMBER = 100

MERGE_TAG = "tag:yaml.org,2002:merge"
OTHER_BREAKS = re.compile("[\x85\u2028\u2029]")
PLAIN = {  # values of plain words in YAML 1.2's core schema
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class NotYaml(ValueError):
    """The text is not acceptable YAML; the message says why, and at which line."""


def parse_yaml(text: bytes) -> Any:
    """Return the value of one document of texts, numbers, booleans, null, lists, and mappings whose keys are texts.

    Raises:
        NotYaml: it is not YAML or not UTF-8, repeats a key, has other tags, has numbers or lines that YAML 1.1 and 1.2
            read differently, or is larger or deeper than a recipe is.
    """
    if len(text) > MOST_BYTES:
        raise NotYaml(f"it has {len(text)} bytes; recipes have at most {MOST_BYTES}")
    try:
        return _document(text.decode())
    except UnicodeDecodeError as error:
        raise NotYaml(f"byte {error.start} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise NotYaml(f"{where}{error.problem}") from error
    except yaml.YAMLError as error:
        raise NotYaml(str(error).replace("\n", " ")) from error
    except NotYaml:
        raise
    except (ValueError, OverflowError) as error:  # an escape of a character that Unicode does not have
        raise NotYaml("it has an escape that is no character") from error


def _document(text: str) -> Any:
    breaks = OTHER_BREAKS.search(text)
    if breaks:
        escape = f"\\u{ord(breaks[0]):04x}"
        raise NotYaml(f"character {breaks.start()} ends a line in YAML 1.1 alone; write {escape}, in double quotes")
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
        if loader.yaml_version not in (None, (1, 2)):
            raise NotYaml("it says that it is not YAML 1.2, as which recipes are read")
        return value
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}  # nodes below each finished node, by its id

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before, alias = self._nodes, isinstance(event, yaml.AliasEvent)
        if self._depth == DEEPEST:
            raise ConstructorError(None, None, f"more than {DEEPEST} levels", event.start_mark)
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise ConstructorError(None, None, "an alias inside what it stands for", event.start_mark)
        self._nodes += self._sizes[id(node)] if alias else 1
        if self._nodes > MOST_NODES:
            raise ConstructorError(None, None, f"more than {MOST_NODES} values", event.start_mark)
        if not alias:
            self._sizes[id(node)] = self._nodes - before
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag not in (MERGE_TAG, "tag:yaml.org,2002:str"):
                raise ConstructorError(None, None, "a key that is no text; put it in quotes", key.start_mark)
            if (key.tag, key.value) in seen:
                raise ConstructorError(None, None, f"the key '{key.value[:40]}' is there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_text(self, node: ScalarNode) -> str:
        """Joins the two halves of a character that JSON spells separately."""
        text = self.construct_scalar(node)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def construct_null(self, node: ScalarNode) -> None:
        self._check(node, "null")

    def construct_flag(self, node: ScalarNode) -> bool:
        self._check(node, "bool")
        return bool(node.value.lower() == "true")

    def construct_integer(self, node: ScalarNode) -> int:
        self._check(node, "int")
        sign, digits = ("-", node.value[1:]) if node.value.startswith("-") else ("", node.value.removeprefix("+"))
        if len(digits) > LONGEST_NUMBER:
            raise ConstructorError(None, None, f"the number {node.value[:40]}… is too long", node.start_mark)
        if re.fullmatch("0[0-9]+", digits):
            message = f"{node.value} is an octal number in YAML 1.1 and a decimal one in 1.2; put texts in quotes"
            raise ConstructorError(None, None, message, node.start_mark)
        return int(sign + digits, 0)

    def construct_decimal(self, node: ScalarNode) -> float:
        self._check(node, "float")
        is_special = node.value[-1] in "fFnN"  # .inf and .nan are spelled so
        value = float(node.value) if len(node.value) <= LONGEST_NUMBER and not is_special else math.inf
        if not math.isfinite(value):
            raise ConstructorError(None, None, f"{node.value[:40]} is no number that JSON has", node.start_mark)
        return value

    def _check(self, node: ScalarNode, kind: str) -> None:
        """Check that an explicit tag, as in `!!int x`, is the one that its value would have."""
        if not re.fullmatch(PLAIN[kind], node.value):
            raise ConstructorError(None, None, f"'{node.value[:40]}' is no {kind}", node.start_mark)

    def refuse_tag(self, node: Node) -> None:
        raise ConstructorError(None, None, f"the tag '{node.tag[:40]}' is not taken here", node.start_mark)


_Loader.yaml_implicit_resolvers = {}
for _kind, _first in (("null", "~nN"), ("bool", "tTfF"), ("int", "-+0123456789"), ("float", "-+0123456789.")):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{PLAIN[_kind]})\\Z"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_Loader.add_implicit_resolver(MERGE_TAG, re.compile(r"<<\Z"), ["<"])
_Loader.yaml_constructors = {
    "tag:yaml.org,2002:null": _Loader.construct_null,
    "tag:yaml.org,2002:bool": _Loader.construct_flag,
    "tag:yaml.org,2002:int": _Loader.construct_integer,
    "tag:yaml.org,2002:float": _Loader.construct_decimal,
    "tag:yaml.org,2002:str": _Loader.construct_text,
    "tag:yaml.org,2002:seq": SafeConstructor.construct_yaml_seq,
    "tag:yaml.org,2002:map": SafeConstructor.construct_yaml_map,
    None: _Loader.refuse_tag,
}
