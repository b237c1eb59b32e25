"""Chat templates are Jinja in transformers' dialect, or are named as none."""

from pathlib import Path

import pytest

from tests.tiny import edit_json, tiny_checkpoint
from worker.engine.catalog.checkpoints.inspection import inspect_checkpoint
from worker.engine.catalog.planning.planner import plan_merge
from worker.engine.catalog.planning.publishing import with_companions
from worker.engine.catalog.planning.templates import check_templates, problem_of
from worker.engine.catalog.primitives.errors import InvalidRequest
from worker.engine.catalog.primitives.notes import Doubt

BROKEN = [
    "{% broken",
    "{{ messages",
    "{% if a %}",
    "{% unknown %}",
    "{% for m in messages %}{% endif %}",
    "{{ " + "(" * 9000,
]
READ = [
    "{{ messages }}",
    "{% for m in messages %}{% if m.last %}{% break %}{% endif %}{% continue %}{% endfor %}",
    "{% generation %}{{ messages[0]['content'] | tojson }}{% endgeneration %}",
    "plain text",
]


@pytest.mark.parametrize("template", BROKEN)
def test_what_is_no_jinja_has_a_problem(template: str) -> None:
    assert problem_of(template)


@pytest.mark.parametrize("template", READ)
def test_what_transformers_reads_has_none(template: str) -> None:
    assert problem_of(template) is None


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer_config.json"]
)
def test_a_checkpoint_s_broken_template_is_a_note_that_leads(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "expert")
    if name.endswith(".json"):
        edit_json(folder / name, chat_template="{% broken")
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{% broken")
    plan = plan_merge([inspect_checkpoint(folder, "local:expert")])
    [note] = check_templates(with_companions(plan, "auto"), None)
    assert isinstance(note, Doubt)
    assert "of local:expert is no Jinja" in note


def test_a_broken_template_that_is_asked_for_is_refused_and_a_good_one_taken(tmp_path: Path) -> None:
    plan = plan_merge([inspect_checkpoint(tiny_checkpoint(tmp_path / "expert"), "local:expert")])
    assert check_templates(with_companions(plan, "auto", chat_template="{{ 1 }}"), "{{ 1 }}") == []
    with pytest.raises(InvalidRequest, match="it is no Jinja"):
        check_templates(with_companions(plan, "auto", chat_template="{% broken"), "{% broken")
