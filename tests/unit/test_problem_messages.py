"""Validation messages follow the name of a field, and say what is there and what must be."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.contracts.requests import MergeRequest
from app.services.bodies import field_of
from worker.engine.catalog.primitives.words import message_of

MODEL = {"name": "a", "checkpoint": "local:x"}


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"output": {"alignment_rows": 7}}, "output.alignment_rows", "must be greater than or equal to 16, not 7"),
        ({"output": {"alignment_rows": "64"}}, "output.alignment_rows", 'must be a whole number, not "64"'),
        ({"evaluate": "off"}, "evaluate", 'must be true or false, not "off"'),
        ({"models": []}, "models", "must have at least 1 item, not 0"),
        ({"models": [{"name": "a"}]}, "models.0.checkpoint", "is missing; give it"),
        ({"models": [{**MODEL, "name": "a/b"}]}, "models.0.name", "must match pattern '^["),
        ({"output": {"dtype": "f16" * 30}}, "output.dtype", "must be 'auto', 'float64', 'float32'"),
        ({"models": {"name": "a"}}, "models", "must be a list"),
        ({"method": ["ties"]}, "method", "must be an object"),
        ({"name": 3}, "name", "must be a text, not 3"),
        ({"webhook": {"url": "u:secret"}}, "webhook.url", "has a scheme that must be 'http' or"),
        ({"method": {"name": "ties", "density": 3}}, "method.density", "must be less than or equal to 1, not 3"),
    ],
)  # fmt: skip
def test_messages_name_the_limit_and_the_value(change: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        MergeRequest.model_validate({"method": {"name": "average"}, "models": [MODEL], **change})
    found = {field_of(("body", *error["loc"])): message_of(error) for error in caught.value.errors()}
    assert found[field].startswith(said)
    assert "secret" not in str(found)
    raw = ("should", "valid", "discriminator", "instance")
    assert not any(word in message for message in found.values() for word in raw)
