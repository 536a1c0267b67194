"""Every setting of every stage: its name, default, range and one-line meaning, in one place.

A section per stage, a frozen dataclass each; `wsimil.settings` reads them from YAML and from the command line.
No torch here: `wsimil --help` reads this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from wsimil.errors import ConfigError

__all__ = [
    "SECTIONS",
    "STUDY_SECTIONS",
    "ConvertConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FilterConfig",
    "HeatmapConfig",
    "JobConfig",
    "LabelsConfig",
    "PredictConfig",
    "PretrainConfig",
    "ProbeConfig",
    "Range",
    "SearchConfig",
    "Settings",
    "SplitConfig",
    "TileConfig",
    "TrainConfig",
    "normalise_key",
]


def option(default: Any, help: str) -> Any:
    """A setting with its meaning, for the help page and for people reading this file."""
    return field(default=default, metadata={"help": help})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def normalise_key(key: str) -> str:
    """One spelling for a key, however it was typed: `--tile.tile-px` → `tile.tile_px`."""
    return key.lstrip("-").replace("-", "_")


def _named_values(texts: Iterable[str], key: str) -> dict[str, Any]:
    """`name=value` of a setting that takes several; values as YAML reads them."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = normalise_key(name)
        _require(bool(equals) and name.isidentifier(), f"{key} has {text!r}; expected name=value")
        options[name] = yaml.safe_load(value)
    return options


@dataclass(frozen=True)
class Range:
    """What an argument may be, in its annotation: `Annotated[float, Range(0, 1)]`."""

    least: float
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and value < self.below

    def __str__(self) -> str:
        upper = f" and at most {self.most:g}" if self.most < math.inf else f" and below {self.below:g}"
        return f"at least {self.least:g}{upper if min(self.most, self.below) < math.inf else ''}"


@dataclass(frozen=True)
class TileConfig:
    """Where tiles go and at which scale they are seen."""

    mpp: float = option(0.5, "µm/px the tiles are seen at")
    tile_px: int = option(224, "side of a tile, pixels at that scale")
    overlap_px: int = option(0, "overlap of neighbouring tiles, same pixels")
    min_tissue: float = option(0.5, "least share of tissue in a tile, 0 to 1")
    tissue: Literal["auto", "none"] = option("auto", "find tissue, or take the whole slide")
    slide_mpp: float | None = option(None, "µm/px of slides that do not state their own")
    pen: bool = option(True, "leave out pen marks; false for stains that are blue or green themselves (trichrome, Alcian blue)")
    roi: str | None = option(None, "folder of <slide_id>.geojson polygons (QuPath) that replace the tissue found, or cut from it")
    roi_include: tuple[str, ...] = option((), "with --roi: classes of polygons to keep; none given: all but the excluded")
    roi_exclude: tuple[str, ...] = option(
        ("exclude", "ignore", "artefact", "artifact", "pen"), "with --roi: classes of polygons to cut out, in place of these"
    )
    coords: str | None = option(
        None, "folder of <slide_id>.h5 with tile coordinates by CLAM, TRIDENT, AtlasPatch or wsimil: these, in place of a grid"
    )
    allow_upsampling: bool = option(False, "accept slides more than 10 % coarser than --mpp")

    def __post_init__(self) -> None:
        _require(0.05 <= self.mpp <= 20, f"tile.mpp is {self.mpp}; expected .05 to 20 µm/px")
        _require(self.tile_px >= 8, f"tile.tile_px is {self.tile_px}; expected at least 8")
        _require(
            0 <= self.overlap_px < self.tile_px,
            f"tile.overlap_px is {self.overlap_px}; expected 0 to {self.tile_px - 1} (less than tile_px)",
        )
        _require(0 <= self.min_tissue <= 1, f"tile.min_tissue is {self.min_tissue}; expected 0 to 1")
        _require(
            self.slide_mpp is None or 0.05 <= self.slide_mpp <= 20,
            f"tile.slide_mpp is {self.slide_mpp}; expected .05 to 20 µm/px",
        )
        _require(self.roi is not None or not self.roi_include, "tile.roi_include is set, but tile.roi is not: pass --roi too")
        _require(self.coords is None or self.roi is None, "tile.coords and tile.roi both say where tiles are; pass one of them")
        both = {name.casefold() for name in self.roi_include} & {name.casefold() for name in self.roi_exclude}
        _require(not both, f"tile.roi_include and tile.roi_exclude both name {', '.join(sorted(both))}")


