"""YAML from outside: values that JSON has, in bounded space and time."""

from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode

MOST_BYTES = 100_000  # a second's work for the parser
MOST_NODES = 20_000  # counted where an alias repeats them too
DEEPEST = 30
LONGEST_NUMBER = 100  # a number of base 60 takes the square of its length

MERGE_TAG = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """Says what is wrong, and at which line."""


def parse_yaml(text: bytes) -> Any:
    """One document of texts, numbers, booleans, null, lists and mappings by text; dates stay the texts that they are.

    Raises:
        NotYaml: it is not YAML or not UTF-8, repeats a key, has other tags, or is larger or deeper than a recipe is.
    """
    if len(text) > MOST_BYTES:
        raise NotYaml(f"it has {len(text)} bytes; recipes have at most {MOST_BYTES}")
    try:
        return yaml.load(text.decode(), _Loader)  # noqa: S506 - built on the safe one, and narrower
    except UnicodeDecodeError as error:
        raise NotYaml(f"byte {error.start} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise NotYaml(f"{error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise NotYaml(str(error).replace("\n", " ")) from error


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
            if key.tag != MERGE_TAG:
                if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                    raise ConstructorError(None, None, "a key that is no text; put it in quotes", key.start_mark)
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key '{key.value[:40]}' is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: ScalarNode) -> Any:
        construct = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        try:
            if len(node.value) <= LONGEST_NUMBER:
                return construct(node)
        except (ValueError, OverflowError):
            pass
        raise ConstructorError(None, None, f"'{node.value[:40]}' is no number; put texts in quotes", node.start_mark)

    def refuse_tag(self, node: Node) -> None:
        raise ConstructorError(None, None, f"the tag '{node.tag[:40]}' is not taken here", node.start_mark)


_Loader.yaml_constructors = {
    "tag:yaml.org,2002:null": SafeConstructor.construct_yaml_null,
    "tag:yaml.org,2002:bool": SafeConstructor.construct_yaml_bool,
    "tag:yaml.org,2002:int": _Loader.construct_number,
    "tag:yaml.org,2002:float": _Loader.construct_number,
    "tag:yaml.org,2002:str": SafeConstructor.construct_yaml_str,
    "tag:yaml.org,2002:timestamp": SafeConstructor.construct_yaml_str,
    "tag:yaml.org,2002:seq": SafeConstructor.construct_yaml_seq,
    "tag:yaml.org,2002:map": SafeConstructor.construct_yaml_map,
    None: _Loader.refuse_tag,
}
