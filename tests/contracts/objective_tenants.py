"""Three objectives that ask most of the contracts, and the smallest ViT that one of them needs.

- They stand for what objectives must be able to do: use labels on tiles, own modules, meet a model through a protocol, swap
  layers, change gradients, and resume from state dicts alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.batch import EncodesTokens, LabelledBags, Objective
from wsimil.objectives import SlideLabel

__all__ = ["ClamInstances", "LowRankLinear", "MaskedAutoencoder", "OrthogonalLora", "TinyViT", "patches_of"]


class ClamInstances(Objective):
    """.7 × slide label + .3 × tiles: of the true class, the k most attended tiles are its evidence, the k least are not.

    Lu 2021 (arXiv 2004.09666). A bag of fewer than k tiles gives all of them to both sides. With a single attention column
    both classes of a binary task share it.
    """

    def __init__(self, slide_label: SlideLabel, hidden: int, *, k: int = 8, share: float = 0.3) -> None:
        super().__init__()
        self.slide_label, self.k, self.share = slide_label, k, share
        self.judges = nn.ModuleList(nn.Linear(hidden, 2) for _ in slide_label.task.classes)

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        output = model(batch.bags)
        attention, tiles = output.attention_logits, output.tile_embedding
        if attention is None or tiles is None:
            raise TypeError(f"{type(model).__name__} gives no attention_logits and tile_embedding; ClamInstances needs both")
        per_bag = []
        for label, rows in zip(batch.targets.tolist(), batch.bags.offsets.unfold(0, 2, 1).tolist(), strict=True):
            rows, true_class = slice(*rows), int(label)
            ranking = attention[rows, min(true_class, attention.shape[1] - 1)].argsort(descending=True)
            k = min(self.k, len(ranking))
            chosen = tiles[rows][torch.cat([ranking[:k], ranking[-k:]])]  # (2k, H)
            verdict = torch.arange(2, device=tiles.device).flip(0).repeat_interleave(k)  # 1 … 1 0 … 0
            per_bag.append(F.cross_entropy(self.judges[true_class](chosen), verdict))
        tile_losses = torch.stack(per_bag)  # (B,)
        tile_loss = (tile_losses if batch.weights is None else tile_losses * batch.weights).mean()
        slide = self.slide_label.losses_of(output, batch)
        return {name: (1 - self.share) * loss for name, loss in slide.items()} | {"tiles": self.share * tile_loss}


def patches_of(images: Tensor, patch_px: int) -> Tensor:
    """(B, 3, height, width) → (B, P, 3 · patch_px²), patches row by row."""
    return F.unfold(images, patch_px, stride=patch_px).transpose(1, 2)


class TinyViT(nn.Module):
    """A ViT of one block: enough to hide patches from."""

    def __init__(self, image_px: int = 32, patch_px: int = 8, dim: int = 24) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.embed = nn.Linear(3 * patch_px**2, dim)
        self.position = nn.Parameter(torch.randn(1, (image_px // patch_px) ** 2, dim) * 0.1)
        self.block = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.0, batch_first=True, norm_first=True)

    def encode_tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        tokens = self.embed(patches_of(images, self.patch_px)) + self.position  # (B, P, D)
        if keep is not None:
            tokens = tokens.gather(1, keep.unsqueeze(2).expand(-1, -1, tokens.shape[2]))  # (B, M, D)
        return self.block(tokens)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_tokens(images).mean(1)  # (B, D)


class MaskedAutoencoder(Objective):
    """Reconstruct hidden patches from the visible ones (He 2022, arXiv 2111.06377); the decoder belongs to the objective.

    Which patches are hidden follows from `seed` and the step, and the step is a buffer: a resumed run hides the same ones.
    """

    step: Tensor

    def __init__(
        self, dim: int, *, image_px: int = 32, patch_px: int = 8, ratio: float = 0.75, width: int = 24, seed: int = 0
    ) -> None:
        super().__init__()
        self.patch_px, self.ratio, self.seed = patch_px, ratio, seed
        self.n_patches = (image_px // patch_px) ** 2
        self.widen = nn.Linear(dim, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, self.n_patches, width) * 0.1)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.to_pixels = nn.Linear(width, 3 * patch_px**2)
        self.register_buffer("step", torch.tensor(0))

    def hide(self, n_images: int) -> tuple[Tensor, Tensor]:
        """Indices of the visible patches (B, M) and mask of the hidden ones (B, P), of the present step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.step))
        order = torch.rand(n_images, self.n_patches, generator=generator).argsort(1).to(self.step.device)
        keep = order[:, : self.n_patches - round(self.ratio * self.n_patches)]
        return keep, torch.ones_like(order, dtype=torch.bool).scatter(1, keep, False)

    def decode(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Tokens of the visible patches (B, M, D) → pixels of every patch (B, P, 3 · patch_px²)."""
        visible = self.widen(tokens)  # (B, M, W)
        everywhere = self.hidden_token.expand(len(keep), self.n_patches, -1)
        everywhere = everywhere.scatter(1, keep.unsqueeze(2).expand_as(visible), visible)
        return self.to_pixels(self.block(everywhere + self.position))

    def reconstruction_loss(self, pixels: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error on hidden patches, each target normalised by its own mean and deviation."""
        target = patches_of(images, self.patch_px)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
        return (pixels - target)[hidden].square().mean()

    def losses(self, model: nn.Module, batch: Tensor, progress: float) -> dict[str, Tensor]:
        if not isinstance(model, EncodesTokens):
            raise TypeError(f"{type(model).__name__} has no encode_tokens(images, keep); a masked autoencoder needs a ViT")
        keep, hidden = self.hide(len(batch))
        pixels = self.decode(model.encode_tokens(batch, keep), keep)
        return {"pixels": self.reconstruction_loss(pixels, batch, hidden)}

    def after_step(self) -> None:
        self.step += 1


class LowRankLinear(nn.Module):
    """y = (W + up·down) x + b: W and b frozen, up·down learned outside the subspaces that W uses.

    The subspaces are kept as projectors, whose shape does not depend on the rank: a state dict always fits.
    """

    weight: Tensor
    bias: Tensor | None
    output_space: Tensor
    input_space: Tensor

    def __init__(self, linear: nn.Linear, rank: int, energy: float) -> None:
        super().__init__()
        left, sizes, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        used = int((sizes.square().cumsum(0) / sizes.square().sum() < energy).sum()) + 1
        self.register_buffer("weight", linear.weight.detach().clone())  # (out, in)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.register_buffer("output_space", left[:, :used] @ left[:, :used].T)  # (out, out)
        self.register_buffer("input_space", right[:used].T @ right[:used])  # (in, in)
        self.up = nn.Parameter(torch.zeros(len(self.weight), rank))
        self.down = nn.Parameter(self.outside(torch.randn(rank, self.weight.shape[1]) / rank, "input"))

    def outside(self, values: Tensor, side: str) -> Tensor:
        """`values` without their part in the old subspace."""
        return values - (self.output_space @ values if side == "output" else values @ self.input_space)

    def off_identity(self) -> Tensor:
        """How far the new factors are from orthonormal."""
        identity = torch.eye(self.up.shape[1], dtype=self.up.dtype, device=self.up.device)
        grams = (self.up.T @ self.up - identity, self.down @ self.down.T - identity)
        return torch.stack([gram.square().sum() for gram in grams]).sum() / len(identity) ** 2

    def forward(self, values: Tensor) -> Tensor:
        return F.linear(values, self.weight, self.bias) + values @ self.down.T @ self.up.T


class OrthogonalLora(Objective):
    """Learn a further task beside the old ones: old weights frozen, new low-rank ones kept off their subspaces.

    After CoMEL's OWLoRA (Lee 2025, arXiv 2507.02395). Heads, by name, stay whole and are trained.
    """

    def __init__(
        self, inner: Objective, *, heads: tuple[str, ...], rank: int = 3, energy: float = 0.5, weight: float = 0.01
    ) -> None:
        super().__init__()
        self.inner, self.heads, self.rank, self.energy, self.weight = inner, heads, rank, energy, weight
        # a tuple, not a ModuleList: the layers are the model's, and must not appear again in this state dict or its parameters
        self.layers: tuple[LowRankLinear, ...] = ()

    def prepare(self, model: nn.Module) -> None:
        self.inner.prepare(model)
        swapped = []
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.heads))
        for name, linear in linears:
            if not name.startswith(self.heads):
                parent, _, attribute = name.rpartition(".")
                layer = LowRankLinear(linear, self.rank, self.energy)
                setattr(model.get_submodule(parent), attribute, layer)
                swapped.append(layer)
        self.layers = tuple(swapped)

    def losses(self, model: nn.Module, batch: LabelledBags, progress: float) -> dict[str, Tensor]:
        off_identity = torch.stack([layer.off_identity() for layer in self.layers]).sum()
        return self.inner.losses(model, batch, progress) | {"orthonormal": self.weight * off_identity}

    @torch.no_grad()
    def after_backward(self) -> None:
        self.inner.after_backward()
        for layer in self.layers:
            assert layer.up.grad is not None and layer.down.grad is not None
            layer.up.grad = layer.outside(layer.up.grad, "output")
            layer.down.grad = layer.outside(layer.down.grad, "input")

    @torch.no_grad()
    def after_step(self) -> None:
        self.inner.after_step()
        for layer in self.layers:  # Adam scales each coordinate by itself, so a projected gradient alone drifts back in
            layer.up.copy_(layer.outside(layer.up, "output"))
            layer.down.copy_(layer.outside(layer.down, "input"))