@dataclass(frozen=True)
class ExtractConfig:
    """From tiles to features."""

    encoder: tuple[str, ...] = option(
        ("texture",),
        "texture | registry or timm name | hf-hub:org/model | local file or folder | random:<timm name>[:seed]; "
        "several share one pass over the pixels",
    )
    embedding: Literal["default", "self-vit-mil"] = option(
        "default", "a ViT's own pooling, or class tokens of the last four blocks and the mean patch token (5 x width)"
    )
    decode: Literal["exact", "dct"] = option(
        "exact", "how JPEG is reduced by even factors: exact area mean, or half of it in the decoder, faster and nearly the same"
    )
    stain: Literal["none", "macenko", "reinhard"] = option("none", "give all slides the colours of one target before encoding")
    stain_target: str | None = option(None, "image whose tissue the colours are taken from; default: published H&E values")
    batch_size: int = option(64, "tiles in a forward pass of the encoder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU when there is one")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "arithmetic of the encoder; auto: bf16 on a GPU (fp16 on one without it), fp32 else"
    )
    feature_dtype: Literal["fp16", "fp32"] = option("fp16", "how features are stored")
    overwrite_stale: bool = option(False, "replace bags that another recipe or another slide file made")

    def __post_init__(self) -> None:
        if isinstance(self.encoder, str):  # one name is as good as a list of one
            object.__setattr__(self, "encoder", (self.encoder,))
        _require(self.batch_size >= 1, f"extract.batch_size is {self.batch_size}; expected at least 1")
        _require(len(self.encoder) >= 1, "extract.encoder is empty; expected at least one encoder")


@dataclass(frozen=True)
class JobConfig:
    """How a folder of slides is worked through; nothing here changes a result."""

    workers: int = option(0, "processes that read slides; 0: one per CPU core, at most 16")
    read_timeout: float = option(120.0, "seconds without a finished read after which a slide counts as stuck, and fails")
    shard: str | None = option(None, "i/n: only the i-th of n parts of the slides (1/8 … 8/8)")
    retry_failed: bool = option(False, "try again slides that failed in an earlier run")
    engine: Literal["local", "ray"] = option("local", "tile and extract on this machine, or on a Ray cluster (see docs/cluster.md)")
    gpus_per_worker: float = option(1.0, "with --engine ray: share of a GPU that a worker takes; 0.5: two workers on each")
    stage_to: str | None = option(None, "folder on a fast disk that slides are copied to, ahead of their reading (extract)")
    stage_gb: float = option(100.0, "with --stage-to: most that copies take up, of all runs that share the folder")

    def __post_init__(self) -> None:
        _require(0 <= self.workers <= 256, f"job.workers is {self.workers}; expected 0 to 256")
        _require(0 < self.gpus_per_worker <= 1, f"job.gpus_per_worker is {self.gpus_per_worker}; expected more than 0, up to 1")
        _require(self.stage_gb > 0, f"job.stage_gb is {self.stage_gb}; expected more than 0")
        _require(self.read_timeout > 0, f"job.read_timeout is {self.read_timeout}; expected more than 0 seconds")
        if self.shard is not None:
            self.shard_of()

    def shard_of(self) -> tuple[int, int]:
        """(i, n), 1-based; (1, 1) without sharding."""
        if self.shard is None:
            return 1, 1
        index, _, count = self.shard.partition("/")
        good = index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)
        _require(good, f"job.shard is {self.shard!r}; expected i/n with 1 <= i <= n, for example 1/4")
        return int(index), int(count)


