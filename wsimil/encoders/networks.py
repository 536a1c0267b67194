"""Networks from a name and JSON-like arguments: everything timm has, and two it has not.

- `ctranspath` is timm's Swin-T with a convolutional stem (Wang 2022); `conch_v1_5` a ViT-L whose tokens are pooled by one
  attention query (Lu 2024, Ding 2024). Both keep the parameter names of the published weights.
- Nothing is downloaded here. Weights are random until `weights.py` fills them in.
- timm is imported when it is needed: that takes as long as importing all the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsimil.errors import EncoderError

__all__ = ["build_network"]


def build_network(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """A network without classifier, in eval mode, with random weights.

    Raises:
        EncoderError: timm does not know the architecture, or it does not take the arguments.
    """
    import timm
    from timm.layers.mlp import SwiGLUPacked

    make = {"ctranspath": _ctranspath, "conch_v1_5": _ConchTower}.get(architecture)
    if make is None and not timm.is_model(architecture):
        raise EncoderError(f"architecture {architecture!r} is not one that timm {timm.__version__} can build")
    layers: dict[str, Any] = {"swiglu": SwiGLUPacked, "silu": nn.SiLU}
    arguments = {key: layers.get(value, value) if isinstance(value, str) else value for key, value in model_args.items()}
    try:
        if make is not None:
            return make(**arguments).eval()
        return timm.create_model(architecture, **{"num_classes": 0, **arguments}, pretrained=False).eval()
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise EncoderError(f"architecture {architecture} cannot be built with {dict(model_args)}: {error}") from error


def _ctranspath() -> nn.Module:
    import timm

    swin: Any = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 24)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    swin.patch_embed.proj = nn.Sequential(*layers, nn.Conv2d(24, 96, 1))
    return swin


class _ConchTower(nn.Module):
    """(B, 3, 448, 448) → (B, 768)."""

    num_features = 768

    def __init__(self) -> None:
        import timm

        super().__init__()
        self.trunk: Any = timm.create_model("vit_large_patch16_224", num_classes=0, img_size=448, init_values=1.0)
        self.attn_pool_contrast = _QueryPool(1024, self.num_features, heads=8)
        self.ln_contrast = nn.LayerNorm(self.num_features)

    def fit_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the position embedding of a checkpoint made for another input size."""
        from timm.models.vision_transformer import checkpoint_filter_fn as fit_to_vit

        inside = {key.removeprefix("trunk."): value for key, value in state.items() if key.startswith("trunk.")}
        rest = {key: value for key, value in state.items() if not key.startswith("trunk.")}
        return rest | {f"trunk.{key}": value for key, value in fit_to_vit(inside, self.trunk).items()}

    def forward(self, images: Tensor) -> Tensor:
        return self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(images)))


class _QueryPool(nn.Module):
    """One learned query attends to all tokens: (B, T, tokens_dim) → (B, dim)."""

    def __init__(self, tokens_dim: int, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.ln_q, self.ln_k = nn.LayerNorm(dim), nn.LayerNorm(tokens_dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(tokens_dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        b = len(tokens)
        query = self.to_q(self.ln_q(self.query)).expand(b, -1, -1)  # (B, 1, dim)
        key, value = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)  # (B, T, dim)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        pooled = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, dim / heads)
        return self.to_out(pooled.transpose(1, 2).flatten(1))
