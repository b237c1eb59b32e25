"""Licences of checkpoints: what a card states, and what a merge of them is to be checked for."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from worker.engine.catalog.checkpoints.licences import (
    LICENCES,
    common_licence,
    joined_licence,
    licence_notes,
    stated_licence,
)

CARDS: Mapping[str, tuple[str, str | None]] = {
    "plain": ("---\nlicense: Apache-2.0\ntags:\n- a\n---\n# a", "apache-2.0"),
    "list": ("---\nlicense:\n- mit\n- gpl-3.0\n---\n", "mit"),
    "of its own name": ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
    "other": ("---\nlicense: other\n---\n", "other"),
    "no front matter": ("# a model\nlicense: mit\n", None),
    "front matter without an end": ("---\nlicense: mit\n", None),
    "none stated": ("---\ntags: [a]\n---\n", None),
    "no mapping": ("---\n- license\n---\n", None),
    "no YAML": ("---\nlicense: [mit\n---\n", None),
    "code": ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", None),
    "a number": ("---\nlicense: 3\n---\n", None),
    "several lines": ('---\nlicense: "mit\\n# title"\n---\n', None),
    "deep": ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(("card", "licence"), CARDS.values(), ids=CARDS)
def test_a_licence_is_what_the_card_states(tmp_path: Path, card: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert stated_licence(tmp_path) == licence


def test_a_folder_without_a_card_states_no_licence(tmp_path: Path) -> None:
    assert stated_licence(tmp_path) is None


def test_only_inputs_under_the_same_licence_have_a_common_one() -> None:
    assert common_licence({"a": "mit", "b": "mit"}) == "mit"
    assert common_licence({"a": "mit", "b": "apache-2.0"}) is None
    assert common_licence({"a": "mit", "b": None}) is None


def test_permissive_licences_need_no_note() -> None:
    assert list(licence_notes({"a": "mit", "b": "apache-2.0", "c": "cc-by-4.0"})) == []


def test_what_is_made_of_several_models_has_all_their_licences() -> None:
    assert joined_licence(["mit", "mit"]) == "mit"
    assert joined_licence([None, None]) is None
    joined = joined_licence(["mit", "gpl-3.0", None])
    assert joined == "NOASSERTION AND gpl-3.0 AND mit"
    assert joined_licence([joined, "gemma"]) == "NOASSERTION AND gemma AND gpl-3.0 AND mit"
    notes = list(licence_notes({"a": joined, "b": "gemma"}))
    assert [note.partition(", of ")[0] for note in notes[:2]] == ["licences: gemma", "licences: gpl-3.0"]
    assert notes[2].startswith("licences: gemma and gpl-3.0 each bind")
    assert notes[3].startswith("licences: a states none")


def test_nothing_is_noted_where_no_input_states_a_licence() -> None:
    assert list(licence_notes({"a": None, "b": None})) == []


@pytest.mark.parametrize(
    ("licences", "parts"),
    [
        ({"a": "cc-by-nc-4.0", "b": "mit"}, ["cc-by-nc-4.0, of a, restricts commercial use"]),
        ({"a": "cc-by-nd-4.0", "b": "mit"}, ["restricts passing on what is made of it, as a merge is"]),
        ({"a": "cc-by-nc-sa-4.0"}, ["restricts commercial use, also of what is made of it and asks that"]),
        ({"a": "gpl-3.0", "b": "mit"}, ["gpl-3.0, of a, asks that what is made of it comes under the same licence"]),
        ({"a": "gemma", "b": "gemma"}, ["gemma, of a, b, is a model licence"]),
        (
            {"a": "gemma", "b": "llama3.1"},
            ["gemma, of a, is", "llama3.1, of b, is", "gemma and llama3.1 each bind what is made of their models"],
        ),
        ({"a": "acme-eula", "b": "mit"}, ["nothing is known here of acme-eula"]),
        ({"a": "mit", "b": None, "c": None}, ["b, c states none"]),
    ],
)
def test_what_licences_ask_for_is_noted(licences: Mapping[str, str | None], parts: list[str]) -> None:
    notes = list(licence_notes(licences))
    assert len(notes) == len(parts)
    for note, part in zip(notes, parts, strict=True):
        assert note.startswith("licences: ")
        assert part in note


def test_every_licence_of_the_table_has_the_address_of_its_text() -> None:
    assert all(known.source.startswith("https://") for known in LICENCES.values())
    assert all(name == name.lower() for name in LICENCES)