@dataclass(frozen=True)
class FilterConfig:
    """Which tiles of a bag count, by their stored scores; files stay as they are."""

    qc_tissue: float = option(0.0, "least share of tissue in a tile; 0: whatever was extracted")
    qc_pen: float = option(1.0, "most share of pen ink in a tile; 1: any")
    qc_blur: float = option(1.0, "most blur, from 0 (sharp) to 1; 1: any")
    qc_darkness: float = option(1.0, "most share of a tile that is darker than stain gets (ink, padding); 1: any")

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            _require(0 <= value <= 1, f"filter.{key} is {value}; expected 0 to 1")


@dataclass(frozen=True)
class LabelsConfig:
    """What the label table says."""

    target: tuple[str, ...] = option(
        ("label",),
        "column to predict; several: a label each, 0 or 1, empty where unknown (multilabel), or the probabilities of classes "
        "(--task multiclass or binary)",
    )
    task: Literal["auto", "binary", "multiclass", "multilabel", "ordinal", "regression", "proportion", "survival"] = option(
        "auto", "kind of target; auto looks at its values"
    )
    positive: str | None = option(None, "the positive one of two values; default: the last in sorted order")
    order: tuple[str, ...] = option((), "ordinal: classes from low to high; none given: numbers by value")
    time: str | None = option(None, "survival: column of the time until the event, or until the slide's patient was lost sight of")
    event: str | None = option(None, "survival: column that says whether the event happened (1) or the time is censored (0)")

    def __post_init__(self) -> None:
        if isinstance(self.target, str):  # one name is as good as a list of one
            object.__setattr__(self, "target", (self.target,))
        _require(len(self.target) >= 1, "labels.target is empty; expected at least one column")
        _require((self.time is None) == (self.event is None), "labels.time and labels.event belong together: pass both")
        if self.time is not None:
            _require(self.task in ("auto", "survival"), f"labels.task is {self.task}, but --time and --event make it survival")
        if self.order:
            _require(self.task in ("auto", "ordinal"), f"labels.task is {self.task}; --order is for ordinal")


