"""Recipes: the shipped ones are valid, and a mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training.recipe import InvalidRecipe, load_recipe

SHIPPED = ["eurosat", "fashion-mnist", "smoke"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_has_the_four_members(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert {"adversarial", "bayesian", "edge", "metric"} <= recipe.members.keys()
    assert [member for member in recipe.members if not recipe.hardened(member)] == ["bayesian"]


def test_a_precision_in_place_of_the_recipes_makes_another_training() -> None:
    as_it_is, changed = load_recipe("smoke"), load_recipe("smoke", "32-true")
    assert (as_it_is.precision, changed.precision) == ("bf16-mixed", "32-true")
    assert as_it_is.fingerprint("edge") != changed.fingerprint("edge")


def test_an_unknown_recipe_is_answered_with_those_that_ship() -> None:
    with pytest.raises(
        InvalidRecipe,
        match=r"no recipe 'eurosta': shipped are eurosat, eurosat-equal-size, fashion-mnist, smoke",
    ):
        load_recipe("eurosta")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"epsilonn": 4}, "epsilonn", id="an unknown key"),
        pytest.param({"epsilon": -1}, "greater than 0", id="a negative radius"),
        pytest.param({"members": {"edge": {}}}, "give it an `attack:` section", id="a voter that is not hardened"),
        pytest.param({"members": {"certified": {"attack": {}}}}, "leave `attack:` out", id="an inner attack beside bounds"),
        pytest.param({"members": {"magic": {}}}, "magic", id="a member no file defines"),
        pytest.param(
            {"members": {"edge": {"attack": {}, "settings": {"clean_sharee": 0.5}}}},
            "'clean_sharee'; it has clean_share",
            id="a misspelt setting of a defense",
        ),
        pytest.param(
            {"members": {"metric": {"attack": {}, "network": {"radus": 3}}}},
            "member metric: network.radus: Extra inputs",
            id="a misspelt setting of a network",
        ),
        pytest.param(
            {"members": {"bayesian": {"schedule": {"optimizer": "adam", "weight_decay": 0.01}}}},
            "adam has no weight_decay here",
            id="a setting that the optimizer does not read",
        ),
        pytest.param(
            {
                "epsilon": 32,
                "members": {"adversarial": {"attack": {}, "network": {"thermometer": {"thresholds": [32], "width": 9}}}},
            },
            "surrogate_reach 25.5 is less than epsilon, 32",
            id="a thermometer whose gradient does not reach",
        ),
    ],
)
def test_a_mistake_in_a_recipe_is_named(change: dict[str, object], says: str, tmp_path: Path) -> None:
    document = load_recipe("smoke").model_dump(mode="json") | change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(InvalidRecipe, match=says):
        load_recipe(str(path))


def test_a_members_fingerprint_ignores_the_other_members() -> None:
    recipe = load_recipe("smoke")
    members = dict(recipe.members)
    members["edge"] = members["edge"].model_copy(update={"settings": {"clean_share": 0.5}})
    changed = recipe.model_copy(update={"members": members})
    assert changed.fingerprint("metric") == recipe.fingerprint("metric")
    assert changed.fingerprint("edge") != recipe.fingerprint("edge")
