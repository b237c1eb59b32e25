"""What a method needs and can is said in its own two files: others ask its parameters, never which class they are."""

import ast
from functools import cache
from pathlib import Path

from worker.engine.catalog.methods import AUTO, METHODS

ROOT = Path(__file__).parents[2]
OWN_ROOMS = ("worker/engine/catalog/methods/", "worker/engine/merging/methods/")
MAY_NAME_AUTO = {
    "app/contracts/requests.py",  # the union of methods in a request
    "worker/engine/catalog/contracts/spec.py",  # and that in a job
    "worker/engine/search/gate.py",  # the room of `auto`
    "worker/engine/search/job.py",
    "worker/engine/search/search.py",
    "worker/engine/search/space.py",
}
CONCRETE = {entry.parameters.__name__ for entry in METHODS.values()}
CLASSES = {cls.__name__ for entry in (*METHODS.values(), AUTO) for cls in entry.parameters.__mro__}
PARAMETERS = {name for name in CLASSES if name.endswith("Parameters")}


@cache
def modules() -> dict[str, ast.Module]:
    """All modules but those of the methods themselves, by path."""
    files = [file for folder in ("app", "worker") for file in (ROOT / folder).rglob("*.py")]
    read = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return {name: ast.parse(text) for name, text in read.items() if not name.startswith(OWN_ROOMS)}


def names_in(tree: ast.AST) -> set[str]:
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_no_module_outside_the_methods_names_the_parameters_of_one() -> None:
    found = {name: sorted(names_in(tree) & CONCRETE) for name, tree in modules().items()}
    assert {name: those for name, those in found.items() if those} == {}


def test_the_search_is_named_where_methods_are_listed_and_in_its_room_alone() -> None:
    assert {name for name, tree in modules().items() if "AutoParameters" in names_in(tree)} == MAY_NAME_AUTO


def test_no_module_outside_the_methods_asks_which_class_parameters_are() -> None:
    asked = {
        name: ast.unparse(call)
        for name, tree in modules().items()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("isinstance", "issubclass")
        and names_in(call.args[1]) & PARAMETERS
    }
    assert asked == {}
