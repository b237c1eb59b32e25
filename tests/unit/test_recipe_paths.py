"""Paths in recipes, as users of mergekit write them."""

from pathlib import Path
from typing import Any

import pytest

from app.recipe_paths import PathError, taken_for_the_hubs, with_references


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with some models and a root of its own."""
    for name in ("models/a", "models/b+c", "lora", "org/name", "other/x", "gpt2"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    return tmp_path


def mapped(name: str, *roots: str) -> str:
    recipe = {"merge_method": "linear", "models": [{"model": name}]}
    found = with_references(recipe, [Path(root) for root in roots])
    return str(found["models"][0]["model"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./models/a", "local:models/a"),
        ("models/a/", "local:models/a"),
        ("{here}/models/a", "local:models/a"),
        ("~/a", "local:models/a"),
        ("other/../models/a", "local:models/a"),
        ("models/b+c", "local:models/b+c"),
        ("org/name", "local:org/name"),
        ("org/other", "org/other"),
        ("org/other@main", "org/other@main"),
        ("gpt2", "local:gpt2"),
        ("local:models/a", "local:models/a"),
        ("hf:org/name", "hf:org/name"),
        ("job:1/model", "job:1/model"),
        ("./models/a+./lora", "local:models/a+local:lora"),
        ("org/other+./lora", "org/other+local:lora"),
        ("org/other+org/third", "org/other+org/third"),
    ],
)
def test_a_path_under_a_root_is_a_reference(here: Path, name: str, expected: str) -> None:
    assert mapped(name.format(here=here), ".") == expected


def test_every_field_that_names_a_model_is_mapped(here: Path) -> None:
    recipe: dict[str, Any] = {
        "merge_method": "slerp",
        "base_model": "./models/a",
        "slices": [{"base_model": "./models/a", "sources": [{"model": "./lora", "layer_range": [0, 2]}]}],
        "tokenizer": {"source": "./models/a", "tokens": {"x": {"source": {"kind": "model_token", "model": "./lora"}}}},
        "parameters": {"t": 0.5},
    }
    assert with_references(recipe, [here]) == {
        "merge_method": "slerp",
        "base_model": "local:models/a",
        "slices": [{"base_model": "local:models/a", "sources": [{"model": "local:lora", "layer_range": [0, 2]}]}],
        "tokenizer": {
            "source": "local:models/a", "tokens": {"x": {"source": {"kind": "model_token", "model": "local:lora"}}},
        },
        "parameters": {"t": 0.5},
    }  # fmt: skip
    own = {"method": {"name": "average"}, "base": "./lora", "models": [{"name": "a", "checkpoint": "./models/a"}]}
    found = with_references(own, [here])
    assert (found["base"], found["models"][0]["checkpoint"]) == ("local:lora", "local:models/a")
    assert with_references({"merge_method": "ties", "tokenizer_source": "union"}, []) == {
        "merge_method": "ties", "tokenizer_source": "union",
    }  # fmt: skip
    assert with_references(["no recipe"], []) == ["no recipe"]


@pytest.mark.parametrize(
    ("name", "roots", "says"),
    [
        ("./models/none", ["."], "models.0.model: there is no './models/none' on this machine"),
        ("./models/a", [], "no local root is known here; give --local-root DIR"),
        ("./models/a", ["other"], "under none of other; give --local-root DIR"),
        ("./models/a", ["models/a/deeper"], "under none of"),
    ],
)
def test_other_paths_are_told_what_to_do(here: Path, name: str, roots: list[str], says: str) -> None:
    with pytest.raises(PathError) as refused:
        mapped(name, *roots)
    assert says in str(refused.value)


def test_names_that_the_hub_was_asked_for_are_those_that_no_folder_here_has() -> None:
    recipe = {"merge_method": "linear", "base_model": "local:a", "models": [{"model": "lm/x"}, {"model": "hf:lm/y"}]}
    assert taken_for_the_hubs(recipe, ["models.0.model"]) == ["lm/x"]
    for field in ("base_model", "models.1.model", "models.0.parameters.weight", "models"):
        assert taken_for_the_hubs(recipe, [field]) == []
    assert taken_for_the_hubs(None, ["models.0.model"]) == []


def test_the_same_path_under_an_earlier_root_is_no_mistake(here: Path) -> None:
    (here / "other" / "models" / "a").mkdir(parents=True)
    assert mapped("./models/a", ".", "other") == "local:models/a"
    with pytest.raises(PathError, match="goes first"):
        mapped("./models/a", "other", ".")


def test_a_root_is_passed_over_where_links_lead_out_of_it(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As in the hub's cache, whose snapshots are folders of links, or where a folder of models is a link."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "weights").touch()
    (elsewhere / "model").mkdir()
    (here / "snapshot").mkdir()
    (here / "snapshot" / "model.safetensors").symlink_to(elsewhere / "weights")
    (here / "linked").symlink_to(elsewhere / "model")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"./{name}"} for name in ("models/a", "snapshot", "linked")],
    }
    found = with_references(recipe, [here, Path("/")], follows_links=True)
    assert [model["model"] for model in found["models"]] == [
        "local:models/a", f"local:{here.relative_to('/')}/snapshot", f"local:{here.relative_to('/')}/linked",
    ]  # fmt: skip
