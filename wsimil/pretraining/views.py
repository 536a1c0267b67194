"""What is made of a tile before a network sees it: crops, orientation, stain, colour, blur.

- Every random number is a function of (seed, tile number, view): not of batch mates, workers, ranks or the number of other views.
- Stain is changed after the crop, for each view by itself: the network then cannot recognise a tile by its stain.
- Pixels are worked on in batches on the device. On a CPU crops are cut one by one: faster there, and equal to one grey level.
- No hue and no solarising by default: the colours of two dyes are what tissue is told by.

The HED step multiplies and shifts the amounts of haematoxylin, eosin and a residual (Tellez et al. 2018, arXiv 1808.05896) in the
units of scikit-image's rgb2hed, in which σ = 0.06 is strong: stain vectors of Ruifrok and Johnston 2001, logarithms to base 1e6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor

from wsimil.encoders.contract import IMAGENET_MEAN, IMAGENET_STD
from wsimil.errors import ConfigError
from wsimil.objectives.dino import MultiCrop
from wsimil.objectives.mae import MaskedImages

__all__ = ["DINO_VIEWS", "MAE_VIEWS", "SELF_VIT_MIL_VIEWS", "ViewRecipe", "mae_images", "make_views"]

_RGB_OF_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_LOG_BASE = -math.log(1e-6)
_DARKEST = 0.5 / 255  # half a grey level: black has no optical density
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
_RATIO = (3 / 4, 4 / 3)
_STREAM = 0x7669657773  # this module's own random numbers, whatever else uses the seed

# columns of a view's random numbers; append only, so that what a seed gives stays
(_AREA, _SHAPE, _X, _Y, _FLIP_X, _FLIP_Y, _TURN, _JITTER, _BRIGHT, _CONTRAST, _SATURATE, _HUE, _GREYED, _BLURRED, _SIGMA, _SOLAR,
 _HED) = range(17)  # fmt: skip
_COLUMNS = 32


@dataclass(frozen=True)
class ViewRecipe:
    """How views are made; probabilities are per view, scales are shares of the tile's area."""

    n_global: int = 2
    global_px: int = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    n_local: int = 8
    local_px: int = 96
    local_scale: tuple[float, float] = (0.05, 0.32)
    all_turns: bool = True  # each of the eight orientations alike; else only the left-right mirror image, with one half
    hed_sigma: float = 0.06  # of the factor and of the shift of each stain
    jitter: tuple[float, float, float] = (0.2, 0.2, 0.1)  # brightness, contrast, saturation: factors 1 ± this
    clamped: bool = False  # each of these steps ends within 0-1, as torchvision's do; else the last alone
    hue: float = 0.0  # ± this, in turns
    jitter_p: float = 0.8
    grey_p: float = 0.1
    blur_p: tuple[float, float, float] = (0.5, 0.1, 0.3)  # first global view, other global views, local views
    blur_sigma_px: tuple[float, float] = (0.1, 1.8)
    solarise_p: float = 0.0  # of the global views after the first
    patch_px: int = 16  # side of what is hidden in masked images
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, (least, most) in (("global_scale", self.global_scale), ("local_scale", self.local_scale)):
            if not 0 < least <= most <= 1:
                raise ConfigError(f"{name} is {(least, most)}; expected two rising shares of the tile, the last at most 1")
        if self.n_global < 1 or min(self.hed_sigma, *self.jitter, self.hue, self.blur_sigma_px[0]) < 0:
            raise ConfigError("views: at least one global view, and no negative strength")


DINO_VIEWS = ViewRecipe()

MAE_VIEWS = ViewRecipe(
    n_global=1, n_local=0, global_scale=(0.4, 1.0), hed_sigma=0.05, jitter_p=0.0, grey_p=0.0, blur_p=(0.0, 0.0, 0.0)
)

SELF_VIT_MIL_VIEWS = ViewRecipe(
    global_scale=(0.4, 1.0),
    local_scale=(0.05, 0.4),
    all_turns=False,
    hed_sigma=0.0,
    jitter=(0.4, 0.4, 0.2),
    clamped=True,
    hue=0.1,
    grey_p=0.2,
    blur_p=(1.0, 0.1, 0.5),
    blur_sigma_px=(0.1, 2.0),
    solarise_p=0.2,
    mean=(0.6223, 0.4763, 0.6009),
    std=(0.2012, 0.2190, 0.1722),
)
"""As published with arXiv 2210.09021: natural-image DINO's, with the mean and deviation of its own tiles."""


