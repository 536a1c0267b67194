"""Slides to bags: tiles through encoders into one file per slide and encoder, resumable.

- Readers fill memory, the run's own process encodes. Batches cross the ends of slides: small slides cost no more than large ones.
- Several encoders share one pass over the pixels.
- The recipe is what results depend on: not the device, the batch size, the version or the paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from wsimil.bags.bag import Bag, stored_features, write_bag
from wsimil.config import ExtractConfig, JobConfig, TileConfig
from wsimil.encoders import Encoder, load_encoder
from wsimil.errors import SlideError, SlideUnreadableError, UsageError, WsimilError
from wsimil.extraction.engine import Stage, run_slides
from wsimil.extraction.job import Job, Row, failure_key
from wsimil.extraction.pixels import Prepared, TilePixels, Wanted, WantedBag
from wsimil.extraction.tile import too_small
from wsimil.files import write_text
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.slide import RESAMPLER
from wsimil.slides.stain import StainTarget, stain_normaliser
from wsimil.slides.tiles import MAX_INVALID

__all__ = ["Extraction", "extract_features", "resolve_device", "resolve_dtype"]

_SECTION_TILES = 256, 2048
"""Tiles that one reader takes of a slide at a time: several readers share a large slide, a small one has one."""


@dataclass(frozen=True)
class Extraction:
    """What a run over slides came to."""

    rows: list[Row]
    features_folders: tuple[Path, ...]  # one per encoder, in the order asked for

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "failed"]


def resolve_device(device: str) -> str:
    """`auto` is the first GPU there is, else the CPU.

    Raises:
        UsageError: no such device, or none here.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdigit())):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda, cuda:1 (the second GPU) or mps")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= n_gpus:
        raise UsageError(
            f"--device {device}: torch finds {f'{n_gpus} GPUs, counted from 0' if n_gpus else 'no GPU'} here; take auto or cpu, or "
            "see to the driver and to a build of torch for it"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this is no Mac with a GPU that torch can use; take auto or cpu")
    if kind != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(device: str) -> Literal["fp32", "bf16", "fp16"]:
    """Of an encoder's arithmetic: bf16 on a GPU that has instructions for it, fp16 on an older one, fp32 elsewhere."""
    if not device.startswith("cuda"):
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"


def extract_features(
    slides: str | Path,
    out: str | Path,
    *,
    tile: TileConfig | None = None,
    extract: ExtractConfig | None = None,
    job: JobConfig | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Extraction:
    """Write a bag for every slide and encoder into `<out>/<mag>x_<px>px_<ov>px_overlap/features_<encoder>/`.

    Args:
        slides: folder, slide, or CSV (`slide`, optional `slide_id`, `mpp`).
        out: job folder; an earlier run there is resumed.
        say: receives remarks for the user.

    Raises:
        UsageError: no slide, two slides of one id, an encoder that cannot be had.
        WsimilError: the encoder fails, or the folder can hold no more.
    """
    tile, extract, job = tile or TileConfig(), extract or ExtractConfig(), job or JobConfig()
    files = find_slides(slides)
    # on a cluster nothing is encoded here, but what the encoders are must be known
    device = "cpu" if job.engine == "ray" else resolve_device(extract.device)
    encoders = _load_encoders(extract, device)
    if extract.encoder == ("texture",):
        say("encoder: texture (built-in colour and gradient statistics; --encoder names a pretrained network)")
    for encoder in encoders:
        contract = encoder.contract
        for remark in (contract.scale_remark(mpp=tile.mpp, tile_px=tile.tile_px), contract.stain_remark(extract.stain)):
            if remark:
                say(remark)
    folder = Job(Path(out))
    geometry = folder.geometry_folder(tile.mpp, tile.tile_px, tile.overlap_px)
    bags = tuple(
        WantedBag(
            geometry / encoder.contract.folder_name,
            {"encoder": encoder.contract.recipe(), "feature_dtype": extract.feature_dtype},
        )
        for encoder in encoders
    )
    if len({bag.folder for bag in bags}) < len(bags):
        raise UsageError(f"two of the encoders {', '.join(extract.encoder)} would write to the same folder; name each once")
    stain = None
    if extract.stain != "none":
        stain = stain_normaliser(extract.stain, StainTarget.of_image(extract.stain_target) if extract.stain_target else None)
    request = {
        "tile": asdict(tile),
        "bags": [dict(bag.recipe) for bag in bags],
        "decode": extract.decode,
        "stain": stain.recipe() if stain else None,
    }
    wanted = Wanted(folder, tile, bags, extract.decode == "dct", stain, request, job.retry_failed, extract.overwrite_stale)
    rows = run_slides(
        folder,
        files,
        _ExtractStage(wanted, encoders, device, extract),
        config=job,
        tile_bytes=tile.tile_px**2 * 3,
        quiet=quiet,
    )
    return Extraction(rows, tuple(bag.folder for bag in bags))


def _load_encoders(config: ExtractConfig, device: str) -> list[Encoder]:
    dtype = config.dtype if config.dtype != "auto" else resolve_dtype(device)
    return [load_encoder(name, device=device, dtype=dtype, embedding=config.embedding) for name in config.encoder]


def _stage_elsewhere(wanted: Wanted, config: ExtractConfig) -> _ExtractStage:
    """The stage of a run, made anew in a worker: its encoders are loaded where they run.

    Raises:
        UsageError: they are not the encoders of the run.
    """
    device = resolve_device(config.device)
    encoders = _load_encoders(config, device)
    for encoder, bag in zip(encoders, wanted.bags, strict=True):
        if encoder.contract.recipe() != bag.recipe["encoder"]:
            raise UsageError(f"encoder {encoder.contract.name} has other weights or settings here than where the run was started")
    return _ExtractStage(wanted, encoders, device, config)


@dataclass
class _Slide:
    """A slide on its way through the encoders."""

    file: SlideFile
    prepared: Prepared
    features: dict[int, np.ndarray]  # wanted bag → (N, D) float32
    qc: dict[str, np.ndarray]
    failures: dict[int, str] = field(default_factory=dict)
    n_encoded: int = 0
    resampler: str = RESAMPLER  # as its readers say; not every slide can be decoded as --decode asks


class _ExtractStage(Stage):
    name = "extract"

    def __init__(self, wanted: Wanted, encoders: Sequence[Encoder], device: str, config: ExtractConfig) -> None:
        self.request, self.device = wanted.request, config.device
        self._wanted, self._encoders, self._device, self._config = wanted, encoders, device, config
        self._slides: dict[str, _Slide] = {}
        self._ready: list[SlideFile] = []
        side = wanted.tile.tile_px
        # one buffer for all batches: fresh memory would cost more than filling it
        self._batch = torch.empty((config.batch_size, side, side, 3), dtype=torch.uint8, pin_memory=device.startswith("cuda"))
        self._at_once = config.batch_size  # tiles in one forward pass; less where they do not fit
        self._in_batch: list[tuple[str, int, int]] = []  # slide id, first row, number of rows
        self._filled = 0

    def __reduce__(self) -> tuple:
        return _stage_elsewhere, (self._wanted, self._config)

    def reads_much(self, file: SlideFile) -> bool:
        job = self._wanted.job
        there = all((bag.folder / f"{file.slide_id}.h5").exists() for bag in self._wanted.bags)
        refused = job.failure(file.slide_id).exists() and not self._wanted.retry_failed
        return not there and not refused

    def first_call(self, file: SlideFile) -> tuple[str, tuple]:
        return "wsimil.extraction.pixels:prepare", (file, self._wanted)

    def begin(self, file: SlideFile, value: Prepared) -> Row | Sequence[tuple[str, tuple]]:
        if value.tiled is None:
            return Row(file.name, file.slide_id, "skipped", "already done", value.n_tiles)
        tiles = value.tiled.tiles
        features = {number: np.zeros((value.n_tiles, self._encoders[number].contract.dim), np.float32) for number in value.missing}
        self._slides[file.slide_id] = _Slide(file, value, features, {name: scores.copy() for name, scores in tiles.qc.items()})
        if not value.n_tiles:
            self._ready.append(file)
        side = self._wanted.tile.tile_px
        return [
            (
                "wsimil.extraction.pixels:read_pixels",
                (
                    file,
                    self._wanted.tile.slide_mpp,
                    tiles.coords_level0_px[start:end],
                    start,
                    tiles.tile_level0_px,
                    side,
                    self._wanted.dct_scaled,
                    value.stain,
                ),
            )
            for start, end in sections(tiles.coords_level0_px, self.readers)
        ]

    def pixels(self, file: SlideFile, content: TilePixels, memory: np.ndarray) -> int:
        slide, side = self._slides[file.slide_id], self._wanted.tile.tile_px
        pixels = torch.from_numpy(memory[: content.count * side * side * 3].reshape(content.count, side, side, 3))
        slide.failures |= content.failures
        slide.resampler = content.resampler
        if len(slide.failures) > MAX_INVALID * slide.prepared.n_tiles:
            raise SlideUnreadableError(
                f"{len(slide.failures)} of {slide.prepared.n_tiles} tiles cannot be read, more than {MAX_INVALID:.0%}; "
                f"one of them: {next(iter(slide.failures.values()))}"
            )
        for name, scores in content.qc.items():
            all_scores = slide.qc.setdefault(name, np.full(slide.prepared.n_tiles, np.nan, np.float32))
            all_scores[content.first : content.first + content.count] = scores
        taken = 0
        while taken < content.count:
            count = min(content.count - taken, len(self._batch) - self._filled)
            self._batch[self._filled : self._filled + count] = pixels[taken : taken + count]
            self._in_batch.append((file.slide_id, content.first + taken, count))
            self._filled += count
            taken += count
            if self._filled == len(self._batch):
                self.flush()
        return content.count

    def flush(self) -> None:
        """Encode what is in the batch and hand the vectors to their slides."""
        alive = [self._slides[slide_id] for slide_id, _, _ in self._in_batch if slide_id in self._slides]
        needed = {number for slide in alive for number in slide.features}
        vectors = {number: self._encode(self._encoders[number]) for number in sorted(needed)}
        start = 0
        for slide_id, first, count in self._in_batch:
            if (slide := self._slides.get(slide_id)) is not None:
                for number, features in slide.features.items():
                    features[first : first + count] = vectors[number][start : start + count]
                slide.n_encoded += count
                if slide.n_encoded == slide.prepared.n_tiles:
                    self._ready.append(slide.file)
            start += count
        self._in_batch, self._filled = [], 0

    def _encode(self, encoder: Encoder) -> np.ndarray:
        try:
            with torch.inference_mode():
                return np.concatenate(list(self._vectors(encoder)))
        except (RuntimeError, MemoryError) as error:
            raise WsimilError(
                f"encoder {encoder.contract.name} failed on a batch of {self._filled} tiles: {error}; "
                "if memory ran out, try a smaller --batch-size"
            ) from error

    def _vectors(self, encoder: Encoder) -> Iterator[np.ndarray]:
        """The batch encoded; where a GPU's memory is too small for it, in halves, and so from then on."""
        start = 0
        while start < self._filled:
            tiles = self._batch[start : min(start + self._at_once, self._filled)]
            try:
                yield encoder(tiles.to(self._device, non_blocking=True)).float().cpu().numpy()
                start += len(tiles)
            except torch.cuda.OutOfMemoryError:
                if len(tiles) == 1:
                    raise
                self._at_once = (len(tiles) + 1) // 2
                torch.cuda.empty_cache()

    def ready(self) -> list[SlideFile]:
        ready, self._ready = self._ready, []
        return ready

    def end(self, file: SlideFile) -> Row:
        slide = self._slides[file.slide_id]
        prepared, tiled = slide.prepared, slide.prepared.tiled
        assert tiled is not None
        failed = sorted(slide.failures)
        valid = np.ones(prepared.n_tiles, bool)
        valid[failed] = False
        for number, features in slide.features.items():
            contract = self._encoders[number].contract
            features[failed] = 0
            if not np.isfinite(features).all():
                row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
                raise SlideError(f"encoder {contract.name} gave NaN or infinity for tile {row}; try --dtype fp32")
            bag = Bag(
                features=stored_features(features, self._config.feature_dtype),
                coords_level0_px=tiled.tiles.coords_level0_px,
                valid=valid,
                qc=slide.qc,
                attributes={
                    **tiled.attributes,
                    "resampler": slide.resampler,
                    **(prepared.stain.attributes() if prepared.stain else {}),
                    "recipe_hash": prepared.recipe_hashes[number],
                    "encoder": contract.name,
                    "encoder_sha256": contract.sha256,
                    "encoder_mean": contract.mean,
                    "encoder_std": contract.std,
                    "encoder_mpp": contract.mpp,
                    "encoder_source": contract.source or None,
                    "encoder_revision": contract.revision or None,
                    "encoder_saw_slide": contract.saw(file.slide_id, str(tiled.attributes["slide_fingerprint"])) or None,
                    "encoder_transductive": contract.transductive or None,
                    "wsimil_version": version("wsimil"),
                },
            )
            write_bag(self._wanted.bags[number].folder / f"{file.slide_id}.h5", bag, replace(tiled.geometry, name=file.slide_id))
        del self._slides[file.slide_id]
        reason = "" if prepared.n_tiles else too_small(tiled, self._wanted.tile)
        if failed:
            log = self._wanted.job.log(file.slide_id)
            lines = [f"tile {row} at {tiled.tiles.coords_level0_px[row].tolist()}: {slide.failures[row]}" for row in failed]
            write_text(log, f"{file.slide_id} ({file.path})\ntiles that cannot be read:\n" + "\n".join(lines) + "\n")
            reason = (
                f"{len(failed)} tiles cannot be read and are marked invalid (see logs/{log.name}); "
                f"the first: {slide.failures[failed[0]]}"
            )
        return Row(file.name, file.slide_id, "done" if prepared.n_tiles else "empty", reason, prepared.n_tiles)

    def drop(self, file: SlideFile) -> None:
        self._slides.pop(file.slide_id, None)

    def remember(self, file: SlideFile, error: SlideError) -> None:
        slide = self._slides.get(file.slide_id)
        if slide is not None and slide.prepared.slide_fingerprint:
            key = failure_key(self._wanted.request, file, slide.prepared.slide_fingerprint)
            self._wanted.job.remember_failure(file.slide_id, key, str(error))


def sections(coords_level0_px: np.ndarray, readers: int) -> list[tuple[int, int]]:
    """Rows of tiles, from and to, that one reader takes at a time: whole lines of tiles, enough that every reader has two shares.

    Not fewer than some hundred tiles: blocks on the border of two shares are decoded twice.
    """
    total = len(coords_level0_px)
    least, most = _SECTION_TILES
    share = min(most, max(least, -(-total // (2 * readers))))
    lines = np.flatnonzero(np.diff(coords_level0_px[:, 1], prepend=-1)) if total else np.empty(0, int)  # where each line starts
    cuts, last = [0], 0
    for line in lines.tolist():
        if line - last >= share:
            cuts.append(line)
            last = line
    return [(start, end) for start, end in zip(cuts, [*cuts[1:], total], strict=True) if end > start]
