"""What a method of pretraining is made of: its network, its objective, its views, and how its tokens become one vector.

A method is an entry of `METHODS`; loop, panel, export and command know no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wsimil.batch import EncodesTokens, Objective
from wsimil.encoders.contract import IMAGENET_MEAN, IMAGENET_STD, Pooling
from wsimil.encoders.trainable import TrainableViT, param_groups, trainable_vit
from wsimil.encoders.trainable_cnn import TrainableCNN, trainable_cnn
from wsimil.errors import UsageError
from wsimil.objectives.dino import DinoObjective, MultiCrop
from wsimil.objectives.mae import MaeObjective, MaskedImages
from wsimil.objectives.weak_labels import LabelledTiles, WeakLabels
from wsimil.pretraining.feed import TileBatch
from wsimil.pretraining.labels import LabelledBatch
from wsimil.pretraining.loop import seed_of
from wsimil.pretraining.presets import Recipe
from wsimil.pretraining.views import DINO_VIEWS, MAE_VIEWS, SELF_VIT_MIL_VIEWS, ViewRecipe, mae_images, make_views

__all__ = ["METHODS", "Method", "build", "check_sizes", "network_of", "normalised", "pool", "view_recipe"]


@dataclass(frozen=True)
class Method:
    """One way of learning."""

    objective: Callable[[Recipe, Any, Sequence[str]], Objective]  # of a recipe, its network, and the names of the classes
    views: Callable[..., Any]  # (batch, seed=, recipe=, device=) → what the objective sees
    shown: Callable[[Any], list[Tensor]]  # of that, the images, for the picture of the views
    pooling: Pooling  # of the exported encoder
    labelled: bool = False  # whether slides have classes, which are learned from


def _dino(recipe: Recipe, model: TrainableViT, classes: Sequence[str]) -> Objective:
    return DinoObjective(
        model.embed_dim,
        prototypes=recipe.prototypes,
        bottleneck=recipe.bottleneck,
        hidden=recipe.hidden,
        centring=recipe.centring,
        teacher_temp=recipe.teacher_temp[:3],  # type: ignore[arg-type]
        student_temp=recipe.student_temp,
        momentum=recipe.momentum[:2],  # type: ignore[arg-type]
        freeze_last=recipe.freeze_last,
        spread=recipe.spread,
        spread_weight=recipe.spread_weight,
        norm_last_layer=recipe.norm_last_layer,
    )


def _mae(recipe: Recipe, model: TrainableViT, classes: Sequence[str]) -> Objective:
    return MaeObjective(
        model.embed_dim,
        patch_px=model.patch_px,
        decoder_dim=recipe.decoder_dim,
        decoder_blocks=recipe.decoder_blocks,
        mask_ratio=recipe.mask_ratio,
        norm_pix=recipe.norm_pix,
        skip_std=recipe.skip_std,
        pixel_std=recipe.std[:3],  # type: ignore[arg-type]
    )


def _weak(recipe: Recipe, model: TrainableCNN, classes: Sequence[str]) -> Objective:
    return WeakLabels(model.embed_dim, classes, trained_blocks=recipe.trained_blocks)


def _dino_views(batch: TileBatch, *, seed: int, recipe: ViewRecipe, device: Any) -> MultiCrop:
    return make_views(batch.pixels, batch.numbers, seed=seed, recipe=recipe, device=device)


def _mae_views(batch: TileBatch, *, seed: int, recipe: ViewRecipe, device: Any) -> MaskedImages:
    return mae_images(batch.pixels, batch.numbers, seed=seed, recipe=recipe, device=device)


def _weak_views(batch: LabelledBatch, *, seed: int, recipe: ViewRecipe, device: Any) -> LabelledTiles:
    (images,) = make_views(batch.pixels, batch.numbers, seed=seed, recipe=recipe, device=device).globals_
    return LabelledTiles(images, torch.from_numpy(batch.targets).to(device))


def _crops(views: MultiCrop) -> list[Tensor]:
    return [*views.globals_, *views.locals_]


METHODS: dict[str, Method] = {
    "dino": Method(_dino, _dino_views, _crops, "cls"),
    "mae": Method(_mae, _mae_views, lambda views: [views.images], "mean"),
    "weak": Method(_weak, _weak_views, lambda views: [views.images], "model", labelled=True),
}


def network_of(recipe: Recipe, *, seed: int) -> TrainableViT | TrainableCNN:
    """The network before its first step."""
    init = None if recipe.init in ("scratch", "none") else recipe.init
    if METHODS[recipe.method].pooling == "model":
        return trainable_cnn(recipe.arch, init=init, seed=seed)
    return trainable_vit(
        recipe.arch,
        init=init,
        tile_px=recipe.global_px,
        drop_path=recipe.drop_path,
        depth=recipe.depth or None,
        patch_px=recipe.patch_px or None,
        seed=seed,
    )


def check_sizes(recipe: Recipe, model: TrainableViT | TrainableCNN) -> None:
    """Raises UsageError where a view is no whole number of the network's patches wide, or one patch of which some are hidden."""
    if not isinstance(model, TrainableViT):
        return
    patch_px = model.patch_px
    for name in ("global_px", "local_px") if recipe.local_views else ("global_px",):
        px = getattr(recipe, name)
        if px % patch_px:
            below, above = px // patch_px * patch_px, (px // patch_px + 1) * patch_px
            fits = f"{below} or {above}" if below else f"{above}"
            raise UsageError(
                f"views of {px} px are no whole number of patches of {model.architecture}, {patch_px} px each; say "
                f"--recipe-options {name}={fits}"
            )
    if recipe.method == "mae" and recipe.global_px <= patch_px:
        raise UsageError(
            f"views of {recipe.global_px} px are one patch of {model.architecture}: nothing of it can be hidden; say "
            f"--recipe-options global_px={2 * patch_px} or more, or a smaller patch_px"
        )


