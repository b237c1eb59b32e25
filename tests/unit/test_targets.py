"""Places to publish at: which there are, whose they are, and what is removed there."""

from typing import Any

import pytest

from app.contracts.output import Output
from app.contracts.patterns import overlaps
from app.contracts.settings import Settings
from app.contracts.targets import Target
from app.storage.targets import refusal
from app.storage.targets.hub import removed
from app.storage.targets.target import NotPublished

MERGE = {"model.safetensors", "config.json", "manifest.json"}


@pytest.mark.parametrize(
    "target", ["s3:models/a//b", "s3:models/a/./b", "s3:models/a/../b", "s3:models/a//", "s3:mo/a"]
)
def test_a_place_that_object_storage_cannot_have_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="is no place to publish at"):
        Target.parse(target)


def test_a_slash_at_the_end_makes_no_other_place() -> None:
    assert Target.parse("s3:models/a/") == Target.parse("s3:models/a") == Target("s3", "models/a", None)
    with pytest.raises(ValueError, match="names a place twice"):
        Output(publish=["s3:models/a", "s3:models/a/"])


def test_names_on_the_hub_alone_are_the_same_in_any_case() -> None:
    with pytest.raises(ValueError, match="names a place twice"):
        Output(publish=["hf:acme/Reviews", "hf:Acme/reviews"])
    assert len(Output(publish=["mlflow:prod/Reviews", "mlflow:prod/reviews"]).publish) == 2


@pytest.mark.parametrize(
    ("pattern", "own"),
    [
        ("mlflow:prod/{tenant}_*", "mlflow:prod/{}_x"),
        ("mlflow:prod/{tenant}", "mlflow:prod/{}"),
        ("s3:models/{tenant}/*", "s3:models/{}/x"),
        ("hf:team-{tenant}/*", "hf:team-{}/x"),
        ("hf:acme/{tenant}.*", "hf:acme/{}.x"),
        ("hf:Team-{tenant}/*", "hf:teaM-{}/x"),
        ("s3:models/_/{tenant}/*,s3:models/{tenant},s3:other/{tenant}/*", "s3:models/{}"),
    ],
)
def test_a_pattern_keeps_tenants_apart(pattern: str, own: str) -> None:
    settings = Settings(
        publish_targets=pattern, hub_token_file="token", mlflow_servers={"prod": {"url": "https://mlflow.org"}}
    )
    for tenant in ("acme", "acme-eu", "eu"):
        may = [of for of in ("acme", "acme-eu", "eu") if not refusal(Target.parse(own.format(of)), tenant, settings)]
        assert may == [tenant]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"publish_targets": "mlflow:prod/{tenant}-*"}, "lets tenants publish at each other's places"),
        ({"publish_targets": "mlflow:prod/{tenant}*"}, "lets tenants publish at each other's places"),
        ({"publish_targets": "hf:acme/*-{tenant}"}, "no \\* may come before"),
        ({"publish_targets": "s3:m-1/{tenant}/*,s3:m-1/eu-{tenant}/*"}, "may be or begin with 'eu-'"),
        ({"publish_targets": "s3:m-1/eu/{tenant}/*,s3:m-1/{tenant}/*"}, "let tenants publish at each other's places"),
        ({"publish_targets": "hf:Acme-{tenant}/*,hf:acme-eu-{tenant}/*"}, "may be or begin with 'eu-'"),
        ({"publish_targets": "foo"}, "matches no place"),
        ({"publish_targets": "hf:"}, "matches no place"),
        ({"publish_targets": "hf:acme"}, "is no place to publish at"),
        ({"publish_targets": "mlflow:prod/x@champion"}, "matches no place"),
        ({"publish_targets": "hf:acme/{user}"}, "matches no place"),
        ({"local_roots": "s3:models/x"}, "MASKMERGE_S3_BUCKETS"),
        ({"artifact_store": "s3:models/team-acme/out", "s3_buckets": "models/team-{tenant}"}, "read as inputs"),
        ({"artifact_store": "s3:models/out", "publish_targets": "s3:models/*"}, "could be written to"),
        ({"artifact_store": "s3:models/out", "publish_targets": "hf:a/*,s3:models/out/{tenant}/*"}, "could be written"),
    ],
)
def test_settings_that_mean_nothing_or_too_much_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Settings(**setting)


@pytest.mark.parametrize(
    ("pattern", "place", "expected"),
    [
        ("models/team-{tenant}", "models/team-acme/out", True),
        ("models/team-{tenant}", "models/team-acme", True),
        ("models/team-{tenant}", "models", True),
        ("models/team-{tenant}", "models/team", False),
        ("models/team-{tenant}", "models/teams/out", False),
        ("models/{tenant}/in/{tenant}", "models/a/in/b", False),
        ("models/{tenant}/in/{tenant}", "models/a/in/a", True),
        ("teams-{tenant}", "results/out", False),
        ("teams-{tenant}", "teams-acme/out", True),
        ("models/{tenant}_x", "models/UPPER_x", False),
        ("models/", "models/out", True),
        ("models", "models-2/out", False),
        ("models/out/sub", "models/out", True),
        ("models/output", "models/out", False),
        ("models/o*", "models/out", True),
        ("models/*/sub", "models/out", True),
        ("models/in/*", "models/out", False),
        ("*", "models/out", True),
    ],
)
def test_places_overlap_where_some_tenant_could_name_both(pattern: str, place: str, expected: bool) -> None:
    assert overlaps(pattern, place) is expected


def test_files_that_no_merge_made_stay() -> None:
    foreign = {"onnx/model.safetensors", "checkpoint-500/model.safetensors", "notes.md", "pytorch_model.bin"}
    shards = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert removed(foreign | shards | MERGE, shards | {"recipe.json"}, MERGE) == shards
    assert removed(foreign | {"model.safetensors"}, set(), MERGE) == set()


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"]
)
def test_foreign_weights_beside_the_models_are_refused(name: str) -> None:
    with pytest.raises(NotPublished, match=name):
        removed({name}, set(), MERGE)
    with pytest.raises(NotPublished, match=name):
        removed({f"models/a/{name}"}, set(), {"models/a/model.safetensors"})
    assert removed({name}, set(), {"models/a/model.safetensors"}) == set()
