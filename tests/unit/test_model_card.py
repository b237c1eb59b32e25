"""The model card: names and notes from outside are shown as they are, whatever they would mean in Markdown or YAML."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.reports import invented_result
from tests.tiny import dataset_spec, merge_spec, model_spec, tiny_checkpoint, write_rows
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.contracts.spec import CheckpointSpec, EvaluationSpec
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.primitives.values import Filtered
from worker.engine.reporting.card import model_card

PLAIN = "zzz"
HOSTILE = (
    "<script>alert(1)</script>", "<!-- a", "&lt;b&gt; &copy; &#65;", "![a](http://b/c.png)",
    "[a](javascript:b) <http://c>", "*a* **b** _c_ __d__ ~~e~~ snake_case_", "`a` ``b``", "``` a", "a | b \\| c \\",
    "$a$ $$b$$", "# a #", "> a", "- a", "+ a", "1. a", "10) a", "---",
    "===", "***", "a\n---\nb: c\n\n# d", "a\u2028b\x85c\td", "'a' \"b\": {c} [d] %e @f !g",
)  # fmt: skip


class Shown(HTMLParser):
    """The tags of a page, and the text that a reader sees."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.text = ""
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a card of a merge that has a text wherever one from outside may be."""
    folder = tmp_path_factory.mktemp("card")
    checkpoints = [tiny_checkpoint(folder / name, seed=seed) for seed, name in enumerate("ab")]
    rows = write_rows(folder / "rows.jsonl", count=2)
    evaluation = EvaluationSpec(**dataset_spec(rows).model_dump(), metric="accuracy")
    spec = merge_spec(folder / "out", [model_spec(path, evaluation=evaluation) for path in checkpoints])
    plan = plan_merge([inspect_checkpoint(path, f"local:{path.name}") for path in checkpoints])

    def make(text: str) -> str:
        result = invented_result("ab")
        own = {text: [Filtered[float](value=0.5, filter=text)]}
        models = [m.model_copy(update={"checkpoint": text, "parameters": own}) for m in result.models]
        method = {"name": "ties", text: text}
        result = result.model_copy(update={"models": models, "method": method, "notes": [text, f"a note of {text}"]})
        base = CheckpointSpec(source=text, path=Path(checkpoints[0]))
        return model_card(spec.model_copy(update={"name": text, "base": base}), plan, result)

    return make


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_from_outside_are_shown_as_they_are(card: Callable[[str], str], text: str) -> None:
    front, body = card(text).split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---"))["model-index"][0]["name"] == text
    shown, plain = Shown(body), Shown(card(PLAIN).split("\n---\n", 1)[1])
    assert shown.tags == plain.tags
    in_line = " ".join(text.split())
    value = " ".join(json.dumps(text, ensure_ascii=False).split())
    assert shown.text == plain.text.replace(f'"{PLAIN}"', value).replace(PLAIN, in_line)


def test_ordinary_texts_are_written_as_they_are(card: Callable[[str], str]) -> None:
    text = "hf:org/my_model-7b@main, 1.5 % (\"a\"; 'b')"
    assert f"# {text}\n" in card(text)
    assert f"\n- a note of {text}\n" in card(text)
    assert f"is `{text}`." in card(text)