def normalised(recipe: Recipe, model: TrainableViT | TrainableCNN) -> Recipe:
    """The recipe with mean and deviation of the colours, and with the patches that are hidden.

    Colours are the recipe's own, else those of the weights it begins with, else ImageNet's; patches are the network's.
    """
    start = model.start
    mean, std = (start.mean, start.std) if start is not None else (IMAGENET_MEAN, IMAGENET_STD)
    if recipe.method == "mae" and isinstance(model, TrainableViT):
        recipe = replace(recipe, patch_px=model.patch_px)
    return replace(recipe, mean=recipe.mean or mean, std=recipe.std or std)


def build(
    recipe: Recipe, *, seed: int, classes: Sequence[str] = ()
) -> tuple[TrainableViT | TrainableCNN, Objective, list[dict[str, Any]]]:
    """Network, objective and the groups of their parameters, as they are before the first step."""
    model = network_of(recipe, seed=seed)
    torch.manual_seed(seed_of(seed, "objective"))
    objective = METHODS[recipe.method].objective(recipe, model, classes)
    objective.prepare(model)
    patch_embed_lr = 0.2 if recipe.init != "scratch" else 1.0  # a patch embedding that has learned is best left alone
    groups = param_groups(model, weight_decay=recipe.weight_decay[0], layer_decay=recipe.layer_decay, patch_embed_lr=patch_embed_lr)
    return model, objective, groups + param_groups(objective, weight_decay=recipe.weight_decay[0])


def view_recipe(recipe: Recipe) -> ViewRecipe:
    """How the views of this recipe are made."""
    base = MAE_VIEWS if recipe.method == "mae" else SELF_VIT_MIL_VIEWS if recipe.augmentation == "published" else DINO_VIEWS
    return replace(
        base,
        n_global=recipe.global_views,
        global_px=recipe.global_px,
        global_scale=recipe.global_scale,
        n_local=recipe.local_views,
        local_px=recipe.local_px,
        local_scale=recipe.local_scale,
        patch_px=recipe.patch_px or base.patch_px,
        hed_sigma=recipe.stain_sigma,
        mean=recipe.mean,
        std=recipe.std,
    )


def pool(model: nn.Module, images: Tensor, pooling: Pooling) -> Tensor:
    """(B, 3, px, px) → (B, D) of a network in training, as the exported encoder will pool it."""
    if pooling == "mean" and isinstance(model, EncodesTokens):
        return model.encode_tokens(images).mean(1)
    return model(images)
