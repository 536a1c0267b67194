"""MAE: most patches of a tile are hidden and a small decoder paints them from those that are seen.

He et al. 2022 (arXiv 2111.06377).

- The encoder sees the kept patches only, a quarter of them: this is the method for a machine without GPU.
- Which patches are hidden comes with the batch, so that it can be a function of the tile's number; without it, of torch's state.
- The decoder looks near first: its attention falls with the distance of two patches, in each head differently fast. Left to find
  its neighbours by itself, a run of some hundred steps learns the colours of tiles and stops there. What is hidden begins as the
  mean of what is seen, which is what an encoder of mean patches gives.
- Patches of bare glass are left out of the loss: normalised to unit deviation they are noise made large. Glass is flat in every
  colour, whatever its tint; colours are told apart for it, for each is normalised by numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.batch import EncodesTokens, Objective
from wsimil.errors import ConfigError

__all__ = ["MaeObjective", "MaskedImages", "mae_loss", "patchify", "unpatchify"]


@dataclass(frozen=True)
class MaskedImages:
    """Normalised images of B tiles, and for each patch a number: those with the smallest are seen."""

    images: Tensor  # (B, 3, px, px)
    scores: Tensor  # (B, patches), patches row by row

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> MaskedImages:
        return MaskedImages(self.images.to(device), self.scores.to(device))


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """(B, 3, height, width) → (B, patches, patch_px² × 3), patches row by row, within a patch pixel by pixel, colour last."""
    b, colours, height, width = images.shape
    patches = images.reshape(b, colours, height // patch_px, patch_px, width // patch_px, patch_px)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_px: int, *, width: int) -> Tensor:
    """The way back from `patchify` for images of that width."""
    across = width // patch_px
    b, n_patches, _ = patches.shape
    grid = patches.reshape(b, n_patches // across, across, patch_px, patch_px, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, n_patches // across * patch_px, width)


def mae_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(B, N, P), (B, N, P), (B, N) with 1 where it counts → mean squared error over the patches that count."""
    error = (pred.float() - target.float()).square().mean(-1)  # (B, N)
    return (error * mask).sum() / mask.sum().clamp_min(1)


class MaeObjective(Objective):
    """Masked images painted again: `losses` takes `MaskedImages` or images (B, 3, px, px); the model encodes tokens.

    Args:
        dim, patch_px: width and side of a patch of the model.
        decoder_dim, decoder_blocks: of the decoder, which is thrown away.
        mask_ratio: share of the patches that are hidden.
        norm_pix: what is painted are pixels with mean 0 and deviation 1 within each patch.
        skip_std: patches of which no colour deviates as much do not count; as a share of the way from black to white.
        pixel_std: what the images were divided by.
    """

    def __init__(
        self,
        dim: int,
        *,
        patch_px: int = 16,
        decoder_dim: int = 192,
        decoder_blocks: int = 2,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        skip_std: float = 0.02,
        pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1 or decoder_dim % 4:
            raise ConfigError(
                f"mask_ratio {mask_ratio}, decoder_dim {decoder_dim}; expected a ratio between 0 and 1 and a multiple of 4"
            )
        self.patch_px, self.mask_ratio, self.norm_pix = patch_px, mask_ratio, norm_pix
        self.skip_std, self.pixel_std = skip_std, pixel_std
        self.embed = nn.Linear(dim, decoder_dim)
        self.hidden_token = nn.Parameter(torch.empty(decoder_dim))
        self.blocks = nn.ModuleList(_Block(decoder_dim) for _ in range(decoder_blocks))
        self.norm = nn.LayerNorm(decoder_dim)
        self.paint = nn.Linear(decoder_dim, patch_px**2 * 3)
        nn.init.normal_(self.hidden_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.monitor: dict[str, Tensor] = {}

    def losses(self, model: nn.Module, batch: MaskedImages | Tensor, progress: float) -> dict[str, Tensor]:
        images, scores = (batch, None) if isinstance(batch, Tensor) else (batch.images, batch.scores)
        target = patchify(images, self.patch_px)  # (B, N, P)
        if scores is None:
            scores = torch.rand(target.shape[:2], device=images.device)
        if scores.shape != target.shape[:2]:
            raise ConfigError(f"scores for {tuple(scores.shape)} patches, the images have {tuple(target.shape[:2])}")
        hidden, keep = self.hide(scores)
        pred = self.predict(model, images, keep)
        deviation = target.unflatten(-1, (-1, 3)).std(-2, correction=0) * target.new_tensor(self.pixel_std)  # (B, N, 3)
        counts = hidden & (deviation.amax(-1) >= self.skip_std)
        if self.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = mae_loss(pred, target, counts)
        self.monitor = {"loss": loss.detach(), "glass": 1 - counts.sum() / hidden.sum()}
        return {"mae": loss}

    def hide(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) → which patches are hidden (B, N), and the places (B, M) of those that are seen, in the order of the image."""
        n_patches = scores.shape[1]
        n_kept = max(1, n_patches - round(n_patches * self.mask_ratio))
        keep = scores.argsort(1)[:, :n_kept].sort(1).values
        return torch.ones_like(scores, dtype=torch.bool).scatter(1, keep, False), keep

    def predict(self, model: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
        """What the decoder paints at every patch: (B, N, P), in the units of the target."""
        if not isinstance(model, EncodesTokens):
            raise ConfigError(f"{type(model).__name__} has no encode_tokens(images, keep); MAE needs a ViT")
        rows, columns = (side // self.patch_px for side in images.shape[2:])
        seen = self.embed(model.encode_tokens(images, keep))  # (B, M, H)
        tokens = (self.hidden_token.to(seen.dtype) + seen.mean(1, keepdim=True)).expand(-1, rows * columns, -1)  # (B, N, H)
        tokens = tokens.scatter(1, keep.unsqueeze(-1).expand(-1, -1, seen.shape[-1]), seen)
        tokens = tokens + _positions(rows, columns, seen.shape[-1], seen.device)
        distances = _distances(rows, columns, seen.device)
        for block in self.blocks:
            tokens = block(tokens, distances)
        return self.paint(self.norm(tokens))


def _positions(rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """(rows × columns, dim): sines and cosines of the row, then of the column (Vaswani 2017, in two dimensions)."""
    rates = 10000.0 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    angles = torch.stack([y.flatten(), x.flatten()], 1).unsqueeze(-1) * rates  # (N, 2, dim / 4)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def _distances(rows: int, columns: int, device: torch.device) -> Tensor:
    """(N, N) from patch to patch, in patches."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).float()
    return (places.unsqueeze(0) - places.unsqueeze(1)).square().sum(-1).sqrt()


class _Block(nn.Module):
    """A transformer block, norms first, that looks near first: (B, N, H), distances (N, N) → (B, N, H).

    A distance costs a logit 2, 1, ½, ¼ … times itself, head by head: Press et al. 2022 (arXiv 2108.12409), on a plane.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // 32 if dim % 32 == 0 else 1
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, H / heads)
        costs = 2.0 ** (1 - torch.arange(self.heads, device=x.device)).view(-1, 1, 1)  # (heads, 1, 1)
        nearness = (-costs * distances).to(qkv.dtype)  # (heads, N, N)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=nearness).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.mlp(self.norm2(x))