def make_views(
    pixels: np.ndarray | Tensor, numbers: np.ndarray, *, seed: int, recipe: ViewRecipe, device: torch.device | str = "cpu"
) -> MultiCrop:
    """uint8 (B, H, W, 3) and the tiles' numbers (B,) → their views on the device."""
    tiles = _tiles(pixels, device)
    random = _random(numbers, seed, recipe.n_global + recipe.n_local)  # (B, views, columns)
    views = tuple(_view(tiles, random[:, place], recipe, place) for place in range(random.shape[1]))
    return MultiCrop(views[: recipe.n_global], views[recipe.n_global :])


def mae_images(
    pixels: np.ndarray | Tensor,
    numbers: np.ndarray,
    *,
    seed: int,
    recipe: ViewRecipe = MAE_VIEWS,
    device: torch.device | str = "cpu",
) -> MaskedImages:
    """uint8 (B, H, W, 3) → the first global view of each tile, and the random numbers that say which patches are hidden."""
    tiles = _tiles(pixels, device)
    images = _view(tiles, _random(numbers, seed, 1)[:, 0], recipe, 0)
    n_patches = (recipe.global_px // recipe.patch_px) ** 2
    scores = np.stack([_generator(number, seed, 1).random(n_patches, dtype=np.float32) for number in numbers])
    return MaskedImages(images, torch.from_numpy(scores).to(device))


def _tiles(pixels: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    tiles = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
    if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != torch.uint8:
        raise ConfigError(f"tiles are {tiles.dtype} {tuple(tiles.shape)}; views are made of torch.uint8 (B, H, W, 3), RGB")
    return tiles.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, H, W)


def _generator(number: int, seed: int, part: int = 0) -> np.random.Generator:
    """The random numbers of one tile; no two tiles or parts share any."""
    return np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, part, int(number)]))


def _random(numbers: np.ndarray, seed: int, n_views: int) -> np.ndarray:
    """(B, views, columns), uniform: a view's row is the same however many views follow."""
    return np.stack([_generator(number, seed).random((n_views, _COLUMNS)) for number in numbers])


