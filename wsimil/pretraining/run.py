"""A pretraining run from what the user asks for to the encoder: what goes in, what the folder holds, what is said in the end.

- The split is an input. With `--splits` only the training slides of the fold are opened: validation slides stay out as test
  slides do, because epochs and thresholds are chosen on them later.
- Without `--splits` every slide is used, and the encoder names them: `wsimil train` refuses a test slide that its encoder has seen,
  unless `--transductive` said that it would.
- A folder is one run. What is finished is kept, what was stopped goes on, and what differs is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from wsimil.bags.labels import infer_task, read_labels
from wsimil.config import PretrainConfig, Settings, TileConfig
from wsimil.encoders.contract import FINGERPRINT_START
from wsimil.errors import UsageError, WsimilError, some_of
from wsimil.extraction.extract import resolve_device
from wsimil.files import IMAGE_SUFFIXES, hash_of, mark_output, read_json, write_json
from wsimil.pretraining.forecast import Forecast, forecast, with_steps
from wsimil.pretraining.health import CURES
from wsimil.pretraining.held_out import check_start, training_ids
from wsimil.pretraining.index import IndexedSlide, TileIndex, files_below, index_slides, index_tiles, with_stains
from wsimil.pretraining.labels import with_labels, with_mosaics
from wsimil.pretraining.launch import launch
from wsimil.pretraining.methods import METHODS, check_sizes, network_of, normalised
from wsimil.pretraining.presets import Recipe, differences, resolve_recipe
from wsimil.pretraining.process import LAST, Outcome, Plan
from wsimil.settings import read_settings, save_settings
from wsimil.slides.stain import StainNormaliser, StainTarget, stain_normaliser
from wsimil.table import Table

__all__ = ["Pretrained", "pretrain"]

_SECTIONS = ("tile", "pretrain")
_CLASSIFYING = ("binary", "multiclass", "ordinal")
_TILE_SLACK = 1.5
_LOOKED_AT = 16


@dataclass(frozen=True)
class Pretrained:
    """What a run came to."""

    folder: Path  # holds backbone.safetensors and encoder.json
    recipe: Recipe
    step: int  # of the encoder in the folder
    remark: str = ""


def pretrain(
    slides: str | Path,
    out: str | Path,
    *,
    splits: str | Path | None = None,
    labels: str | Path | None = None,
    settings: Settings | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Pretrained | Forecast:
    """Train an encoder on tiles of slides; what is finished is kept, what was stopped goes on.

    Args:
        slides: folder, slide or CSV as for extraction; or a folder of tile images.
        out: folder of the run; in the end an encoder for `extract --encoder OUT`.
        splits: whose training slides are used.
        labels: table with `slide` and the target, for the method that learns from slide labels.
        dry_run: measure and forecast only; `views.png` shows what the network would see.

    Raises:
        UsageError: a wrong request, or another run in the folder.
        WsimilError: the encoder collapsed; the last good one is kept in the folder.
        KeyboardInterrupt: stopped; the same call goes on.
    """
    settings, out = settings or Settings(), Path(out)
    config, tile, job = settings.pretrain, settings.tile, settings.job
    device = _device(config)
    if config.seed >= 2**63:
        raise UsageError(f"--seed {config.seed} is too large a number; expected less than 2^63")
    if not Path(slides).exists():
        raise UsageError(f"{slides}: no such folder, slide or table")
    from_tiles = _holds_tiles(Path(slides), config, tile, say)
    if from_tiles and config.mpp_range is not None:
        raise UsageError("--mpp-range is for slides; tile images are taken at the scale they were cut at (--mpp says which)")
    normaliser = _normaliser(config, from_tiles)
    only, held_out, split = training_ids(slides, splits, config, tile, from_tiles, say)
    diagnoses = _diagnoses(labels, settings)
    preview = resolve_recipe(config, n_slides=1)
    model = network_of(preview, seed=config.seed)  # before anything takes long: its weights may not be there
    check_sizes(preview, model)
    start = model.start
    if start is not None:
        check_start(start, held_out, only)
    _check_same_tiles(out, tile, from_tiles)
    mark_output(out)
    if from_tiles:
        index = index_tiles(slides, tile_px=tile.tile_px, mpp=tile.mpp, only=only)
        _remark_on_sizes(index, tile, say)
    else:
        index = index_slides(slides, out / "index", tile=tile, job=job, only=only, quiet=quiet, say=say)
        if normaliser is not None:
            index = with_stains(index, slides, out / "index", normaliser, tile=tile, job=job, quiet=quiet, say=say)
    classes = None
    if diagnoses is not None:
        index, _ = with_labels(index, diagnoses, say=say)
        if config.mosaic_tiles and not from_tiles:
            index = with_mosaics(index, slides, out / "index", most=config.mosaic_tiles, tile=tile, job=job, quiet=quiet)
        index, classes = with_labels(index, diagnoses)  # of the slides that are left
        config = replace(config, collapse="warn")  # classes are told apart along few directions: that is no collapse
    recipe = normalised(resolve_recipe(config, n_slides=len(index.slides)), model)
    del model
    recipe = replace(recipe, precision=_precision(recipe, config, device, say))
    facts = {
        **split,
        "init_sha256": start.sha256 if start is not None else "",
        "transductive": config.transductive or (start is not None and start.transductive),
        "tile_px": tile.tile_px,
        "stain": "" if from_tiles else config.stain,
        "versions": {name: version(name) for name in ("wsimil", "torch", "timm")},
    }
    if classes is not None:
        facts["classes"] = list(classes.classes)
    plan = Plan(out, out.resolve().name, recipe, replace(config, device=device), tile, job, index, facts, quiet, classes)
    plan = replace(plan, facts={**facts, **_drawn_from(plan, start.seen if start is not None else (), say)})
    say(_describe(plan))
    _remark_on_cache(plan, say)
    if dry_run:
        return forecast(plan)
    plan = with_steps(plan, say)
    _check_same_run(plan)
    kept = _finished(plan)
    if kept is not None:
        say(f"{out}: already pretrained ({kept.recipe.steps} steps)")
        return kept
    sections = (*_SECTIONS, "labels") if diagnoses is not None else _SECTIONS
    save_settings(out / "config.yaml", replace(settings, pretrain=_resolved(plan)), sections)
    outcome = launch(plan, say)
    return _ended(plan, outcome, say)


# ---------------------------------------------------------------- what goes in


def _device(config: PretrainConfig) -> str:
    device = resolve_device(config.device)
    if config.devices > 1:
        if ":" in device:
            raise UsageError(f"--device {device} names one device and --devices asks for {config.devices}; leave one of them out")
        if device == "cuda" and torch.cuda.device_count() < config.devices:
            raise UsageError(f"--devices {config.devices}: there are {torch.cuda.device_count()} GPUs here")
        if device == "mps":
            raise UsageError("--devices: there is one Apple GPU; leave the option out")
    return device


def _normaliser(config: PretrainConfig, from_tiles: bool) -> StainNormaliser | None:
    if config.stain == "none":
        return None
    if from_tiles:
        raise UsageError(f"--stain {config.stain} is for slides, each of which is measured; normalise tile images beforehand")
    return stain_normaliser(config.stain, StainTarget.of_image(config.stain_target) if config.stain_target else None)


def _diagnoses(labels: str | Path | None, settings: Settings) -> Table | None:
    """The label table of a method that learns from one."""
    method = settings.pretrain.method
    if not METHODS[method].labelled:
        if labels is not None:
            raise UsageError(f"--method {method} learns without labels; leave --labels out, or take --method weak")
        return None
    if labels is None:
        raise UsageError(f"--method {method} learns from slide labels; pass --labels")
    asked = settings.labels
    if asked.task not in ("auto", *_CLASSIFYING) or len(asked.target) > 1:
        what = f"--task {asked.task}" if len(asked.target) == 1 else f"--target {' '.join(asked.target)}"
        raise UsageError(f"{what}: --method {method} learns classes, one per slide; name one column of classes")
    table = read_labels(labels, asked)
    task = infer_task(table["label"], asked).kind
    if task not in _CLASSIFYING:
        raise UsageError(
            f"{labels}: column {' '.join(asked.target)!r} looks like {task}, and --method {method} learns classes, one per slide; "
            "name another column (--target), or say --task multiclass if its values are classes"
        )
    return table


def _precision(recipe: Recipe, config: PretrainConfig, device: str, say: Callable[[str], None]) -> Any:
    """That of the preset where the device has it."""
    if config.precision == "fp16" and not device.startswith("cuda"):
        raise UsageError("--precision fp16 is for CUDA; on this device take fp32 or bf16")
    if config.precision != "auto":
        return config.precision
    if not device.startswith("cuda"):
        return "fp32"
    if recipe.precision == "bf16" and torch.cuda.get_device_capability(device)[0] < 8:
        say("precision: fp16, this GPU has no bf16")
        return "fp16"
    return recipe.precision


def _holds_tiles(slides: Path, config: PretrainConfig, tile: TileConfig, say: Callable[[str], None]) -> bool:
    """Whether SLIDES is a folder of tile images: as said, else by looking at some of them."""
    if config.source != "auto":
        return config.source == "tiles"
    if not slides.is_dir():
        return False
    looked_at: list[tuple[int, int]] = []
    for path in (place / name for place, names in files_below(slides) for name in names):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix.lower() in (".csv", ".json", ".txt", ".md", ".yaml"):
                continue
            return False
        if len(looked_at) < _LOOKED_AT and path.is_file():  # of millions only the names are looked at
            with contextlib.suppress(OSError), Image.open(path) as image:
                looked_at.append(image.size)
    if not looked_at or max(max(size) for size in looked_at) > _TILE_SLACK * tile.tile_px:
        return False
    say("SLIDES holds tile images (--source slides if each of them is a small slide)")
    return True


def _drawn_from(plan: Plan, before: Sequence[tuple[str, str]], say: Callable[[str], None]) -> dict[str, Any]:
    """What an encoder says of the slides that tiles are drawn from; those too small for one are said, and are not among them."""
    sampler = plan.sampler()
    small = sampler.left_out
    if small:
        say(
            f"{len(small)} of {len(plan.index.slides)} slides left out: smaller than a tile of {plan.tile.tile_px} px at "
            f"{plan.scales[0]:g} µm/px: {some_of(small)}"
        )
    slides = [slide for slide in plan.index.slides if slide.slide_id not in set(small)]
    return {"n_slides": len(slides), "slides": _slides_by_content(slides, before), "mpp": list(sampler.drawn_mpp)}


def _slides_by_content(slides: Sequence[IndexedSlide], before: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """slide_id → what the file is known by, for slides; a folder of tiles is known by its name alone.

    `before` are the slides that the weights had seen already. One of an id that is another slide's here has `earlier/` before it.
    """
    seen = {slide.slide_id: "" if slide.pictures else slide.file.fingerprint()[:FINGERPRINT_START] for slide in slides}
    for slide_id, content in before:
        name = slide_id
        while seen.get(name, content) != content:
            name = f"earlier/{name}"  # no id has a slash
        seen[name] = content
    return seen


def _describe(plan: Plan) -> str:
    recipe, index = plan.recipe, plan.index
    begins = "random weights" if recipe.init == "scratch" else f"weights of {recipe.init}"
    what = "groups of tile images" if index.slides[0].pictures else "slides"
    return (
        f"{recipe.method}, preset {plan.config.size}: "
        f"{recipe.arch}{f' of {recipe.depth} blocks' if recipe.depth else ''} from {begins}; "
        f"{len(index.slides)} {what}, {index.n_cells} tiles' worth; {recipe.steps} steps of {recipe.batch_size} tiles, "
        f"learning rate {recipe.lr:.2g}, {plan.config.device} {recipe.precision}"
        + (f", colours by {plan.config.stain}" if plan.config.stain != "none" else "")
    )


def _remark_on_sizes(index: TileIndex, tile: TileConfig, say: Callable[[str], None]) -> None:
    if index.shrunk != (1.0, 1.0):
        px, mpp = ([f"{of_one * share:.4g}" for share in dict.fromkeys(index.shrunk)] for of_one in (tile.tile_px, tile.mpp))
        say(
            f"tile images of {' to '.join(px)} px are made {tile.tile_px} px wide, which makes them {' to '.join(mpp)} µm/px "
            "(--tile-px says how wide they are, --mpp at which µm/px they were cut)"
        )


def _remark_on_cache(plan: Plan, say: Callable[[str], None]) -> None:
    if plan.config.cache_gb and not plan.recipe.distinct and not plan.index.slides[0].pictures:
        say(
            "cache: every tile of this run is a new one, so none is read from it; "
            f"--recipe-options distinct={int(plan.config.cache_gb * 1e9 / (plan.tile.tile_px**2 * 3))} shows as many as it holds "
            "again and again"
        )


# ---------------------------------------------------------------- the folder of a run


def _ended(plan: Plan, outcome: Outcome, say: Callable[[str], None]) -> Pretrained:
    out, steps = plan.out, plan.recipe.steps
    kept = f"the encoder of step {outcome.exported_step} is kept in {out}" if outcome.exported_step else "no encoder was kept"
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    if outcome.status == "collapsed":
        raise WsimilError(
            f"collapsed by step {outcome.step} of {steps}: {outcome.message}; {kept}. What helps: {'; '.join(CURES)}. "
            "Take another --out for the next try"
        )
    if not outcome.exported_step:
        raise WsimilError(
            f"{out}: no encoder was kept: every panel raised a warning (see {out / 'health.html'}). "
            f"What helps: {'; '.join(CURES)}. Take another --out for the next try"
        )
    say(outcome.message)
    remark = "" if outcome.exported_step == outcome.step else f"the last panel raised a warning: {kept}"
    write_json(
        out / "finished.json",
        {"key": _key(plan), "steps": steps, "exported_step": outcome.exported_step, "remark": remark},
    )
    if outcome.asked:  # when nothing was left to stop here; what would come next is not wanted
        raise KeyboardInterrupt
    return Pretrained(out, plan.recipe, outcome.exported_step, remark)


_CUT_BY = ("mpp", "tile_px", "overlap_px", "min_tissue", "tissue", "pen")


def _check_same_tiles(out: Path, tile: TileConfig, from_tiles: bool) -> None:
    """Refuse other tiles in a run's folder before its slides are tiled anew; what files decide, its index tells later."""
    try:
        there = read_settings(_SECTIONS, out / "config.yaml").tile if _begun(out) else tile
    except (OSError, UsageError):
        return
    names = ("mpp", "tile_px") if from_tiles else _CUT_BY if tile.tissue == "auto" else _CUT_BY[:-1]
    one, other = ({f"tile.{name}": getattr(config, name) for name in names} for config in (there, tile))
    if said := differences(one, other):
        raise _another_run(out, said)


