"""Recipes: published numbers are the published ones, what is set wins, what cannot be is named."""

from __future__ import annotations

import pytest
import yaml

from wsimil.config import PretrainConfig
from wsimil.errors import ConfigError
from wsimil.pretraining.presets import Recipe, differences, preset, resolve_recipe
from wsimil.settings import read_settings


def test_self_vit_mil_is_the_published_schedule() -> None:
    recipe = resolve_recipe(PretrainConfig(size="self-vit-mil"), n_slides=270)
    assert recipe.arch == "vit_small_patch16_224" and recipe.init == "scratch" and recipe.drop_path == 0.1
    assert (recipe.global_views, recipe.global_px, recipe.global_scale) == (2, 224, (0.4, 1.0))
    assert (recipe.local_views, recipe.local_px, recipe.local_scale) == (8, 96, (0.05, 0.4))
    assert (recipe.hidden, recipe.bottleneck, recipe.prototypes, recipe.norm_last_layer) == (2048, 256, 65536, True)
    assert recipe.momentum == (0.996, 1.0) and recipe.student_temp == 0.1 and recipe.spread == "none"
    assert recipe.teacher_temp[:2] == (0.04, 0.04) and recipe.centring == "ema"
    assert (recipe.epochs, recipe.tiles_per_slide, recipe.batch_size) == (100, 1024, 64)
    assert recipe.lr == pytest.approx(5e-4 * 64 / 256) and recipe.min_lr == 1e-6
    assert (recipe.warm_up, recipe.freeze_last) == (10 / 100, 1 / 100)
    assert recipe.weight_decay == (0.04, 0.4) and recipe.clip_norm == 3.0 and recipe.precision == "fp16"
    assert recipe.mean == (0.6223, 0.4763, 0.6009) and recipe.std == (0.2012, 0.2190, 0.1722)
    assert recipe.steps == 100 * 1024 * 270 // 64


def test_its_views_are_the_published_ones() -> None:
    from wsimil.pretraining.methods import view_recipe

    views = view_recipe(preset("dino", "self-vit-mil"))
    assert views.jitter == (0.4, 0.4, 0.2) and views.hue == 0.1 and views.jitter_p == 0.8 and views.grey_p == 0.2
    assert views.blur_p == (1.0, 0.1, 0.5) and views.solarise_p == 0.2 and not views.all_turns and views.hed_sigma == 0


@pytest.mark.parametrize("size", ["toy", "lab", "multi"])
@pytest.mark.parametrize("method", ["dino", "mae"])
def test_every_other_preset_keeps_hue_and_light_as_they_are(method: str, size: str) -> None:
    from wsimil.pretraining.methods import view_recipe
    from wsimil.pretraining.views import ViewRecipe

    recipe = resolve_recipe(PretrainConfig(method=method, size=size), n_slides=10)  # type: ignore[arg-type]
    views: ViewRecipe = view_recipe(preset_with_colours(recipe))
    assert views.hue == 0 and views.solarise_p == 0 and views.all_turns and views.hed_sigma > 0
    assert recipe.steps > 0 and recipe.lr > 0


