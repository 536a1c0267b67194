"""A cohort of bags: found in a folder, of one encoder, loaded as packed tensors.

- All bags must come from the same encoder and scale; two that differ are an error that names them.
- Bags are kept in memory up to a limit and read from their files beyond it: results are the same.
- A bag is checked once: its parts when it is found, its values when they are first loaded whole. From then on only its rows
  are read, and a file that was replaced is refused.
- Folders of other programs (CLAM, STAMP, torchmil …) are read in place, at the speed of their files.
- Rows that are not valid, or that the filter leaves out, never reach a model; a slide left without rows is an empty one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsimil.bags.bag import Bag, BagHeader, describe_encoder, read_header
from wsimil.bags.filter import NO_FILTER, kept_tiles
from wsimil.bags.interop import Known, find_foreign
from wsimil.batch import BagBatch
from wsimil.config import FilterConfig
from wsimil.errors import BagFormatError, EncoderMismatchError, UsageError, some_of
from wsimil.files import fingerprint
from wsimil.hdf5 import Allocate

__all__ = ["BagFolder", "are_other_slides", "find_features_folder"]

_OF_BAG = "bag:"
_BLOCK = 1024
"""Rows that are looked at together, in the processor's cache."""
_EXPONENT = np.uint16(0x7C00)
"""Bits of a number in half precision that are all set in NaN and infinity, and in nothing else."""