def _begun(out: Path) -> bool:
    return (out / LAST).exists() or (out / "encoder.json").exists()


def _another_run(out: Path, said: Sequence[str]) -> UsageError:
    return UsageError(f"{out} is of another run ({'; '.join(said[:6])}); take another --out, or delete the folder to begin anew")


def _check_same_run(plan: Plan) -> None:
    """Note which run the folder is of; refuse another one before anything of the first is overwritten."""
    note, here = plan.out / "run.json", plan.identity()
    try:
        there = read_json(note)
    except (OSError, ValueError):
        there = here
    if _begun(plan.out) and (said := plan.differs_from(there)):
        raise _another_run(plan.out, said)
    write_json(note, here)


def _key(plan: Plan) -> str:
    return hash_of(plan.identity())


def _finished(plan: Plan) -> Pretrained | None:
    """The run, if it is done; with the same settings, slides and split only."""
    try:
        said = read_json(plan.out / "finished.json")
    except (OSError, ValueError):
        return None
    if not (plan.out / "encoder.json").exists() or not (plan.out / "backbone.safetensors").exists():
        return None
    if said.get("key") not in (_key(plan), hash_of(plan.identity(as_before=True))):
        return None
    return Pretrained(plan.out, plan.recipe, int(said["exported_step"]), str(said["remark"]))


def _resolved(plan: Plan) -> PretrainConfig:
    """The settings with every number of the recipe written out: the file says all, and is a config that gives the same run."""
    recipe = asdict(plan.recipe)
    named = {name: recipe.pop(name) for name in ("arch", "init", "steps", "batch_size", "lr", "precision")}
    del recipe["method"]
    options = tuple(f"{name}={_text(value)}" for name, value in recipe.items())
    return replace(plan.config, **named, hours=None, recipe_options=options)


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(repr(part) for part in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