@dataclass(frozen=True)
class SplitConfig:
    """Folds that keep patients apart."""

    folds: int = option(5, "cross-validation folds")
    seed: int = option(0, "seed of the split")
    group: str = option("patient", "column whose values never stand on two sides, as patients never do; for example the hospital")
    site: str | None = option(None, "column to balance over folds as well as the label")
    test: str | None = option(None, "column with an official split, `train` or `test`: one fold then, with that test set")
    val_fraction: float = option(0.2, "share of the training patients held out to choose epoch and threshold")

    def __post_init__(self) -> None:
        _require(self.folds >= 2, f"split.folds is {self.folds}; expected at least 2")
        _require(self.seed >= 0, f"split.seed is {self.seed}; expected 0 or more")
        _require(0 < self.val_fraction < 1, f"split.val_fraction is {self.val_fraction}; expected between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """From bags and labels to models."""

    aggregator: str = option("gated_abmil", "see `wsimil aggregators`")
    hidden: int = option(256, "width H inside the aggregator")
    dropout: float = option(0.25, "dropout on the hidden features")
    aggregator_options: tuple[str, ...] = option((), "settings of the aggregator's own: name=value …")
    objective: str = option(
        "auto",
        "auto: what the aggregator's paper minimises; slide_label | clam_instances | mhim | attention_entropy | averaged_weights; "
        "joined by +, each around those before it: auto+averaged_weights",
    )
    objective_options: tuple[str, ...] = option((), "settings of the objective's own: name=value …")
    lr: float = option(1e-3, "peak learning rate: linear warm-up, then half a cosine")
    min_lr: float = option(0.0, "learning rate that the cosine ends at")
    warm_up: float = option(0.05, "share of the steps in which the learning rate rises from 0")
    optimizer: Literal["adamw", "adam"] = option("adamw", "adam: weight decay is part of the gradient, as in older papers")
    betas: tuple[float, ...] = option((0.9, 0.999), "memory of the optimiser's two averages")
    weight_decay: float = option(1e-4, "weight decay")
    epochs: int = option(60, "most passes over the training slides")
    patience: int = option(15, "stop after so many epochs without a better validation loss; with --select last all epochs are run")
    select: Literal["val_loss", "last"] = option("val_loss", "weights to keep: those of the least validation loss, or the last")
    keep_epochs: bool = option(False, "keep the weights of every epoch, too: epochs/<epoch>/ is a run that `predict` takes")
    soup: int = option(
        0, "so many short trainings begin alike, in orders of their own; training begins at the mean of the best (10); 0: none"
    )
    soup_epochs: int = option(5, "epochs of each short training of a soup")
    soup_kept: int = option(3, "short trainings of a soup that are averaged, those of the least validation loss")
    bags_per_step: int = option(4, "slides in one optimiser step")
    sampling: Literal["shuffle", "balanced", "risk_set"] = option(
        "shuffle", "order of slides; balanced: classes equally often (in place of --balance); risk_set: survival, an event a step"
    )
    tiles_per_step: int = option(0, "a step takes slides up to so many tiles, whatever bags_per_step says; 0: bags_per_step slides")
    tiles_per_bag: int = option(0, "tiles drawn from each training slide, others in every epoch; 0: all")
    instance_dropout: float = option(0.0, "chance of a training tile to be left out of an epoch")
    clip_norm: float = option(0.0, "gradients longer than this are shortened to it; 0: none")
    standardize: bool = option(True, "shift and scale features by the training tiles' mean and deviation")
    balance: bool = option(
        True, "weigh classes (of several labels: positives) by the inverse of their share in the training slides"
    )
    loss: Literal["auto", "cross_entropy", "mse", "huber", "nll", "cox", "corn"] = option(
        "auto",
        "auto: cross_entropy; regression mse (or huber); proportion cross_entropy (mse, huber); ordinal corn; survival nll (cox)",
    )
    focal_gamma: float = option(0.0, "focal loss: slides that are right already count (1 - p)^gamma; 0: all count the same")
    label_smoothing: float = option(0.0, "share of a class label that is spread over all classes")
    time_bins: int = option(4, "survival with nll: time intervals, of equally many events")
    survival_alpha: float = option(0.0, "survival with nll: censored slides count 1 - alpha")
    seeds: int = option(1, "models per fold, from --seed upwards")
    seed: int = option(0, "first seed")
    fold: str = option("all", "all, or the number of one fold")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU when there is one")
    devices: int = option(1, "processes that share every step, a GPU each (with --device cpu: the cores)")
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "of matrix products; auto: bf16 where the device is built for it")
    stack: Literal["auto", "on", "off"] = option(
        "auto", "folds and seeds as one program, all in the same order of slides; auto: on a GPU, where the aggregator allows it"
    )
    memory_gb: float = option(0.0, "features kept in memory, at most; 0: half of what is free")

    def __post_init__(self) -> None:
        for key in ("hidden", "epochs", "patience", "bags_per_step", "seeds", "time_bins", "devices", "soup_epochs", "soup_kept"):
            _require(getattr(self, key) >= 1, f"train.{key} is {getattr(self, key)}; expected at least 1")
        _require(self.soup == 0 or self.soup >= 2, f"train.soup is {self.soup}; expected 0, or 2 short trainings and more")
        for key, most in (("soup_kept", "soup"), ("soup_epochs", "epochs")) if self.soup else ():
            value, limit = getattr(self, key), getattr(self, most)
            _require(value <= limit, f"train.{key} is {value}; expected at most train.{most} ({limit})")
        _require(self.focal_gamma >= 0, f"train.focal_gamma is {self.focal_gamma}; expected 0 or more")
        for key in ("label_smoothing", "survival_alpha"):
            _require(0 <= getattr(self, key) < 1, f"train.{key} is {getattr(self, key)}; expected 0 up to 1")
        _require(self.seed >= 0, f"train.seed is {self.seed}; expected 0 or more")
        _require(0 <= self.dropout < 1, f"train.dropout is {self.dropout}; expected 0 up to 1")
        _require(self.lr > 0, f"train.lr is {self.lr}; expected more than 0")
        _require(0 <= self.min_lr <= self.lr, f"train.min_lr is {self.min_lr}; expected 0 to train.lr ({self.lr})")
        _require(0 <= self.warm_up < 1, f"train.warm_up is {self.warm_up}; expected 0 up to 1")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(good, f"train.betas is {list(self.betas)}; expected two numbers, each 0 up to 1")
        for key in ("tiles_per_step", "tiles_per_bag", "clip_norm", "memory_gb"):
            _require(getattr(self, key) >= 0, f"train.{key} is {getattr(self, key)}; expected 0 or more")
        _require(
            not (self.tiles_per_step and self.sampling == "risk_set"),
            "train.sampling is risk_set, an event in every step of bags_per_step slides, and train.tiles_per_step makes steps of "
            "any number of slides; set one of the two",
        )
        _require(
            self.sampling != "risk_set" or self.bags_per_step > 1,
            "train.bags_per_step is 1 with sampling risk_set: a step is an event and slides at risk then; expected 2 or more",
        )
        _require(0 <= self.instance_dropout < 1, f"train.instance_dropout is {self.instance_dropout}; expected 0 up to 1")
        for key in ("aggregator_options", "objective_options"):
            if isinstance(getattr(self, key), str):  # one option is as good as a list of one
                object.__setattr__(self, key, (getattr(self, key),))
            self.options_of(key)
        _require(self.fold == "all" or self.fold.isdigit(), f"train.fold is {self.fold!r}; expected all, or a number")

    def options_of(self, key: str) -> dict[str, Any]:
        """`aggregator_options` or `objective_options` as keyword arguments, values read as YAML reads them."""
        options = _named_values(getattr(self, key), f"train.{key}")
        for name in ("hidden", "dropout"):
            _require(name not in options, f"train.{key} has {name}, which is a setting itself: --{name} {options.get(name)}")
        return options


@dataclass(frozen=True)
class PretrainConfig:
    """From slides to an encoder, without labels. What is not set is the preset's (`--size`)."""

    method: Literal["dino", "mae", "weak"] = option(
        "dino",
        "dino: views of a tile agree, through a teacher; mae: hidden patches are painted in (robust on small data); "
        "weak: tiles learn the label of their slide (KimiaNet; pass --labels)",
    )
    size: Literal["toy", "lab", "multi", "self-vit-mil"] = option(
        "lab",
        "preset: toy (CPU, minutes), lab (one GPU, hundreds of slides), multi (several GPUs), self-vit-mil (as published)",
    )
    arch: str | None = option(None, "timm's name of the network; none: the preset's")
    init: str | None = option(
        None, "weights to begin with: scratch, imagenet, an encoder's name, a file or folder; none: the preset's"
    )
    steps: int | None = option(None, "optimiser steps; none: as many as the preset's number of tiles makes")
    hours: float | None = option(None, "in place of steps: as many as fit into this time, timed before the run begins")
    batch_size: int | None = option(None, "tiles in an optimiser step, over all devices; none: the preset's")
    lr: float | None = option(None, "peak learning rate; none: the preset's rule for this batch size")
    recipe_options: tuple[str, ...] = option((), "any other number of the preset: name=value … (docs/pretraining.md lists them)")
    mpp_range: str | None = option(None, "low-high µm/px in place of one --mpp: each tile is seen at a scale between, log-uniform")
    source: Literal["auto", "slides", "tiles"] = option(
        "auto", "what SLIDES holds; auto: tiles where all files are plain images no larger than 1.5 times --tile-px"
    )
    stain: Literal["none", "macenko", "reinhard"] = option(
        "none", "give all slides the colours of one target, as `extract --stain` will; none: views vary the slides' own colours"
    )
    stain_target: str | None = option(None, "image whose tissue the colours are taken from; default: published H&E values")
    fold: str | None = option(None, "with --splits: the fold whose training slides are used; may be left out where there is one")
    transductive: bool = option(False, "use test slides too, without labels; recorded, and said with every result")
    accumulate: int = option(1, "parts of a step that are computed one after the other: a larger batch than fits the device")
    devices: int = option(1, "GPUs, or processes on the CPU, that share each batch")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU when there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "of matrix products; auto: the preset's on a GPU that has it, fp32 else"
    )
    mosaic_tiles: int = option(
        55, "with --method weak: so many tiles of each slide, of all kinds of its tissue and rich in nuclei; 0: all of its tissue"
    )
    cache_gb: float = option(0.0, "disk for tiles already read, so that later passes need no slide; 0: none")
    checkpoint_minutes: float = option(10.0, "last.ckpt is written this often, and when the run is asked to stop")
    collapse: Literal["stop", "warn"] = option("stop", "when the health panel finds the encoder collapsed twice in a row")
    seed: int = option(0, "seed of tiles, views and weights")

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "devices"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"pretrain.{key} is {value}; expected at least 1")
        for key in ("hours", "lr", "checkpoint_minutes"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"pretrain.{key} is {value}; expected more than 0")
        _require(self.steps is None or self.hours is None, "pretrain.steps and pretrain.hours are both set; keep one")
        _require(self.mosaic_tiles >= 0, f"pretrain.mosaic_tiles is {self.mosaic_tiles}; expected 0 or more")
        _require(self.cache_gb >= 0, f"pretrain.cache_gb is {self.cache_gb}; expected 0 or more")
        _require(self.seed >= 0, f"pretrain.seed is {self.seed}; expected 0 or more")
        _require(self.fold is None or self.fold.isdigit(), f"pretrain.fold is {self.fold!r}; expected a number")
        if isinstance(self.recipe_options, str):  # one option is as good as a list of one
            object.__setattr__(self, "recipe_options", (self.recipe_options,))
        self.scales(1.0)
        self.options()

    def scales(self, mpp: float) -> tuple[float, float]:
        """Least and largest µm/px of tiles; `mpp` where no range is set."""
        if self.mpp_range is None:
            return mpp, mpp
        low, _, high = self.mpp_range.partition("-")
        try:
            scales = float(low), float(high)
        except ValueError:
            scales = 0.0, 0.0
        _require(
            0.05 <= scales[0] <= scales[1] <= 20,
            f"pretrain.mpp_range is {self.mpp_range!r}; expected low-high within .05 to 20 µm/px, for example 0.25-1",
        )
        return scales

    def options(self) -> dict[str, Any]:
        """`recipe_options` as values by name, read as YAML reads them."""
        return _named_values(self.recipe_options, "pretrain.recipe_options")


