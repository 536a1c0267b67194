"""Weights files: read without running code, brought to the network's names, loaded completely or not at all.

- `.safetensors`, or a torch file read with `weights_only=True`: a pickle that would call anything is refused.
- Training checkpoints are understood: the network is found in them (the teacher's, where there is a student too) and a prefix such
  as `teacher.backbone.` is removed, if what is under it fits the network exactly. Heads beside it are left out.
- transformers' DINOv2 layout and the chunked blocks of DINOv2's training code are converted here; other layouts of a family
  (original DINOv2, old Swin) by timm's own converters.
- Anything missing, unexpected or of another shape is an error that names it.
"""

from __future__ import annotations

import hashlib
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wsimil.encoders.networks import build_network
from wsimil.errors import EncoderError, EncoderWeightsError

__all__ = ["WEIGHT_SUFFIXES", "network_with_weights", "read_weights", "skeleton", "state_sha256"]

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".torch", ".tar")

_WRAPPERS = (
    "teacher", "model_ema", "state_dict_ema", "ema",
    "state_dict", "model_state_dict", "model", "module", "backbone", "encoder", "student",
)  # fmt: skip
"""Keys under which training code keeps a state dict, the one to use first."""

_CHUNK = re.compile(r"\b(blocks\.)\d+\.(?=\d+\.)")
"""DINOv2 trains in chunks: blocks.<chunk>.<block>.… where <block> counts through all of them."""

_PATCH = "patch_embed.proj.weight"
_HF_ANCHOR = "embeddings.patch_embeddings.projection.weight"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, names as they are in it; of a nested checkpoint the part that holds the network.

    Raises:
        EncoderWeightsError: not such a file, damaged, or a pickle that needs code to be run.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _harmless_classes():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise EncoderWeightsError(
            f"{path}: not a plain file of tensors, and pickled code is never run ({reason}); "
            "save the state dict alone, best with safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise EncoderWeightsError(f"{path}: cannot be read as weights ({error}); is the file complete?") from error
    tensors = _tensors_of(content)
    if not tensors:
        raise EncoderWeightsError(f"{path}: holds no tensors ({type(content).__name__})")
    return tensors


def _harmless_classes() -> AbstractContextManager[None]:
    """DINO and MAE keep their parsed options in every checkpoint: a bag of attributes, nothing that runs."""
    allow = getattr(torch.serialization, "safe_globals", None)  # not in torch < 2.5
    return allow([Namespace]) if allow is not None else nullcontext()


def _tensors_of(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return _tensors_of(inner) or tensors  # beside a network there may be loose tensors: a temperature, random states


def network_with_weights(architecture: str, model_args: Mapping[str, Any], state: Mapping[str, Tensor], *, where: str) -> nn.Module:
    """The network with these weights in float32; `where` says in errors what the weights are.

    Raises:
        EncoderWeightsError: the weights do not fill the network exactly.
    """
    network = skeleton(architecture, model_args)
    fitted = _fit(state, network, where)
    network.load_state_dict(fitted, strict=True, assign=True)
    if any(tensor.is_meta for tensor in chain(network.parameters(), network.buffers())):
        network = build_network(architecture, model_args)  # tables that no checkpoint holds are computed on building
        network.load_state_dict(fitted, strict=True)
    return network


def skeleton(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The network without storage for its weights where that can be done: the random start of a billion of them takes long."""
    try:
        with torch.device("meta"):
            return build_network(architecture, model_args)
    except EncoderError:  # some networks compute with real numbers while they are built
        return build_network(architecture, model_args)


def _fit(state: Mapping[str, Tensor], network: nn.Module, where: str) -> dict[str, Tensor]:
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if not any(_CHUNK.search(key) for key in expected):  # in others blocks.<stage>.<block> are names of their own
        state = {_CHUNK.sub(r"\1", key): value for key, value in state.items()}
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or "head"
    classifiers = {name.split(".")[0] for name in ([named] if isinstance(named, str) else named)}
    attempts = []
    for prefix in _prefixes(state, expected):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        beside = _beside(part, classifiers)
        part = {key: value for key, value in part.items() if key in expected or key.split(".")[0] not in beside}
        try:
            part = _renamed(part, network, expected)
        except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
            raise EncoderWeightsError(f"{where}: weights of another kind of network ({error})") from error
        counters = [key for key in expected.keys() - part.keys() if key.endswith(".num_batches_tracked")]
        part |= dict.fromkeys(counters, torch.zeros((), dtype=torch.long))  # files of old did not count, and nothing depends on it
        attempts.append((len(expected.keys() ^ part.keys()), prefix, part))
    if not attempts:
        raise EncoderWeightsError(f"{where}: holds other weights than {_some(expected)}; it begins with {_some(state)}")
    # of equally good ones the teacher's: it is what its authors evaluate
    wrong, prefix, best = min(
        attempts, key=lambda attempt: (attempt[0], "teacher" not in attempt[1], "ema" not in attempt[1], attempt[1])
    )
    if wrong:
        missing, unexpected = expected.keys() - best.keys(), best.keys() - expected.keys()
        said = [f"{word} {_some(sorted(keys))}" for word, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise EncoderWeightsError(
            f"{where}: does not fit {type(network).__name__}: {'; '.join(said)}; are architecture and model_args right?"
        )
    shapes = [
        f"{key} {tuple(value.shape)}, expected {expected[key]}"
        for key, value in best.items()
        if tuple(value.shape) != expected[key]
    ]
    if shapes:
        raise EncoderWeightsError(f"{where}: {_some(shapes)}; are architecture and model_args right?")
    return {key: value.float() if value.is_floating_point() else value for key, value in best.items()}


def _beside(state: Mapping[str, Tensor], classifiers: set[str]) -> set[str]:
    """First parts of the names of what is no part of an encoder: classifiers, the decoder of a masked autoencoder."""
    decoder = {first for key in state if (first := key.split(".")[0]).startswith("decoder_")}
    return classifiers | decoder | ({"mask_token"} if decoder else set())


def _prefixes(state: Mapping[str, Tensor], expected: Mapping[str, Any]) -> list[str]:
    """What may stand before the names: everything that precedes a name found in the network or in transformers' layout."""
    anchors = [_HF_ANCHOR] if any(key.endswith(_HF_ANCHOR) for key in state) else list(expected)
    found: dict[str, None] = {}
    for anchor in anchors:
        for key in state:
            if key == anchor or key.endswith(f".{anchor}"):
                found[key[: len(key) - len(anchor)]] = None
        if found:  # the first name that is there at all decides; a missing first name must not hide the rest
            break
    return list(found)


def _renamed(state: dict[str, Tensor], network: nn.Module, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if _HF_ANCHOR in state:
        state = _from_transformers(state)
    patch = state.get(_PATCH)
    if patch is not None and tuple(patch.shape) != expected.get(_PATCH, tuple(patch.shape)):
        return state  # timm would resample the patches in silence; the shapes are compared later and say it
    own = getattr(network, "fit_weights", None)
    if own is not None:
        return own(state)
    timms = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return timms(dict(state), network) if timms is not None else state


_TRANSFORMERS = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' Dinov2Model (with or without registers) → the names of the original DINOv2, which timm converts."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _TRANSFORMERS:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attention.attention.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        renamed[key.replace(".attention.attention.query.", ".attn.qkv.")] = torch.cat([renamed.pop(name) for name in names])
    renamed.setdefault("mask_token", torch.zeros(1))  # by which timm knows the family; not loaded
    return renamed


def _some(names: Any, most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Identity of weights that came without a file of their own: names, shapes, types and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
