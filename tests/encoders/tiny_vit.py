"""The network of the loading tests: small enough to be made and saved in no time."""

from __future__ import annotations

from typing import Any

ARCHITECTURE = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 5, "num_heads": 3}
