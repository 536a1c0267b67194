"""tile → vector: encoders by name, their contracts, and where their weights come from.

Names are imported when first used, so listing encoders does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsimil.encoders.contract import EncoderContract
    from wsimil.encoders.encoder import Encoder
    from wsimil.encoders.listing import describe_encoders, encoder_rows
    from wsimil.encoders.load import (
        Embedding,
        describe_encoder,
        encoder_contract,
        load_encoder,
        load_random_twin,
        save_encoder,
        save_random_twin,
    )
    from wsimil.encoders.registry import ENCODERS, EncoderEntry, find_encoder

_HOMES = {
    "ENCODERS": "registry",
    "Embedding": "load",
    "Encoder": "encoder",
    "EncoderContract": "contract",
    "EncoderEntry": "registry",
    "describe_encoder": "load",
    "describe_encoders": "listing",
    "encoder_contract": "load",
    "encoder_rows": "listing",
    "find_encoder": "registry",
    "load_encoder": "load",
    "load_random_twin": "load",
    "save_encoder": "load",
    "save_random_twin": "load",
}

__all__ = [
    "ENCODERS",
    "Embedding",
    "Encoder",
    "EncoderContract",
    "EncoderEntry",
    "describe_encoder",
    "describe_encoders",
    "encoder_contract",
    "encoder_rows",
    "find_encoder",
    "load_encoder",
    "load_random_twin",
    "save_encoder",
    "save_random_twin",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"wsimil.encoders.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'wsimil.encoders' has no attribute {name!r}")
