"""Reads the licences that checkpoints state, and says what a merge of them should be checked for.

A licence is the hub's identifier in the front matter of a checkpoint's README.md (`license`, or `license_name` beside
`license: other`). The table repeats what the licences' own texts are known for. It is no legal advice, and a licence
that it lacks is told as unknown.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
MAX_FRONT_MATTER_BYTES = 200_000  # the largest real ones, lists of evaluations, have less
LONGEST_NAME = 100  # characters of a licence's name


class Term(StrEnum):
    """A condition that licences have for works that are made of the licensed one."""

    NON_COMMERCIAL = "non-commercial"
    NO_DERIVATIVES = "no derivatives"
    SHARE_ALIKE = "share-alike"
    OWN_TERMS = "terms of its own"


@dataclass(frozen=True)
class Known:
    """The terms of a licence, and where its text is."""

    source: str
    terms: frozenset[Term] = frozenset()


def _spdx(names: str, *terms: Term) -> dict[str, Known]:
    """Return licences of the SPDX list, by the hub's identifiers, which are those of SPDX in lower case."""
    return {name.lower(): Known(f"https://spdx.org/licenses/{name}.html", frozenset(terms)) for name in names.split()}


def _own(names: str, source: str, *terms: Term) -> dict[str, Known]:
    return {name: Known(source, frozenset(terms or (Term.OWN_TERMS,))) for name in names.split()}


def _creative_commons(kind: str, *terms: Term) -> dict[str, Known]:
    return {
        f"cc-{kind}-{version}": Known(f"https://creativecommons.org/licenses/{kind}/{version}/", frozenset(terms))
        for version in ("2.0", "2.5", "3.0", "4.0")
    }


LICENCES: Mapping[str, Known] = {
    **_spdx(
        "Apache-2.0 MIT BSD-2-Clause BSD-3-Clause BSD-3-Clause-Clear ISC Zlib Unlicense CC0-1.0 CDLA-Permissive-1.0 "
        "CDLA-Permissive-2.0 ECL-2.0 AFL-3.0 Artistic-2.0 BSL-1.0 NCSA PostgreSQL WTFPL ODC-By-1.0 PDDL-1.0 MIT-0"
    ),
    "bsd": Known("https://spdx.org/licenses/BSD-3-Clause.html"),
    "odc-by": Known("https://spdx.org/licenses/ODC-By-1.0.html"),
    "pddl": Known("https://spdx.org/licenses/PDDL-1.0.html"),
    **_spdx(
        "GPL-2.0 GPL-3.0 AGPL-3.0 LGPL-2.1 LGPL-3.0 MPL-2.0 EPL-1.0 EPL-2.0 EUPL-1.1 EUPL-1.2 OSL-3.0 ODbL-1.0 "
        "CDLA-Sharing-1.0",
        Term.SHARE_ALIKE,
    ),
    "gpl": Known("https://www.gnu.org/licenses/gpl-3.0.html", frozenset({Term.SHARE_ALIKE})),
    "lgpl": Known("https://www.gnu.org/licenses/lgpl-3.0.html", frozenset({Term.SHARE_ALIKE})),
    "gfdl": Known("https://www.gnu.org/licenses/fdl-1.3.html", frozenset({Term.SHARE_ALIKE})),
    "odbl": Known("https://spdx.org/licenses/ODbL-1.0.html", frozenset({Term.SHARE_ALIKE})),
    **_creative_commons("by"),
    **_creative_commons("by-sa", Term.SHARE_ALIKE),
    **_creative_commons("by-nc", Term.NON_COMMERCIAL),
    **_creative_commons("by-nc-sa", Term.NON_COMMERCIAL, Term.SHARE_ALIKE),
    **_creative_commons("by-nd", Term.NO_DERIVATIVES),
    **_creative_commons("by-nc-nd", Term.NON_COMMERCIAL, Term.NO_DERIVATIVES),
    **_own("gemma", "https://ai.google.dev/gemma/terms"),
    **_own("llama2", "https://ai.meta.com/llama/license/"),
    **_own("llama3", "https://www.llama.com/llama3/license/"),
    **_own("llama3.1", "https://www.llama.com/llama3_1/license/"),
    **_own("llama3.2", "https://www.llama.com/llama3_2/license/"),
    **_own("llama3.3", "https://www.llama.com/llama3_3/license/"),
    **_own("llama4", "https://www.llama.com/llama4/license/"),
    **_own("bigscience-bloom-rail-1.0", "https://huggingface.co/spaces/bigscience/license"),
    **_own("bigscience-openrail-m", "https://huggingface.co/spaces/bigscience/license"),
    **_own("bigcode-openrail-m", "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement"),
    **_own("openrail openrail++ creativeml-openrail-m", "https://www.licenses.ai/ai-licenses"),
    **_own(
        "apple-amlr", "https://github.com/apple/ml-depth-pro/blob/main/LICENSE", Term.OWN_TERMS, Term.NON_COMMERCIAL
    ),
    **_own(
        "fair-noncommercial-research-license",
        "https://huggingface.co/facebook/fair-noncommercial-research-license",
        Term.OWN_TERMS,
        Term.NON_COMMERCIAL,
    ),
}
"""Licences by the hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses)."""