def preset_with_colours(recipe: Recipe) -> Recipe:
    from dataclasses import replace

    return replace(recipe, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_what_is_set_wins_over_the_preset() -> None:
    config = PretrainConfig(
        size="toy",
        steps=7,
        batch_size=8,
        lr=0.125,
        recipe_options=("momentum=[0.5, 0.9]", "spread=kde", "prototypes=64", "marks=true"),
    )
    recipe = resolve_recipe(config, n_slides=3)
    assert (recipe.steps, recipe.batch_size, recipe.lr) == (7, 8, 0.125)
    assert recipe.momentum == (0.5, 0.9) and recipe.spread == "kde" and recipe.prototypes == 64 and recipe.marks is True


def test_learning_rate_follows_the_rule_for_the_batch() -> None:
    scratch = {size: resolve_recipe(PretrainConfig(size="lab", init="scratch", batch_size=size), n_slides=1) for size in (64, 256)}
    assert scratch[256].lr == pytest.approx(5e-4) and scratch[64].lr == pytest.approx(2.5e-4)
    begun = resolve_recipe(PretrainConfig(size="lab", init="imagenet"), n_slides=1)
    assert begun.lr == pytest.approx(1e-4) and begun.layer_decay == 0.7 and scratch[256].layer_decay == 1.0


@pytest.mark.parametrize("other", [{"arch": "vit_small_patch16_224"}, {"init": "imagenet"}])
def test_another_network_and_given_weights_have_their_own_depth_and_patches(other: dict) -> None:
    toy = resolve_recipe(PretrainConfig(method="mae", size="toy"), n_slides=1)
    assert (toy.depth, toy.patch_px) == (6, 8) and toy.global_px % toy.patch_px == 0
    own = resolve_recipe(PretrainConfig(method="mae", size="toy", **other), n_slides=1)
    assert (own.depth, own.patch_px) == (0, 0)
    options = ("depth=3", "patch_px=4")
    asked = resolve_recipe(PretrainConfig(method="mae", size="toy", recipe_options=options, **other), n_slides=1)
    assert (asked.depth, asked.patch_px) == (3, 4)


def test_patches_have_to_fill_a_view() -> None:
    with pytest.raises(ConfigError, match="global_px is 30, patches are 8 px"):
        resolve_recipe(PretrainConfig(method="mae", size="toy", recipe_options=("global_px=30",)), n_slides=1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"recipe_options": ("momentun=0.5",)}, "did you mean momentum"),
        ({"recipe_options": ("momentum=0.5",)}, "momentum is"),
        ({"recipe_options": ("prototypes=many",)}, "whole number"),
        ({"recipe_options": ("centring=sideways",)}, "ema, sinkhorn"),
        ({"recipe_options": ("global_scale=[0.9, 0.1]",)}, "global_scale"),
        ({"recipe_options": ("mean=0.5",)}, "three numbers"),
        ({"recipe_options": ("std=0,0,0",)}, "std is .*more than 0"),
        ({"recipe_options": ("local_px=0",)}, "local_px is 0; expected at least 1"),
        ({"recipe_options": ("prototypes=1",)}, "prototypes is 1; expected at least 2"),
        ({"recipe_options": ("lr_batch=0",)}, "lr_batch is 0"),
        ({"recipe_options": ("distinct=-3",)}, "distinct is -3; expected 0 or more"),
        ({"recipe_options": ("drop_path=1.5",)}, "drop_path is 1.5; .*less than 1"),
        ({"recipe_options": ("momentum=2,1",)}, "momentum is .*0 to 1"),
        ({"recipe_options": ("momentum=nan,1",)}, "momentum is .*0 to 1"),
        ({"recipe_options": ("global_views=1", "local_views=0")}, "two views and more"),
        ({"recipe_options": ("student_temp=0",)}, "student_temp is 0"),
        ({"recipe_options": ("teacher_temp=0,0.04,0.3",)}, "teacher_temp is 0"),
        ({"method": "mae", "size": "self-vit-mil"}, "preset of dino"),
        ({"batch_size": 10, "devices": 4}, "--batch-size 8"),
        ({"method": "weak", "size": "toy", "batch_size": 4, "accumulate": 4}, "parts of one tile .*--batch-size 8"),
    ],
)
def test_what_cannot_be_is_named(config: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_recipe(PretrainConfig(**config), n_slides=1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"mpp_range": "1-0.25"}, "low-high"),
        ({"mpp_range": "0.5"}, "low-high"),
        ({"steps": 5, "hours": 1.0}, "keep one"),
        ({"recipe_options": ("prototypes",)}, "name=value"),
    ],
)
def test_settings_that_contradict_are_refused(config: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PretrainConfig(**config)


def test_options_mean_the_same_in_yaml(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"pretrain": {"recipe_options": {"momentum": [0.5, 0.9], "norm_pix": False}}}))
    config = read_settings(["pretrain"], path).pretrain
    recipe = resolve_recipe(config, n_slides=1)
    assert recipe.momentum == (0.5, 0.9) and recipe.norm_pix is False


def test_differences_name_both_values() -> None:
    assert differences({"a": 1, "b": (1, 2)}, {"a": 2, "b": [1, 2]}) == ["a: 1 there, 2 here"]
