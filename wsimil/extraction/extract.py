"""Slides to bags: tiles through an encoder into one file per slide, resumable.

- A bag that exists counts as done only if the same recipe made it from the same slide file and its parts agree.
- A bag of another recipe is never overwritten unasked.
- The recipe is what results depend on: not the device, the batch size, the version or the paths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from wsimil.bags.bag import Bag, read_header, stored_features, write_bag
from wsimil.config import ExtractConfig, TileConfig
from wsimil.encoders import Encoder, load_encoder
from wsimil.errors import BagFormatError, StaleBagError
from wsimil.extraction.job import Job, Row, run_slides
from wsimil.extraction.tile import roi_file, tile_recipe, tile_slide, too_small
from wsimil.files import hash_of
from wsimil.slides.cohort import SlideFile, find_slides
from wsimil.slides.slide import RESAMPLER, Slide
from wsimil.slides.tiles import read_tiles
from wsimil.slides.tiling import resolve_scale

__all__ = ["Extraction", "extract_features", "resolve_device"]


@dataclass(frozen=True)
class Extraction:
    """What a run over slides came to."""

    rows: list[Row]
    features_folder: Path

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "failed"]


def resolve_device(device: str) -> str:
    """`auto` is the first GPU there is, else the CPU."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def extract_features(
    slides: str | Path,
    out: str | Path,
    *,
    tile: TileConfig | None = None,
    extract: ExtractConfig | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Extraction:
    """Write a bag for every slide into `<out>/<mag>x_<px>px_<ov>px_overlap/features_<encoder>/`.

    Args:
        slides: folder, slide, or CSV (`slide`, optional `slide_id`, `mpp`).
        out: job folder; an earlier run there is resumed.
        say: receives remarks for the user.

    Raises:
        UsageError: no slide, two slides of one id, an encoder that cannot be had.
    """
    tile, extract = tile or TileConfig(), extract or ExtractConfig()
    files = find_slides(slides)
    device = resolve_device(extract.device)
    dtype = extract.dtype if extract.dtype != "auto" else ("bf16" if device.startswith("cuda") else "fp32")
    encoder = load_encoder(extract.encoder, device=device, dtype=dtype, embedding=extract.embedding)
    if extract.encoder == "texture":
        say("encoder: texture (built-in colour and gradient statistics; --encoder names a pretrained network)")
    if remark := encoder.contract.scale_remark(mpp=tile.mpp, tile_px=tile.tile_px):
        say(remark)
    job = Job(Path(out))
    folder = job.geometry_folder(tile.mpp, tile.tile_px, tile.overlap_px) / encoder.contract.folder_name
    worker = _Worker(job, folder, encoder, device, tile, extract)
    request = {"tile": asdict(tile), "encoder": encoder.contract.recipe()}
    rows = run_slides(
        job,
        files,
        worker.extract,
        stage="extract",
        request=request,
        shard=extract.shard_of(),
        retry_failed=extract.retry_failed,
        quiet=quiet,
    )
    return Extraction(rows, folder)


@dataclass(frozen=True)
class _Worker:
    job: Job
    folder: Path
    encoder: Encoder
    device: str
    tile: TileConfig
    config: ExtractConfig

    def extract(self, file: SlideFile) -> Row:
        started = time.monotonic()
        with Slide(file.path, mpp=file.mpp, fallback_mpp=self.tile.slide_mpp) as slide:
            slide_fingerprint = file.fingerprint()
            recipe_hash = self._recipe_hash(slide, file)
            path = self.folder / f"{file.slide_id}.h5"
            done = self._done_already(path, recipe_hash, slide_fingerprint)
            if done is not None:
                return Row(file.name, file.slide_id, "skipped", "already done", done, time.monotonic() - started)
            tiled = tile_slide(slide, file, self.job, self.tile, slide_fingerprint=slide_fingerprint)
            features, valid, reasons = self._features(slide, tiled.tiles)
        contract = self.encoder.contract
        bag = Bag(
            features=stored_features(features, self.config.feature_dtype),
            coords_level0_px=tiled.tiles.coords_level0_px,
            valid=valid,
            qc={"tissue": tiled.tiles.tissue},
            attributes={
                **tiled.attributes,
                "recipe_hash": recipe_hash,
                "encoder": contract.name,
                "encoder_sha256": contract.sha256,
                "encoder_mean": contract.mean,
                "encoder_std": contract.std,
                "encoder_mpp": contract.mpp,
                "wsimil_version": version("wsimil"),
            },
        )
        write_bag(path, bag, replace(tiled.geometry, name=file.slide_id))
        count = len(features)
        reason = too_small(tiled) if not count else ""
        if reasons:
            reason = f"{len(reasons)} tiles cannot be read and are marked invalid; the first: {next(iter(reasons.values()))}"
        return Row(file.name, file.slide_id, "done" if count else "empty", reason, count, time.monotonic() - started)

    def _recipe_hash(self, slide: Slide, file: SlideFile) -> str:
        scale = resolve_scale(slide.known_mpp(), self.tile.mpp, allow_upsampling=self.tile.allow_upsampling)
        recipe = tile_recipe(self.tile, scale, roi_file(self.tile, file.slide_id))
        return hash_of(
            {
                **recipe,
                "resampler": RESAMPLER,
                "encoder": self.encoder.contract.recipe(),
                "feature_dtype": self.config.feature_dtype,
            }
        )

    def _done_already(self, path: Path, recipe_hash: str, slide_fingerprint: str) -> int | None:
        """Tiles of a bag that is there and right; None where one has to be made.

        Raises:
            StaleBagError: there is one, of another recipe or slide file, and replacing it was not asked for.
        """
        if not path.exists():
            return None
        try:
            header = read_header(path)
        except BagFormatError:
            return None  # what a crash or a full disk left: made anew
        if header.attributes.get("recipe_hash") != recipe_hash:
            what = "another recipe (scale, tissue, encoder or their settings)"
        elif header.attributes.get("slide_fingerprint") != slide_fingerprint:
            what = "another version of the slide file"
        else:
            return header.n_tiles
        if self.config.overwrite_stale:
            return None
        raise StaleBagError(f"{path.name} exists and was made from {what}; pass --overwrite-stale to replace it, or another --out")

    def _features(self, slide: Slide, tiles) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """features (N, D) float32, valid (N,), reasons of the rows that are not."""
        count = len(tiles.coords_level0_px)
        features = np.zeros((count, self.encoder.contract.dim), np.float32)
        valid = np.ones(count, bool)
        reasons: dict[int, str] = {}
        batches = read_tiles(
            slide, tiles, tile_px=self.tile.tile_px, batch_size=self.config.batch_size, workers=self.config.workers
        )
        for batch in batches:
            rows = slice(batch.first, batch.first + len(batch.pixels))
            with torch.inference_mode():
                pixels = torch.from_numpy(batch.pixels).to(self.device, non_blocking=True)
                features[rows] = self.encoder(pixels).float().cpu().numpy()
            if batch.failures:
                failed = list(batch.failures)
                features[failed], valid[failed] = 0, False
                reasons |= batch.failures
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
            raise ValueError(f"encoder {self.encoder.contract.name} gave NaN or infinity for tile {row}; try --dtype fp32")
        return features, valid, reasons
