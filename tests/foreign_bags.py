"""Bags as other programs write them, made here from what their writers do; no code of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

MPP, TILE_PX, SIDE, SIZE = 0.25, 256, 512, (20_000, 16_000)
"""Of the slides: µm/px; of their tiles: pixels as seen, side at level 0; size at level 0."""

DIM = 6
ENCODER = "uni_v2"


def one_bag(slide_id: str, n_tiles: int = 40, *, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and coordinates (N, 2) on a grid that begins anywhere, row by row."""
    draw = np.random.default_rng(sum(map(ord, slide_id)))
    rows, columns = np.divmod(np.arange(n_tiles), 7)
    coords = np.stack([columns, rows], 1) * SIDE + draw.integers(0, 3000, 2)
    return draw.normal(size=(n_tiles, DIM)).astype(dtype), coords.astype(np.int64)


def _resizable(content: h5py.File, name: str, values: np.ndarray, chunk: int) -> h5py.Dataset:
    shape = values.shape[1:]
    dataset = content.create_dataset(name, values.shape, values.dtype, maxshape=(None, *shape), chunks=(chunk, *shape))
    dataset[:] = values
    return dataset


def write_clam(folder: Path, slide_id: str, *, patches: bool = True, tensors: bool = True) -> None:
    features, coords = one_bag(slide_id)
    for name in ("h5_files", "pt_files", "patches"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "h5_files" / f"{slide_id}.h5", "w") as content:
        _resizable(content, "features", features, 32)
        _resizable(content, "coords", coords.astype(np.int32), 32)
    if tensors:
        torch.save(torch.from_numpy(features), folder / "pt_files" / f"{slide_id}.pt")
    if patches:  # of level 1, which is four times smaller
        with h5py.File(folder / "patches" / f"{slide_id}.h5", "w") as content:
            _resizable(content, "coords", coords, 32).attrs.update(
                {"patch_size": SIDE // 4, "patch_level": 1, "downsample": (4.0, 4.0), "name": slide_id, "save_path": "out/patches"}
                | {"level_dim": (SIZE[0] // 4, SIZE[1] // 4), "downsampled_level_dim": (SIZE[0] // 4, SIZE[1] // 4)}
            )


def write_stamp(folder: Path, slide_id: str, **changes: object) -> None:
    features, coords = one_bag(slide_id, dtype=np.float16)
    path = folder / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as content:
        content["coords"] = (coords * MPP).astype(np.float32)
        content["feats"] = features
        stated = {"stamp_version": "2.4.0", "extractor": ENCODER, "unit": "um", "tile_size_um": SIDE * MPP, "tile_size_px": TILE_PX}
        stated |= {"code_hash": "abcdef12", "feat_type": "tile"} | changes
        content.attrs.update({name: value for name, value in stated.items() if value is not None})


def write_atlaspatch(folder: Path, slide_id: str, encoders: tuple[str, ...] = (ENCODER,)) -> None:
    features, coords = one_bag(slide_id)
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "patches" / f"{slide_id}.h5", "w") as content:
        read = np.tile([TILE_PX, TILE_PX, 1], (len(coords), 1))
        _resizable(content, "coords", np.concatenate([coords, read], 1).astype(np.int32), 8192)
        for encoder in encoders:
            _resizable(content.require_group("features"), encoder, features, 32)
        stated = {"patch_size": TILE_PX, "patch_size_level0": SIDE, "level0_magnification": 40, "target_magnification": 20}
        stated |= {"overlap": 0, "level0_width": SIZE[0], "level0_height": SIZE[1], "wsi_path": "x.svs", "mpp": MPP}
        content.attrs.update(stated)


def write_slide2vec(folder: Path, slide_id: str, suffix: str = "pt") -> None:
    features, coords = one_bag(slide_id)
    embeddings, tiles = folder / "tile_embeddings", folder / "tiles"
    for place in (embeddings, tiles):
        place.mkdir(parents=True, exist_ok=True)
    if suffix == "pt":
        torch.save(torch.from_numpy(features), embeddings / f"{slide_id}.pt")
    else:
        np.savez_compressed(embeddings / f"{slide_id}.npz", features=features, tile_index=np.arange(len(features)))
    sidecar = {"sample_id": slide_id, "artifact_type": "tile_embeddings", "format": suffix, "encoder_name": ENCODER}
    sidecar |= {"feature_dim": DIM, "num_tiles": len(features), "tile_size_lv0": SIDE, "requested_tile_size_px": TILE_PX}
    sidecar |= {"coordinates_npz_path": f"/elsewhere/{slide_id}.coordinates.npz", "requested_spacing_um": 0.5}
    (embeddings / f"{slide_id}.meta.json").write_text(json.dumps(sidecar))
    np.savez_compressed(
        tiles / f"{slide_id}.coordinates.npz",
        tile_index=np.arange(len(coords), dtype=np.int32),
        x=coords[:, 0],
        y=coords[:, 1],
        tissue_fractions=np.linspace(0, 1, len(coords), dtype=np.float32),
    )
    tiling = {"tile_size_lv0": SIDE, "requested_tile_size_px": TILE_PX, "requested_spacing_um": 0.5, "overlap": 0.0}
    meta = {"slide": {"dimensions": SIZE, "base_spacing_um": MPP}, "tiling": tiling}
    (tiles / f"{slide_id}.coordinates.meta.json").write_text(json.dumps(meta))


def write_slideflow(folder: Path, slide_id: str) -> None:
    features, coords = one_bag(slide_id)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(features), folder / f"{slide_id}.pt")
    np.savez(folder / f"{slide_id}.index", arr_0=coords + SIDE // 2)
    extractor = {"class": f"slideflow.model.extractors.{ENCODER}", "kwargs": {}}
    config = {"extractor": extractor, "normalizer": None, "num_features": DIM, "tile_px": TILE_PX, "tile_um": int(SIDE * MPP)}
    (folder / "bags_config.json").write_text(json.dumps(config))


def write_torchmil(folder: Path, slide_id: str, *, grid: bool = False, suffix: str = "npy") -> None:
    features, coords = one_bag(slide_id)
    if grid:
        coords = (coords - coords.min(0)) // SIDE
    for part, name, values in (("features", "features", features), ("coords", "coords", coords), ("labels", "labels", np.ones(1))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        if suffix == "npy":
            np.save(folder / part / f"{slide_id}.npy", values)
        else:
            with h5py.File(folder / part / f"{slide_id}.h5", "w") as content:
                content[name] = values


def write_trident(folder: Path, slide_id: str, suffix: str = "h5") -> None:
    features, coords = one_bag(slide_id)
    job = folder / "20x_256px_0px_overlap"
    stated = {"patch_size": TILE_PX, "patch_size_level0": SIDE, "level0_magnification": 40, "target_magnification": 20}
    stated |= {"overlap": 0, "name": slide_id, "savetodir": "out", "level0_width": SIZE[0], "level0_height": SIZE[1]}
    for part in ("patches", f"features_{ENCODER}"):
        (job / part).mkdir(parents=True, exist_ok=True)
    with h5py.File(job / "patches" / f"{slide_id}_patches.h5", "w") as content:
        _resizable(content, "coords", coords, 1).attrs.update(stated)
    if suffix == "pt":
        torch.save(torch.from_numpy(features), job / f"features_{ENCODER}" / f"{slide_id}.pt")
        return
    with h5py.File(job / f"features_{ENCODER}" / f"{slide_id}.h5", "w") as content:
        _resizable(content, "coords", coords, 1).attrs.update(stated)
        _resizable(content, "features", features, 1).attrs.update({"name": slide_id, "savetodir": "out", "encoder": ENCODER})


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "clam": write_clam,
    "stamp": write_stamp,
    "atlaspatch": write_atlaspatch,
    "slide2vec": write_slide2vec,
    "slideflow": write_slideflow,
    "torchmil": write_torchmil,
    "trident": write_trident,
}