@dataclass(frozen=True)
class PredictConfig:
    """From models and bags to predictions."""

    bag: Literal["slide", "patient"] = option("slide", "one prediction per slide, or the slides of a patient pooled")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU when there is one")


@dataclass(frozen=True)
class EvaluateConfig:
    """From predictions to numbers with intervals."""

    bootstrap: int = option(2000, "resamples of patients (of groups, where folds kept groups together) for the intervals")
    seed: int = option(0, "seed of the resampling")


@dataclass(frozen=True)
class HeatmapConfig:
    """From tile scores to pictures and polygons."""

    format: tuple[Literal["png", "geojson"], ...] = option(("png", "geojson"), "what to write")
    map: Literal["auto", "attention", "contribution", "tile_prob"] = option(
        "auto", "which score; auto: signed contributions where the model has exact ones, else tile probabilities, else attention"
    )
    class_name: str | None = option(
        None, "class or label that maps speak for; none: the predicted one, of several labels the likeliest"
    )
    qupath_bounds: Literal["auto", "keep"] = option(
        "auto", "auto: QuPath's frame (OpenSlide's bounds offset subtracted); keep: the file's own"
    )
    max_side_px: int = option(1600, "longer side of the PNG")

    def __post_init__(self) -> None:
        _require(self.max_side_px >= 64, f"heatmap.max_side_px is {self.max_side_px}; expected at least 64")


