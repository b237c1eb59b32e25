"""What a request says of itself before anything is looked up."""

import pytest

from app.contracts.requests import MergeRequest


def titled(*names: str) -> str:
    models = [{"name": name, "checkpoint": "local:x"} for name in names]
    return MergeRequest.model_validate({"method": {"name": "average"}, "models": models}).title


@pytest.mark.parametrize("count", [1, 3, 4, 64])
def test_the_name_of_many_models_is_one_that_a_request_may_have(count: int) -> None:
    names = [f"{number:060}" for number in range(count)]
    title = titled(*names)
    joined = "+".join(names)
    assert title == (joined if len(joined) <= 200 else joined[:199] + "…")
    models = [{"name": "a", "checkpoint": "local:x"}]
    again = MergeRequest.model_validate({"name": title, "method": {"name": "average"}, "models": models})
    assert again.title == title