def find_features_folder(folder: str | Path) -> Path:
    """The folder of bags: `folder` itself if it holds `.h5` bags, else the one `features_*` folder below it.

    Raises:
        UsageError: none, or several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of bags")
    if folder.name.startswith("features_") or (any(folder.glob("*.h5")) and not any(folder.glob("*/features_*"))):
        return folder
    found = sorted(path for path in [*folder.glob("features_*"), *folder.glob("*/features_*")] if path.is_dir())
    if not found:
        raise UsageError(f"{folder}: no features_* folder in it; `wsimil extract` makes one")
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise UsageError(f"{folder}: several folders of bags ({names}); give one of them")
    return found[0]


def are_other_slides(one: str, other: str) -> bool:
    """Whether two `content`s of one id are surely of two slides; a bag may be made anew of the same slide."""
    return bool(one and other) and one != other and not one.startswith(_OF_BAG) and not other.startswith(_OF_BAG)


class BagFolder:
    """The bags of one features folder, by slide id. Threads may share it; a copy in another process has an empty cache.

    Args:
        folder: a job folder, a `features_*` folder, or a folder of another program's bags.
        filter: which tiles count; every valid one if not given.
        only: ids of the slides to take; others are as if they were not there.
        cache_bytes: bags kept in memory, at most.
        leave_damaged: a bag whose header cannot be read is left out and is in `damaged` with the reason, as long as others can be.

    Attributes:
        damaged: by slide id (of our own bags: by name of the file).

    Raises:
        UsageError: no bag in the folder.
        BagFormatError: a bag that is damaged, or two of one slide.
        EncoderMismatchError: bags of different encoders.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        filter: FilterConfig = NO_FILTER,
        only: Collection[str] | None = None,
        cache_bytes: int = 4 << 30,
        leave_damaged: bool = False,
    ) -> None:
        self.filter = filter
        self._passed_over = 0
        self.damaged: dict[str, str] = {}
        if foreign := find_foreign(Path(folder)):
            layout, paths = foreign
            self.folder = Path(folder)
            headers = self._read_headers(paths, lambda slide_id: layout.header(paths[slide_id], slide_id, Known()), leave_damaged)
        else:
            self.folder = find_features_folder(folder)
            paths = {path.stem: path for path in sorted(self.folder.glob("*.h5")) if not path.name.startswith(".")}
            headers = self._read_headers(paths, lambda stem: read_header(paths[stem]), leave_damaged)
            self._passed_over = len({path.stem for path in self.folder.glob("*.pt")} - set(paths))
        if only is not None:
            headers = [header for header in headers if header.slide_id in only]
            self.damaged = {name: reason for name, reason in self.damaged.items() if name in only}
        if not headers:
            raise UsageError(f"{self.folder}: no bag (*.h5) in it" + ("" if only is None else " of these slides"))
        _check_same_encoder(headers)
        self.headers: dict[str, BagHeader] = {}
        for header in headers:
            other = self.headers.setdefault(header.slide_id, header)
            if other is not header:
                names = f"{other.path.name} and {header.path.name}"
                raise BagFormatError(f"{self.folder}: {names} are both of slide {header.slide_id}; remove one")
        self._contents: dict[Path, str] = {}
        self._shared: Counter[Path] = Counter()  # bags in a file
        self._kept: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()
        self._cache: dict[str, Bag] = {}
        self._cache_bytes = self._cache_left = cache_bytes

    def _read_headers(self, names: Iterable[str], read: Callable[[str], BagHeader], leave_damaged: bool) -> list[BagHeader]:
        headers = []
        for name in names:
            try:
                headers.append(read(name))
            except BagFormatError as error:
                self.damaged[name] = str(error)
        if self.damaged and not (leave_damaged and headers):
            first, *others = self.damaged
            more = f" ({len(others)} more bags cannot be read: {some_of(others)}; `wsimil validate` says why)" if others else ""
            raise BagFormatError(self.damaged[first] + more)
        return headers

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": {}, "_cache_left": self._cache_bytes}

    @property
    def slide_ids(self) -> list[str]:
        """Every slide that has a bag, empty ones too."""
        return sorted(self.headers)

    @property
    def filled(self) -> list[str]:
        """Slides with at least one usable tile. Raises UsageError as `kept` does."""
        return [slide_id for slide_id in self.slide_ids if self.n_valid(slide_id) > 0]

    @property
    def dim(self) -> int:
        return next(iter(self.headers.values())).dim

    @property
    def remarks(self) -> list[str]:
        """What had to be assumed, or is not known, of bags of other programs: a line for each, with the number of slides."""
        texts = Counter(remark for header in self.headers.values() for remark in header.remarks)
        said = [f"{count} of {len(self.headers)} bags: {text}" for text, count in texts.items()]
        if self._passed_over:
            said.append(f"{self._passed_over} *.pt files beside the *.h5 bags are passed over: put them into a folder of their own")
        return said

    @property
    def encoder(self) -> tuple[str, str]:
        return next(iter(self.headers.values())).encoder

    def n_valid(self, slide_id: str) -> int:
        """Usable tiles of a slide; without a filter the header tells. Raises UsageError as `kept` does."""
        if self.filter != NO_FILTER:
            return int(self.kept(slide_id).sum())
        header = self.headers[slide_id]
        return header.n_tiles - int(header.attributes.get("n_invalid", 0))

    def kept(self, slide_id: str) -> np.ndarray:
        """Rows of the stored bag that are valid and pass the filter, (N,) bool: those that `load` gives, in its order.

        Raises:
            UsageError: the filter asks for a score that the bag lacks.
        """
        return self._kept_of(slide_id, self._cache.get(slide_id))

    def _kept_of(self, slide_id: str, bag: Bag | None) -> np.ndarray:
        if slide_id not in self._kept:
            header = self.headers[slide_id]
            valid, qc = (bag.valid, bag.qc) if bag else header.scores()
            self._kept[slide_id] = kept_tiles(valid, qc, self.filter, bag=header.path.name)
        return self._kept[slide_id]

    def fingerprint(self, slide_id: str) -> str:
        """What the bag was made of: changes when the slide or the recipe does."""
        header = self.headers[slide_id]
        said, path = header.attributes, header.path
        if "recipe_hash" not in said:  # another program's bag: its content has to speak
            # HDF5 ends with no checksum: rows that were written again show in its time alone
            written = f":{path.stat().st_mtime_ns}" if path.suffix in (".h5", ".hdf5") else ""
            return fingerprint([path]) + written
        unread = f":{said['n_invalid']}" if said.get("n_invalid") else ""
        return f"{said.get('slide_fingerprint', '')}:{said['recipe_hash']}:{header.n_tiles}{unread}"

    def content(self, slide_id: str) -> str:
        """Identity of the slide whatever it is called: of its file, or of the bag's where that is not stated; empty: not known."""
        header = self.headers[slide_id]
        if stated := header.attributes.get("slide_fingerprint"):
            return str(stated)
        if header.path not in self._contents:
            self._shared = self._shared or Counter(other.path for other in self.headers.values())
            self._contents[header.path] = _OF_BAG + fingerprint([header.path]) if self._shared[header.path] == 1 else ""
        return self._contents[header.path]

    def read(self, slide_id: str) -> Bag:
        """The bag as stored, compared with its checksums. Raises BagFormatError if it differs, or its file was replaced."""
        if cached := self._cache.get(slide_id):
            return cached
        header = self.headers[slide_id]
        valid, qc = header.scores()
        bag = Bag(header.features.read_checked(), header.coords(), valid, qc, header.attributes)
        if self._fits(header) and self._cache.setdefault(slide_id, bag) is bag:
            self._cache_left -= _size(header)
        return bag

    def load(self, slide_id: str, *, rows: np.ndarray | None = None, half: bool = False, allocate: Allocate = np.empty) -> BagBatch:
        """The usable tiles of a slide as a batch of one bag; features in float32, positions where the scale is known.

        Args:
            slide_id: which slide.
            rows: which of its usable tiles, counted from 0, in any order; all of them if not given. Only these are read.
            half: leave features in half precision if they are stored so.
            allocate: gives the memory that features are read into.

        Raises:
            BagFormatError: one of the tiles holds NaN or infinity, or as `read` does when all tiles are loaded first.
            IndexError: a row that the slide lacks.
            UsageError: as `kept` does.
        """
        header, bag = self.headers[slide_id], self._cache.get(slide_id)
        if bag is None and rows is None and (slide_id not in self._checked or self._fits(header)):
            bag = self.read(slide_id)
        keep = self._kept_of(slide_id, bag)
        picked = np.flatnonzero(keep)
        if rows is not None:
            picked = picked[rows]
        elif len(picked) == len(keep):
            picked = None  # in one piece is faster
        if bag is None:
            stored, coords = header.features.read(picked, allocate=allocate), header.coords_level0_px.read(picked)
        else:
            parts = bag.features, bag.coords_level0_px
            stored, coords = parts if picked is None else (part[picked] for part in parts)
        if slide_id not in self._checked:
            _check_finite(stored, picked, header.path)
            if rows is None:
                self._checked.add(slide_id)
        features = _as_tensor(stored, half=half, shared=picked is None and bag is not None and self._cache.get(slide_id) is bag)
        coords_um = tile_um = None
        if self.has_places(slide_id):
            mpp, tile_level0_px = (float(header.attributes[name]) for name in ("mpp", "tile_level0_px"))
            centre = (coords + tile_level0_px / 2) * mpp
            coords_um = torch.from_numpy(centre.astype(np.float32))
            tile_um = torch.tensor([tile_level0_px * mpp])
        return BagBatch(
            features=features,
            offsets=torch.tensor([0, len(features)]),
            coords_um=coords_um,
            tile_um=tile_um,
            slide_ids=(slide_id,),
        )

    def has_places(self, slide_id: str) -> bool:
        """Whether the bag says where on the slide its tiles lie, in µm: places on a grid, or none at all, say nothing."""
        said = self.headers[slide_id].attributes
        return bool(said.get("mpp") and said.get("tile_level0_px")) and said.get("coords_unit", "px") in ("px", "um")

    def _fits(self, header: BagHeader) -> bool:
        return header.slide_id not in self._cache and _size(header) <= self._cache_left


