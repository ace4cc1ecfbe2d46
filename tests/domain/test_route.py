"""From a name to where it is served."""

from __future__ import annotations

import pytest

from gateway.domain.route import Catalogue, Model, Target, Unpriced

FLARE = Model("gpt-image-2.5-flare", Target("openai", "gpt-image-2.5-flare"))
ART = Model("team-art", Target("openai", "gpt-image-2.5-flare"))
OLD = Model("dall-e-3", Target("openai", "gpt-image-2.5-flare"), label="dall-e-3")
ANY = Model(
    "*", Target("relay", "*"), Unpriced.ALLOW, strict=True, cache_enabled=False, label="ignored"
)
NAMED = {model.name: model for model in (FLARE, ART, OLD)}


@pytest.mark.parametrize("model", [FLARE, ART, OLD], ids=lambda model: str(model.name))
@pytest.mark.parametrize("wildcard", [None, ANY])
def test_a_configured_name_is_itself(model: Model, wildcard: Model | None) -> None:
    assert Catalogue(NAMED, wildcard).find(model.name) is model


@pytest.mark.parametrize("name", ["dall-e-4", "", "*", "GPT-IMAGE-2.5-FLARE", " team-art"])
def test_without_a_wildcard_only_configured_names_are_served(name: str) -> None:
    assert Catalogue(NAMED).find(name) is None


def test_the_wildcard_serves_any_other_name_under_its_own_rules() -> None:
    found = Catalogue(NAMED, ANY).find("brand-new")
    assert found == Model(
        "brand-new",
        Target("relay", "brand-new"),
        Unpriced.ALLOW,
        strict=True,
        cache_enabled=False,
        label="other",
    )


@pytest.mark.parametrize("name", ["", "*"])
def test_no_name_and_the_star_itself_are_no_names(name: str) -> None:
    assert Catalogue(NAMED, ANY).find(name) is None


def test_an_empty_catalogue_serves_nothing() -> None:
    assert Catalogue().find("gpt-image-2") is None
    assert Catalogue().nearest("gpt-image-2") is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dall-e-4", OLD),
        ("dalle3", OLD),
        ("gpt-image-2.5", FLARE),
        ("gpt-image-2.5-flair", FLARE),
        ("teamart", ART),
        ("stable-diffusion-xl", None),
        ("", None),
        ("x", None),
    ],
)
def test_the_nearest_name(name: str, nearest: Model | None) -> None:
    assert Catalogue(NAMED, ANY).nearest(name) is nearest
