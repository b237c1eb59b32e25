"""Recipes as files: reading them, and turning the paths in them into references."""

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from app.cli.exits import Stop


def read(recipe: Path) -> Any:
    """Return the content of a recipe file, as the service would read it. Raises Stop, OSError."""
    from app.services.json_text import NotJson, parse_json
    from app.services.yaml_text import NotYaml, parse_yaml

    content = recipe.read_bytes()
    try:
        return parse_json(content) if recipe.suffix == ".json" else parse_yaml(content)
    except (NotJson, NotYaml) as error:
        raise Stop(f"{recipe}: {error}") from error


def related(
    content: Any,
    roots: Sequence[Path] | None,
    *,
    follows_links: bool = False,
    upload: Callable[[Path], str] | None = None,
) -> Any:
    """Return a recipe's content with references in place of this machine's paths.

    Args:
        roots: local roots of the service; those of MASKMERGE_LOCAL_ROOTS when None.
        follows_links, upload: see `with_references`.

    Raises:
        Stop: a path lies under no root, or does not exist.
    """
    from app.recipe_paths import PathError, with_references

    if roots is None:
        roots = [Path(root) for root in os.environ.get("MASKMERGE_LOCAL_ROOTS", "").split(":") if root]
    try:
        return with_references(content, roots, follows_links=follows_links, upload=upload)
    except PathError as error:
        raise Stop(str(error)) from error


def refused(detail: str, fields: Collection[str], content: Any) -> Stop:
    """Return the end of a command whose recipe was refused for these fields, with advice where a path was meant."""
    from app.recipe_paths import taken_for_the_hubs

    names = " or ".join(f"'{name}'" for name in taken_for_the_hubs(content, fields))
    advice = f"; there is no folder {names} here, so it was taken for a name on the hub" if names else ""
    return Stop(f"{detail}{advice}")