AND = " AND "
"""Joins licences that count together. Licences of cards are in lower case, so none of them has it."""
UNSTATED = "NOASSERTION"
"""Stands among joined licences for those that are not stated."""
SAYS = {
    Term.NON_COMMERCIAL: "restricts commercial use, also of what is made of it",
    Term.NO_DERIVATIVES: "restricts passing on what is made of it, as a merge is",
    Term.SHARE_ALIKE: "asks that what is made of it comes under the same licence",
    Term.OWN_TERMS: "is a model licence, whose terms go along with what is made of it",
}
"""What a merge of checkpoints with a term should be checked for."""


def stated_licence(folder: Path) -> str | None:
    """Return the licence that the card in a checkpoint's folder states, in lower case; None where it states none.

    A card that cannot be read states none, because nothing that is computed depends on it.
    """
    try:
        with (folder / CARD).open("rb") as stream:
            text = stream.read(MAX_FRONT_MATTER_BYTES).decode(errors="replace")
        stated = _front_matter(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None
    licence = stated.get("license")
    if isinstance(licence, list):  # the hub allows a list, and shows its first one
        licence = licence[0] if licence else None
    if licence in ("other", None) and isinstance(stated.get("license_name"), str):
        licence = stated["license_name"]
    if not isinstance(licence, str) or not licence.strip().isprintable():
        return None
    return licence.strip().lower()[:LONGEST_NAME] or None


def joined_licence(licences: Iterable[str | None]) -> str | None:
    """Return the licence of a model that is made of others: theirs, as SPDX joins those that count together.

    Args:
        licences: what each of the others states, which may be joined itself.
    """
    parts = {part for licence in licences for part in _parts(licence)}
    return None if parts <= {UNSTATED} else AND.join(sorted(parts))


def _parts(licence: str | None) -> list[str]:
    return [UNSTATED] if licence is None else licence.split(AND)


def _front_matter(card: str) -> Mapping[str, Any]:
    lines = card.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = (index for index, line in enumerate(lines[1:], start=1) if line.rstrip() == "---")
    found = yaml.safe_load("\n".join(lines[1 : next(ends, 1)]))
    return found if isinstance(found, dict) else {}


def common_licence(licences: Mapping[str, str | None]) -> str | None:
    """Return the licence of all inputs if they have the same one, so that a merge can state it too."""
    found = set(licences.values())
    return found.pop() if len(found) == 1 else None


def licence_notes(licences: Mapping[str, str | None]) -> Iterator[str]:
    """Yield notes of what a merge's inputs ask for.

    Args:
        licences: the licence that each input states, by the input's name; None for those that state none.
    """
    parts = {name: _parts(licence) for name, licence in licences.items()}
    stated = {part for of_input in parts.values() for part in of_input} - {UNSTATED}
    if not stated:
        return
    silent = [name for name, of_input in parts.items() if UNSTATED in of_input]
    unknown = sorted(stated - LICENCES.keys())
    binding: set[str] = set()
    for licence in sorted(stated & LICENCES.keys()):
        known = LICENCES[licence]
        says = [SAYS[term] for term in Term if term in known.terms]
        if says:
            whose = ", ".join(name for name, of_input in parts.items() if licence in of_input)
            told = f"licences: {licence}, of {whose}, {' and '.join(says)}"
            yield f"{told}; read it before you pass the merge on: {known.source}"
        if known.terms & {Term.SHARE_ALIKE, Term.OWN_TERMS}:
            binding.add(licence)
    if len(binding) > 1:
        names = " and ".join(sorted(binding))
        yield f"licences: {names} each bind what is made of their models, and may not allow one work under both"
    if unknown:
        yield f"licences: nothing is known here of {', '.join(unknown)}; read them before you pass the merge on"
    if silent:
        yield f"licences: {', '.join(silent)} states none, so ask its authors before you pass the merge on"
