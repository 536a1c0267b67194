"""Recipes: every number of a pretraining run, as presets that settings override; nothing is decided elsewhere.

- Warm-ups, ramps and schedules are shares of the run, so a preset means the same for 200 steps and for 200,000.
- `self-vit-mil` is the published schedule of Self-ViT-MIL (arXiv 2210.09021) number by number, its `solarise` and `hue` included;
  the others follow what later work on tissue found: stain jitter instead of hue, no solarise, both flips, quarter turns.
- A resolved recipe has no open question: learning rate, number of steps and precision are numbers in it. It is written beside
  the encoder, and a run is resumed by the same recipe only.
- No torch here.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from wsimil.config import PretrainConfig
from wsimil.errors import ConfigError
from wsimil.settings import nearest

__all__ = ["Recipe", "differences", "preset", "resolve_recipe"]


_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("at least 1", lambda x: x >= 1, (
        "batch_size", "bottleneck", "hidden", "decoder_dim", "global_px", "global_views", "local_px", "panel_tiles",
        "lr_batch", "tiles",
    )),
    ("at least 2", lambda x: x >= 2, ("prototypes",)),
    ("0 or more", lambda x: x >= 0, (
        "depth", "patch_px", "local_views", "stain_sigma", "spread_weight", "decoder_blocks", "skip_std", "lr_power", "lr",
        "min_lr", "weight_decay", "clip_norm", "steps", "epochs", "tiles_per_slide", "area_power", "distinct",
    )),
    ("more than 0", lambda x: x > 0, ("std", "student_temp", "base_lr", "max_lr")),
    ("a share of the run, 0 to 1", lambda x: 0 <= x <= 1, ("freeze_last", "warm_up")),
    ("a share of the run, more than 0 up to 1", lambda x: 0 < x <= 1, ("panel_every",)),
    ("0 to 1", lambda x: 0 <= x <= 1, ("momentum",)),
    ("more than 0 and up to 1", lambda x: 0 < x <= 1, ("layer_decay",)),
    ("0 and more, less than 1", lambda x: 0 <= x < 1, ("drop_path", "beta2")),
    ("more than 0 and less than 1", lambda x: 0 < x < 1, ("mask_ratio",)),
    ("1 to 4", lambda x: 1 <= x <= 4, ("trained_blocks",)),
)  # fmt: skip
"""What numbers of a recipe may be, each of a list by itself."""


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. Those of the other method are there too and change nothing."""

    method: Literal["dino", "mae", "weak"]

    # the network
    arch: str = "vit_small_patch16_224"
    depth: int = 0  # transformer blocks; 0: the architecture's
    patch_px: int = 0  # side of a ViT's patches; 0: the architecture's
    init: str = "scratch"  # or imagenet, or an encoder
    drop_path: float = 0.1  # of the student
    mean: tuple[float, ...] = ()  # of the colours; none: those of the weights it begins with, else ImageNet's
    std: tuple[float, ...] = ()

    # views: boxes of a tile, as shares of its area, made this many pixels wide
    global_px: int = 224
    global_views: int = 2
    global_scale: tuple[float, ...] = (0.32, 1.0)
    local_px: int = 96
    local_views: int = 8
    local_scale: tuple[float, ...] = (0.05, 0.32)
    augmentation: Literal["histology", "published"] = "histology"
    stain_sigma: float = 0.015  # HED jitter of each view, in units of scikit-image's rgb2hed (views.py): .06 swamps the tissue

    # DINO
    prototypes: int = 65536
    bottleneck: int = 256
    hidden: int = 2048
    centring: Literal["ema", "sinkhorn"] = "sinkhorn"
    teacher_temp: tuple[float, ...] = (0.04, 0.07, 0.25)  # from, to, share of the run
    student_temp: float = 0.1
    momentum: tuple[float, ...] = (0.996, 1.0)  # of the teacher, half a cosine
    freeze_last: float = 0.01  # share of the run in which the prototypes stand still
    norm_last_layer: bool = True
    spread: Literal["none", "kde", "koleo"] = "kde"
    spread_weight: float = 0.005

    # MAE
    decoder_dim: int = 192
    decoder_blocks: int = 2
    mask_ratio: float = 0.75
    norm_pix: bool = True
    skip_std: float = 0.02  # patches flatter than this in every colour are glass: their normalised pixels would be noise

    # slide labels
    trained_blocks: int = 4  # of a DenseNet's, from the last: KimiaNet's configurations I to IV

    # optimiser: AdamW, linear warm-up, half a cosine
    batch_size: int = 256
    base_lr: float = 5e-4  # at a batch of `lr_batch`
    lr_batch: int = 256
    lr_power: float = 0.5  # growth with the batch: 1 linear, .5 by the square root
    lr: float = 0.0  # peak; 0: by the rule above
    max_lr: float = 1e-3  # the rule goes no higher
    min_lr: float = 1e-6
    warm_up: float = 0.05
    weight_decay: tuple[float, ...] = (0.04, 0.2)  # from, to, half a cosine; none on biases and norms
    beta2: float = 0.999
    layer_decay: float = 1.0  # each block below the last learns this much slower
    clip_norm: float = 3.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"

    # length
    steps: int = 0  # 0: tiles / batch_size
    tiles: int = 1_000_000  # presentations
    epochs: int = 0  # in place of tiles: passes of tiles_per_slide tiles of every slide, drawn anew each time
    tiles_per_slide: int = 0
    area_power: float = 0.5  # how often a slide is drawn: tissue area to this power; 0: all alike
    distinct: int = 0  # so many different tiles, shown again and again (what a tile cache is for); 0: every tile is new

    # health panel
    panel_tiles: int = 2048
    panel_every: float = 0.05  # share of the run
    marks: bool = False  # keep the weights of every panel, not only the last good ones

    def __post_init__(self) -> None:
        for name, length in (("teacher_temp", 3), ("momentum", 2), ("weight_decay", 2), ("global_scale", 2), ("local_scale", 2)):
            if len(getattr(self, name)) != length:
                raise ConfigError(f"recipe: {name} is {getattr(self, name)}; expected {length} numbers")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ConfigError(f"recipe: {name} is {low}, {high}; expected shares of a tile's area, 0 to 1")
        start, end, share = self.teacher_temp
        if not (0 < start < math.inf and 0 < end < math.inf and 0 <= share <= 1):
            raise ConfigError(f"recipe: teacher_temp is {start}, {end}, {share}; expected two above 0, and a share, 0 to 1")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise ConfigError(f"recipe: {name} is {getattr(self, name)}; expected three numbers, for red, green and blue")
        for expected, fits, names in _RANGES:
            for name in names:
                value = getattr(self, name)
                if not all(math.isfinite(part) and fits(part) for part in (value if isinstance(value, tuple) else (value,))):
                    raise ConfigError(f"recipe: {name} is {value}; expected {expected}")
        if self.method == "dino" and self.global_views + self.local_views < 2:
            raise ConfigError(
                f"recipe: {self.global_views} global and {self.local_views} local views; DINO compares two views and more of a tile"
            )
        if self.patch_px and self.global_px % self.patch_px:
            raise ConfigError(f"recipe: global_px is {self.global_px}, patches are {self.patch_px} px; expected a multiple of them")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: as set, or by the rule for the batch."""
        return self.lr or min(self.max_lr, self.base_lr * (self.batch_size / self.lr_batch) ** self.lr_power)


_DINO: dict[str, dict[str, Any]] = {
    "toy": {
        "arch": "vit_tiny_patch16_224", "depth": 6, "drop_path": 0.0,
        "global_px": 96, "global_scale": (0.4, 1.0), "local_px": 48, "local_views": 2, "local_scale": (0.15, 0.4),
        "prototypes": 1024, "bottleneck": 64, "hidden": 512, "teacher_temp": (0.04, 0.04, 0.0),
        # a running mean as centre let batches of 32 collapse in tens of steps: entropy of the mean answer = that of one tile
        "momentum": (0.95, 1.0), "freeze_last": 0.05, "centring": "sinkhorn", "spread": "kde", "spread_weight": 0.05,
        "batch_size": 32, "lr": 5e-4, "warm_up": 0.1, "weight_decay": (0.04, 0.04), "precision": "fp32",
        "tiles": 6_000, "panel_tiles": 512, "panel_every": 0.1,
    },
    "lab": {"local_views": 6, "prototypes": 8192, "init": "imagenet"},
    "multi": {
        "bottleneck": 384, "momentum": (0.994, 1.0), "warm_up": 0.03, "batch_size": 1024, "init": "imagenet",
        "tiles": 10_000_000, "marks": True,
    },
    "self-vit-mil": {
        "init": "scratch", "mean": (0.6223, 0.4763, 0.6009), "std": (0.2012, 0.2190, 0.1722),
        "global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4), "augmentation": "published", "stain_sigma": 0.0,
        "centring": "ema", "teacher_temp": (0.04, 0.04, 0.0), "spread": "none",
        "batch_size": 64, "lr_power": 1.0, "max_lr": 1.0, "warm_up": 0.1, "weight_decay": (0.04, 0.4), "precision": "fp16",
        "epochs": 100, "tiles_per_slide": 1024,
    },
}  # fmt: skip

_MAE: dict[str, dict[str, Any]] = {
    "toy": {
        # patches of 16 px of a tile made 112 px wide are larger than a nucleus: what is in one does not follow from its neighbours
        "arch": "vit_tiny_patch16_224", "depth": 6, "patch_px": 8, "global_px": 96, "global_scale": (0.25, 1.0), "decoder_dim": 96,
        "batch_size": 16, "lr": 2e-3, "warm_up": 0.1, "precision": "fp32", "tiles": 24_000, "panel_tiles": 512, "panel_every": 0.2,
    },
    "lab": {"base_lr": 6e-4, "max_lr": 2e-3},
    "multi": {
        "arch": "vit_base_patch16_224", "decoder_dim": 512, "decoder_blocks": 8, "batch_size": 1024, "base_lr": 1.5e-4,
        "max_lr": 5e-3, "lr_power": 1.0, "tiles": 20_000_000, "marks": True,
    },
}  # fmt: skip
_MAE_ALL: dict[str, Any] = {
    "drop_path": 0.0, "global_views": 1, "global_scale": (0.4, 1.0), "local_views": 0, "stain_sigma": 0.015, "beta2": 0.95,
    "weight_decay": (0.05, 0.05), "min_lr": 0.0,
}  # fmt: skip

_WEAK: dict[str, dict[str, Any]] = {
    "toy": {
        "arch": "resnet10t", "global_px": 96, "batch_size": 32, "lr": 1e-3, "warm_up": 0.1, "precision": "fp32", "tiles": 6_000,
        "panel_tiles": 256, "panel_every": 0.25,
    },
    "lab": {"init": "imagenet", "batch_size": 64, "base_lr": 1e-4, "lr_batch": 64, "warm_up": 0.05},
    "multi": {"init": "imagenet", "batch_size": 256, "base_lr": 1e-4, "lr_batch": 64, "warm_up": 0.05, "tiles": 5_000_000},
}  # fmt: skip
_WEAK_ALL: dict[str, Any] = {
    "arch": "densenet121", "global_px": 512, "global_views": 1, "global_scale": (0.8, 1.0), "local_views": 0, "stain_sigma": 0.06,
    "drop_path": 0.0, "weight_decay": (0.01, 0.01), "area_power": 0.0,
}  # fmt: skip
"""Slides alike often, whatever their size: a label is one per slide."""

_FINE_TUNING = {"base_lr": 1e-4, "layer_decay": 0.7}
"""What changes where weights are there already: small steps, smaller in the lower blocks."""


def preset(method: str, size: str) -> Recipe:
    """The numbers of one preset.

    Raises:
        ConfigError: this method has no such preset.
    """
    presets: Any = {"dino": _DINO, "mae": _MAE, "weak": _WEAK}[method]
    if size not in presets:
        raise ConfigError(f"pretrain.size {size} is a preset of dino, not of {method}; expected {', '.join(presets)}")
    shared = {"mae": _MAE_ALL, "weak": _WEAK_ALL}.get(method, {})
    recipe = Recipe(method, **{**shared, **presets[size]})  # type: ignore[arg-type]
    return replace(recipe, **_FINE_TUNING) if method == "dino" and recipe.init != "scratch" else recipe


def resolve_recipe(config: PretrainConfig, *, n_slides: int) -> Recipe:
    """The preset with everything that was set in its place, and what follows from it: learning rate and number of steps.

    With `hours` the number of steps is that of the preset until the run has been timed.

    Raises:
        ConfigError: an unknown name, or a value that no recipe can have.
    """
    recipe = preset(config.method, config.size)
    options = {name: _typed(name, value) for name, value in config.options().items()}
    chosen = {"arch": config.arch, "init": config.init, "steps": config.steps, "batch_size": config.batch_size, "lr": config.lr}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen.get("init") == "none":
        chosen["init"] = "scratch"
    init = {**options, **chosen}.get("init", recipe.init)
    if config.method == "dino" and config.size in ("lab", "multi") and init == "scratch":
        recipe = replace(recipe, base_lr=5e-4, layer_decay=1.0)
    if "arch" in chosen or init != "scratch":  # depth and patches of a preset belong to its network; weights bring their own
        recipe = replace(recipe, depth=0, patch_px=0)
    recipe = replace(recipe, **{**options, **chosen})
    if config.precision != "auto":
        recipe = replace(recipe, precision=config.precision)
    parts = config.devices * config.accumulate
    if recipe.batch_size % parts:
        raise ConfigError(
            f"a batch of {recipe.batch_size} tiles cannot be shared by {config.devices} devices in {config.accumulate} parts; "
            f"take --batch-size {max(1, recipe.batch_size // parts) * parts}"
        )
    if config.method == "weak" and recipe.batch_size == parts:
        raise ConfigError(f"parts of one tile have no statistics for batch normalisation; take --batch-size {2 * parts} or more")
    steps = recipe.steps or math.ceil(_presentations(recipe, n_slides) / recipe.batch_size)
    return replace(recipe, steps=steps, lr=recipe.peak_lr)


def _presentations(recipe: Recipe, n_slides: int) -> int:
    if not recipe.epochs:
        return recipe.tiles
    if not recipe.tiles_per_slide:
        raise ConfigError("recipe: epochs are passes of tiles_per_slide tiles of every slide; set tiles_per_slide too, or tiles")
    return recipe.epochs * recipe.tiles_per_slide * n_slides


def _typed(name: str, value: Any) -> Any:
    """A value of `recipe_options` as its field's kind."""
    hints = typing.get_type_hints(Recipe)
    settable = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("method",)]
    if name not in settable:
        raise ConfigError(f"pretrain.recipe_options: unknown name {name}{nearest(name, settable)}")
    hint = hints[name]
    try:
        if typing.get_origin(hint) is tuple:
            values = value if isinstance(value, list | tuple) else str(value).strip("()[]").split(",")
            return tuple(float(part) for part in values)
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                raise ConfigError(
                    f"pretrain.recipe_options: {name} is {value!r}; expected one of {', '.join(typing.get_args(hint))}"
                )
            return value
        if hint is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if hint is int:
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        return hint(value)
    except (TypeError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "numbers with commas between")
        raise ConfigError(f"pretrain.recipe_options: {name} is {value!r}; expected {kind}") from None


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two mappings say differently, each as `name: value there, value here`."""
    plain = [{key: list(value) if isinstance(value, tuple) else value for key, value in part.items()} for part in (one, other)]
    return [
        f"{key}: {plain[0].get(key)} there, {plain[1].get(key)} here"
        for key in sorted(plain[0].keys() | plain[1].keys())
        if plain[0].get(key) != plain[1].get(key)
    ]