@dataclass(frozen=True)
class ProbeConfig:
    """What frozen features say about labelled tiles."""

    target: str = option("label", "column with the class of a tile")
    group: str = option("group", "column whose values never stand on two sides: slide, or patient")
    site: str = option("site", "column of where a tile was scanned; if there is one, a site probe says how well that can be told")
    encoder: tuple[str, ...] = option(("texture",), "what to probe; names as for `wsimil extract`")
    embedding: Literal["default", "self-vit-mil"] = option("default", "as for `wsimil extract`")
    twins: bool = option(True, "probe the same networks with random weights, too")
    folds: int = option(5, "folds, by group")
    seeds: int = option(3, "how often groups are dealt into folds anew")
    max_tiles: int = option(0, "so many tiles at most, in whole groups drawn at random; 0: all")
    batch_size: int = option(64, "tiles in a forward pass of the encoder")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes a GPU when there is one")

    def __post_init__(self) -> None:
        if isinstance(self.encoder, str):  # one name is as good as a list of one
            object.__setattr__(self, "encoder", (self.encoder,))
        _require(len(self.encoder) >= 1, "probe.encoder is empty; expected at least one encoder")
        _require(self.folds >= 3, f"probe.folds is {self.folds}; expected at least 3: one chooses the penalty, one tests")
        for key in ("seeds", "batch_size"):
            _require(getattr(self, key) >= 1, f"probe.{key} is {getattr(self, key)}; expected at least 1")
        _require(self.max_tiles >= 0, f"probe.max_tiles is {self.max_tiles}; expected 0 or more")