def _size(header: BagHeader) -> int:
    return header.features.nbytes + header.n_tiles * 2 * np.dtype(np.int64).itemsize


def _check_finite(features: np.ndarray, picked: np.ndarray | None, path: Path) -> None:
    finite = np.ones(len(features), bool)
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK]
        if block.dtype == np.float16:  # numpy computes in half precision value by value: its bits are looked at instead
            exponents = np.ascontiguousarray(block).view(np.uint16) & _EXPONENT
            suspect = len(block) > 0 and exponents.max() == _EXPONENT
        else:  # as models will see it; a sum may overflow, but it misses nothing
            with np.errstate(over="ignore", invalid="ignore"):
                block = block.astype(np.float32, copy=False)
                suspect = not np.isfinite(block.sum())
        if suspect:
            finite[start : start + _BLOCK] = np.isfinite(block).all(1)
    if not finite.all():
        row = np.flatnonzero(~finite)[0] if picked is None else picked[~finite][0]
        raise BagFormatError(
            f"{path}: the features of tile {row} are NaN or infinite; extract again, in fp32 if they came out of half precision"
        )


def _as_tensor(features: np.ndarray, *, half: bool, shared: bool) -> torch.Tensor:
    """A copy where the memory is shared: what a model does to its batch must not reach the cache."""
    if half and features.dtype == np.float16:
        return torch.from_numpy(features.copy() if shared else features)
    if features.dtype != np.float16:
        return torch.from_numpy(features.astype(np.float32, copy=shared))
    # torch converts half precision ten times as fast as numpy does, and numpy's memory comes in large pages
    wide = torch.from_numpy(np.empty(features.shape, np.float32))
    return wide.copy_(torch.from_numpy(features))


def _check_same_encoder(headers: list[BagHeader]) -> None:
    first = headers[0]
    for header in headers[1:]:
        if header.encoder != first.encoder or header.dim != first.dim:
            raise EncoderMismatchError(
                f"{first.slide_id} was made by {describe_encoder(first.encoder)}, {first.dim} wide, "
                f"{header.slide_id} by {describe_encoder(header.encoder)}, {header.dim} wide; "
                "extract all slides with one encoder"
            )
        scales = [float(item.attributes.get("effective_mpp", 0)) for item in (first, header)]
        if all(scales) and abs(scales[0] / scales[1] - 1) > 0.02:
            raise EncoderMismatchError(
                f"{first.slide_id} is seen at {scales[0]:.3g} µm/px, {header.slide_id} at {scales[1]:.3g}; extract all at one --mpp"
            )