def _view(tiles: Tensor, random: np.ndarray, recipe: ViewRecipe, place: int) -> Tensor:
    """One view of every tile, normalised: (B, 3, px, px)."""
    is_global = place < recipe.n_global
    px = recipe.global_px if is_global else recipe.local_px
    boxes = _boxes(random, recipe.global_scale if is_global else recipe.local_scale, *tiles.shape[2:])
    turns = random[:, [_FLIP_X, _FLIP_Y, _TURN]] < np.array([0.5, 0.5, 0.5] if recipe.all_turns else [0.5, 0, 0])
    if tiles.device.type != "cpu":
        return _recoloured(_crops_by_matrix(tiles, boxes, turns, px), random, recipe, place)
    views = torch.empty(len(tiles), 3, px, px)
    at_once = max(1, _AT_ONCE // px**2)
    for start in range(0, len(tiles), at_once):
        rows = slice(start, start + at_once)
        crops = _crops_one_by_one(tiles[rows], boxes[rows], turns[rows], px)
        views[rows] = _recoloured(crops, random[rows], recipe, place)
    return views


_AT_ONCE = 2**17
"""Pixels that a CPU works on together: three floats of each, and the copies, fit its cache."""


def _boxes(random: np.ndarray, scale: tuple[float, float], height: int, width: int) -> np.ndarray:
    """(B, 4) whole pixels: x, y, width, height. The area is uniform in `scale`; of the shapes those are drawn that fit."""
    area = scale[0] + (scale[1] - scale[0]) * random[:, _AREA]
    least = np.maximum(_RATIO[0], area * width / height)
    most = np.maximum(least, np.minimum(_RATIO[1], width / height / area))
    ratio = least * (most / least) ** random[:, _SHAPE]
    side = np.sqrt(area * width * height)
    w = np.clip(np.rint(side * np.sqrt(ratio)), 1, width).astype(int)
    h = np.clip(np.rint(side / np.sqrt(ratio)), 1, height).astype(int)
    x = np.floor(random[:, _X] * (width - w + 1)).astype(int)
    y = np.floor(random[:, _Y] * (height - h + 1)).astype(int)
    return np.stack([x, y, w, h], 1)


def _crops_one_by_one(tiles: Tensor, boxes: np.ndarray, turns: np.ndarray, px: int) -> Tensor:
    """uint8 (B, 3, H, W) → float (B, 3, px, px) in 0-1: cut, resized without aliasing, turned."""
    crops = torch.empty(len(tiles), 3, px, px, dtype=torch.uint8)
    for place, ((x, y, w, h), (flip_x, flip_y, turn)) in enumerate(zip(boxes.tolist(), turns.tolist(), strict=True)):
        cut = tiles[place : place + 1, :, y : y + h, x : x + w]
        crop = F.interpolate(cut, (px, px), mode="bilinear", antialias=True)[0]
        mirrored = [axis for axis, asked in ((2, flip_x), (1, flip_y)) if asked]
        crop = crop.flip(mirrored) if mirrored else crop
        crops[place] = crop.transpose(1, 2) if turn else crop
    return crops.float().div_(255)


def _crops_by_matrix(tiles: Tensor, boxes: np.ndarray, turns: np.ndarray, px: int) -> Tensor:
    """The same for all tiles together: resizing is a matrix from the left and one from the right."""
    x, y, w, h = boxes.T
    down = _resizing(y, h, tiles.shape[2], px, turns[:, 1], tiles.device)  # (B, px, H)
    across = _resizing(x, w, tiles.shape[3], px, turns[:, 0], tiles.device)  # (B, px, W)
    crops = down.unsqueeze(1) @ (tiles.float() / 255) @ across.unsqueeze(1).transpose(2, 3)  # (B, 3, px, px)
    turned = torch.from_numpy(turns[:, 2]).to(tiles.device).view(-1, 1, 1, 1)
    return torch.where(turned, crops.transpose(2, 3), crops).contiguous()


def _resizing(start: np.ndarray, length: np.ndarray, n_pixels: int, px: int, flip: np.ndarray, device: torch.device) -> Tensor:
    """(B, px, n_pixels): triangle weights as wide as the reduction, within `start` … `start + length`; rows sum to 1."""
    facts = torch.from_numpy(np.stack([start, length, flip]).astype(np.float32)).to(device)[..., None, None]  # (3, B, 1, 1)
    first, size, mirrored = facts
    reduction = size / px
    out = torch.arange(px, device=device).view(1, px, 1)
    out = torch.where(mirrored > 0, px - 1 - out, out)
    pixel = torch.arange(n_pixels, device=device).view(1, 1, n_pixels)
    distance = (pixel + 0.5 - first - (out + 0.5) * reduction).abs() / reduction.clamp_min(1)
    weights = (1 - distance).clamp_min(0) * ((pixel >= first) & (pixel < first + size))
    return weights / weights.sum(-1, keepdim=True)


def _recoloured(x: Tensor, random: np.ndarray, recipe: ViewRecipe, place: int) -> Tensor:
    """(B, 3, px, px) in 0-1 → stain, colour, blur, then normalised; `x` is used up."""
    shape = x.shape
    if recipe.hed_sigma > 0:
        matrix, shift = _stain_change(random, recipe.hed_sigma)
        log_x = x.flatten(2).clamp_(min=_DARKEST).log_()  # (B, 3, pixels)
        x = torch.baddbmm(_to(shift, x).unsqueeze(-1), _to(matrix, x), log_x).exp_().clamp_(max=1).view(shape)
    jittered = random[:, _JITTER] < recipe.jitter_p
    if recipe.hue > 0:
        rows = np.flatnonzero(jittered)
        turns = _to((2 * random[rows, _HUE] - 1) * recipe.hue, x)
        x[rows] = _hue_turned(x[rows], turns)
    greyed = random[:, _GREYED] < recipe.grey_p
    if (jittered.any() and any(recipe.jitter)) or greyed.any():
        strength = np.array(recipe.jitter) * jittered[:, None]
        factors = 1 + (2 * random[:, [_BRIGHT, _CONTRAST, _SATURATE]] - 1) * strength
        steps = [np.where(np.arange(3) == part, factors, 1) for part in range(3)] if recipe.clamped else [factors]
        for number, step in enumerate(steps, 1):
            matrix, of_mean = _color_change(step, greyed & (number == len(steps)))
            flat = x.flatten(2)
            shift = _to(of_mean, x).view(-1, 1, 1) * (flat.mean(2) @ x.new_tensor(_GREY)).view(-1, 1, 1)
            x = torch.baddbmm(shift.expand(-1, 3, 1), _to(matrix, x), flat).clamp_(0, 1).view(shape)
    blur_p = recipe.blur_p[min(place, 1)] if place < recipe.n_global else recipe.blur_p[2]
    rows = np.flatnonzero(random[:, _BLURRED] < blur_p)
    if len(rows):
        least, most = recipe.blur_sigma_px
        x[rows] = _blurred(x[rows], _to(least + (most - least) * random[rows, _SIGMA], x), math.ceil(3 * most))
    if 0 < place < recipe.n_global and recipe.solarise_p > 0:
        rows = np.flatnonzero(random[:, _SOLAR] < recipe.solarise_p)
        x[rows] = torch.where(x[rows] >= 0.5, 1 - x[rows], x[rows])
    mean, std = x.new_tensor(recipe.mean).view(3, 1, 1), x.new_tensor(recipe.std).view(3, 1, 1)
    return x.sub_(mean).div_(std)


def _to(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(like.device, non_blocking=True)


def _stain_change(random: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """What happens to the logarithm of a pixel: (B, 3, 3) from the left, then (B, 3) added.

    Amounts of stain are linear in it, so into stains, changed and back is one matrix.
    """
    normal = ndtri(np.clip(random[:, _HED : _HED + 6], 1e-9, 1 - 1e-9)) * sigma
    factor, shift = 1 + normal[:, :3], normal[:, 3:]
    matrix = np.linalg.inv(_RGB_OF_HED) @ (factor[:, :, None] * _RGB_OF_HED)  # of rows
    return matrix.transpose(0, 2, 1), -_LOG_BASE * shift @ _RGB_OF_HED


def _color_change(factors: np.ndarray, greyed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, contrast about the mean grey, saturation, grey: (B, 3, 3) from the left, and how much of the mean grey to add."""
    bright, contrast, saturate = factors.T
    saturate = np.where(greyed, 0.0, saturate)[:, None, None]
    matrix = saturate * np.eye(3) + (1 - saturate) * np.array(_GREY)  # each row of the last: grey
    return (bright * contrast)[:, None, None] * matrix, (1 - contrast) * bright


def _hue_turned(x: Tensor, turns: Tensor) -> Tensor:
    """(B, 3, px, px) with the hue of HSV moved by so many turns; lightest and darkest channel of a pixel stay."""
    value, lightest = x.max(1)
    chroma = value - x.amin(1)
    red, green, blue = x.unbind(1)
    safe = chroma.clamp_min(1e-6)
    sixth = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], 1)
    sixth = sixth.gather(1, lightest.unsqueeze(1)).squeeze(1) + 6 * turns.view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (sixth + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _blurred(x: Tensor, sigma_px: Tensor, radius_px: int) -> Tensor:
    """(B, 3, px, px), each by a Gaussian of its own."""
    b, colours, height, width = x.shape
    radius_px = min(radius_px, height - 1, width - 1)
    offsets = torch.arange(-radius_px, radius_px + 1, device=x.device)
    kernel = (-0.5 * (offsets / sigma_px.unsqueeze(1)).square()).softmax(1)  # (B, taps)
    kernel = kernel.repeat_interleave(colours, 0).unsqueeze(1).unsqueeze(-1)  # (B × 3, 1, taps, 1)
    flat = F.pad(x.reshape(1, b * colours, height, width), [radius_px] * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, kernel, groups=b * colours), kernel.transpose(2, 3), groups=b * colours)
    return flat.view(x.shape)