@dataclass(frozen=True)
class ConvertConfig:
    """Bags of one layout as another."""

    to: Literal["wsimil", "clam", "stamp", "torchmil"] = option("wsimil", "layout to write")
    layout: Literal["auto", "wsimil", "trident", "clam", "stamp", "atlaspatch", "slide2vec", "slideflow", "torchmil"] = option(
        "auto", "layout of what is read; auto: what the folder looks like"
    )
    slide_mpp: float | None = option(None, "µm/px of the slides, where neither the bags nor --slides say it")
    tile_level0_px: float | None = option(None, "side of a tile in level-0 pixels, where the bags do not say it")
    encoder: str | None = option(None, "the encoder, where the bags do not say it; of several in one file, which to take")

    def __post_init__(self) -> None:
        _require(
            self.slide_mpp is None or 0.05 <= self.slide_mpp <= 20,
            f"convert.slide_mpp is {self.slide_mpp}; expected .05 to 20 µm/px",
        )
        _require(
            self.tile_level0_px is None or self.tile_level0_px > 0,
            f"convert.tile_level0_px is {self.tile_level0_px}; expected more than 0",
        )


@dataclass(frozen=True)
class SearchConfig:
    """Slides that look alike."""

    tiles: int = option(55, "tiles that stand for a slide, of nine kinds and from all over it; 0: all")
    apart: Literal["patient", "site"] = option(
        "patient", "in evaluation a slide is never compared with others of its patient; site: nor with others of its site"
    )

    def __post_init__(self) -> None:
        _require(self.tiles >= 0, f"search.tiles is {self.tiles}; expected 0 or more")


SECTIONS: dict[str, type] = {
    "tile": TileConfig,
    "extract": ExtractConfig,
    "job": JobConfig,
    "pretrain": PretrainConfig,
    "filter": FilterConfig,
    "labels": LabelsConfig,
    "split": SplitConfig,
    "train": TrainConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "heatmap": HeatmapConfig,
    "probe": ProbeConfig,
    "search": SearchConfig,
    "convert": ConvertConfig,
}

STUDY_SECTIONS = ("tile", "extract", "job", "filter", "labels", "split", "train", "predict", "evaluate", "heatmap")
"""Those of `wsimil run`: slides to heatmaps with an encoder that is there already."""


@dataclass(frozen=True)
class Settings:
    """All sections together: what `wsimil run` takes."""

    tile: TileConfig = TileConfig()
    extract: ExtractConfig = ExtractConfig()
    job: JobConfig = JobConfig()
    pretrain: PretrainConfig = PretrainConfig()
    filter: FilterConfig = FilterConfig()
    labels: LabelsConfig = LabelsConfig()
    split: SplitConfig = SplitConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    heatmap: HeatmapConfig = HeatmapConfig()
    probe: ProbeConfig = ProbeConfig()
    search: SearchConfig = SearchConfig()
    convert: ConvertConfig = ConvertConfig()
