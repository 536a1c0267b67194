"""Encoders made ready to run, described, and saved.

- Weights that cannot be had, or do not fit, are an error; random ones only where `random:` asks for them.
- `sha256` is that of the file for local weights, so `sha256sum` checks it; else of all tensors.
- What a name can be is said in `resolve.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import nn

from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.encoder import Encoder
from wsimil.encoders.hub import cached_file, commit_of, fetch, ways_out
from wsimil.encoders.networks import build_network
from wsimil.encoders.registry import TEXTURE, EncoderEntry
from wsimil.encoders.resolve import DESCRIPTION_FILES, FOLDER_WEIGHTS, FORMAT, FORMAT_VERSION, Request, resolve
from wsimil.encoders.texture import TextureEncoder
from wsimil.encoders.vit import NetworkEncoder, embedding_dim
from wsimil.encoders.weights import network_with_weights, read_weights, skeleton, state_sha256
from wsimil.errors import EncoderError, EncoderWeightsError
from wsimil.files import atomic_path, file_sha256, write_json

__all__ = [
    "Embedding",
    "describe_encoder",
    "encoder_contract",
    "load_encoder",
    "load_random_twin",
    "save_encoder",
    "save_random_twin",
]

Embedding = Literal["default", "self-vit-mil"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_encoder(
    name: str, *, device: str = "cpu", dtype: Literal["fp32", "bf16", "fp16"] = "fp32", embedding: Embedding = "default"
) -> Encoder:
    """The encoder of that name (see `resolve.py`), in eval mode, its parameters frozen.

    Args:
        device: as torch writes it: cpu, cuda, cuda:1, mps.
        dtype: precision of the arithmetic; vectors are float32 always.
        embedding: `self-vit-mil` pools a ViT as that paper does (5 × its width) instead of by its own rule.

    Raises:
        EncoderError: the name, its description or the options cannot be understood.
        EncoderWeightsError: its weights cannot be had or do not fit.
    """
    if dtype not in _DTYPES:
        raise EncoderError(f"dtype is {dtype!r}; expected {', '.join(_DTYPES)}")
    if embedding not in get_args(Embedding):
        raise EncoderError(f"embedding is {embedding!r}; expected {' or '.join(get_args(Embedding))}")
    if name == TEXTURE.name:
        if embedding != "default":
            raise EncoderError(f"encoder texture has no tokens for embedding {embedding!r}")
        return TextureEncoder().to(device).eval()
    request = resolve(name)
    sha256 = _file_sha256(request)
    file = _weights_file(request)
    network = _network(request, file)
    contract = replace(_completed(request, network, embedding), revision=commit_of(file) if file else "")
    sha256 = sha256 or state_sha256(network.state_dict())
    encoder = NetworkEncoder(replace(contract, sha256=sha256), network, dtype=_DTYPES[dtype])
    return encoder.requires_grad_(False).to(device).eval()


def load_random_twin(
    name: str,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    embedding: Embedding = "default",
) -> Encoder | None:
    """The network of that encoder with random weights: the same architecture, input and pooling, and nothing learned.

    None where there is no such thing: `texture` has no weights, and a `random:` encoder is one itself. Raises as `load_encoder`.
    """
    request = None if name == TEXTURE.name else resolve(name)
    if request is None or request.seed is not None:
        return None
    contract = replace(request.entry.contract, name=f"random:{request.entry.contract.architecture}:{seed}", sha256="")
    twin = Request(replace(request.entry, contract=contract), seed=seed)
    network = _network(twin, None)
    contract = replace(_completed(twin, network, embedding), sha256=state_sha256(network.state_dict()))
    return NetworkEncoder(contract, network, dtype=_DTYPES[dtype]).requires_grad_(False).to(device).eval()


def save_random_twin(name: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Write the random twin of an encoder as an encoder folder, for `extract --encoder`: what does its training add?

    Raises:
        EncoderError: there is no such thing, or the encoder cannot be had.
    """
    twin = load_random_twin(name, seed=seed)
    if not isinstance(twin, NetworkEncoder):
        raise EncoderError(f"encoder {name} has no weights to randomise")
    contract = replace(twin.contract, name="random-twin", local=False, sha256="")
    return save_encoder(folder, twin.network, contract, model_args=resolve(name).entry.model_args)


def encoder_contract(name: str, *, embedding: Embedding = "default") -> EncoderContract:
    """The facts of an encoder without its weights (`sha256` stays empty unless they lie in a local file).

    A description that is only on the hub is fetched; weights never are.

    Raises:
        EncoderError: the name or its description cannot be understood.
    """
    return TEXTURE if name == TEXTURE.name else _contract_of(resolve(name), embedding)


def _contract_of(request: Request, embedding: Embedding) -> EncoderContract:
    network = skeleton(request.entry.contract.architecture, request.entry.model_args)
    return replace(_completed(request, network, embedding), sha256=_file_sha256(request))


def describe_encoder(name: str) -> str:
    """Lines about one encoder: what it expects, whether its weights are here, and how to get them if not."""
    request = None if name == TEXTURE.name else resolve(name)
    contract = TEXTURE if request is None else _contract_of(request, "default")
    scales = contract.trained_mpps or ((contract.mpp,) if contract.mpp else ())
    scale = f"{'/'.join(f'{mpp:g}' for mpp in scales)} µm/px" if scales else "scale not stated"
    size = f"{contract.tile_px} px" if contract.tile_px else "any tile size"
    lines = [
        f"encoder {name}: {contract.architecture}, {contract.dim} numbers per tile, pooling {contract.pooling}",
        f"input: {size}, {scale}, mean {contract.mean}, std {contract.std}",
        f"licence: {contract.licence or 'not stated'}{', gated' if contract.gated else ''}",
    ]
    lines += [f"note: {contract.note}"] if contract.note else []
    return "\n".join([*lines, *_where_weights_are(request, contract)])


def _where_weights_are(request: Request | None, contract: EncoderContract) -> list[str]:
    if request is None:
        return ["weights: none needed"]
    if request.file:
        return [f"weights: {request.file} (sha256 {contract.sha256})"]
    if request.seed is not None:
        return [f"weights: random, seed {request.seed}"]
    entry = request.entry
    pinned = f"pinned to commit {entry.revision}" if entry.revision else "main branch (not pinned)"
    source = f"source: https://huggingface.co/{entry.hub_id}, {pinned}"
    here = cached_file(entry.hub_id, entry.weight_files, entry.revision, exact=entry.exact_revision)
    if here is not None:
        commit = commit_of(here)
        other = f", commit {commit}" if commit and commit != entry.revision else ""
        return [source, f"weights: here{other}: {here}"]
    size = f" (about {entry.params_m * 4 / 1000:.1f} GB)" if entry.params_m else ""
    return [
        source,
        f"weights: not on this machine{size}",
        *ways_out(contract.name, entry.hub_id, entry.weight_files, revision=entry.revision, gated=contract.gated),
    ]


def save_encoder(
    folder: str | Path,
    network: nn.Module,
    contract: EncoderContract,
    *,
    model_args: Mapping[str, Any] | None = None,
    how_trained: Mapping[str, Any] | None = None,
) -> Path:
    """Write `backbone.safetensors` and `encoder.json` into `folder`, each whole or not at all; `load_encoder(folder)` reads them.

    `contract.architecture` and `model_args` (JSON-like) must build the network; that is checked before anything is written.

    Raises:
        EncoderError, EncoderWeightsError: they do not.
    """
    folder, model_args = Path(folder), dict(model_args or {})
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    where = f"encoder {contract.name}, to be saved in {folder}"
    rebuilt = network_with_weights(contract.architecture, model_args, state, where=where)
    _completed(Request(EncoderEntry(contract, model_args)), rebuilt, "default")
    for key, value in rebuilt.state_dict().items():
        if value.shape != state[key].shape:  # reading adapts position embeddings; what is saved needs no adapting
            raise EncoderError(
                f"{where}: {key} is {tuple(state[key].shape)}, {contract.architecture} with {model_args} has {tuple(value.shape)}; "
                "give the model_args that built the network, for example img_size"
            )
    with atomic_path(folder / FOLDER_WEIGHTS[0]) as temporary:
        # tied or shared memory is saved once per name: the file has no references
        save_file({key: value.clone() for key, value in state.items()}, temporary)
        sha256 = file_sha256(temporary)
    write_json(
        folder / DESCRIPTION_FILES[0],
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": contract.name,
            "architecture": contract.architecture,
            "model_args": model_args,
            "sha256": sha256,
            "dim": contract.dim,
            "tile_px": contract.tile_px,
            "mpp": contract.mpp,
            "trained_mpps": list(contract.trained_mpps),
            "mean": list(contract.mean),
            "std": list(contract.std),
            "interpolation": contract.interpolation,
            "pooling": contract.pooling,
            "licence": contract.licence,
            "how_trained": dict(how_trained or {}),
        },
    )
    return folder


def _file_sha256(request: Request) -> str:
    """SHA-256 of a local weights file; empty for other weights."""
    if request.file is None:
        return ""
    sha256, promised = file_sha256(request.file), request.entry.contract.sha256
    if promised not in ("", sha256):
        raise EncoderWeightsError(
            f"encoder {request.entry.contract.name}: {request.file} has SHA-256 {sha256[:12]}…, its description says "
            f"{promised[:12]}…; the file is damaged or not the one described"
        )
    return sha256


def _weights_file(request: Request) -> Path | None:
    """The local file, or that of the hub, which is fetched if it is not here; None for random weights."""
    entry = request.entry
    if request.file is not None or request.seed is not None:
        return request.file
    return fetch(
        entry.contract.name,
        entry.hub_id,
        entry.weight_files,
        revision=entry.revision,
        exact=entry.exact_revision,
        gated=entry.contract.gated,
    )


def _network(request: Request, file: Path | None) -> nn.Module:
    entry = request.entry
    contract = entry.contract
    if file is None:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as if nothing had happened
            torch.manual_seed(request.seed or 0)
            return build_network(contract.architecture, entry.model_args)
    return network_with_weights(
        contract.architecture, entry.model_args, read_weights(file), where=f"encoder {contract.name}: {file}"
    )


def _completed(request: Request, network: nn.Module, embedding: Embedding) -> EncoderContract:
    """The contract with what only the network can say, after comparing the two."""
    contract = replace(request.entry.contract, local=request.file is not None)
    if embedding != "default":
        contract = replace(contract, pooling=embedding)
    dim = embedding_dim(contract.name, network, contract.pooling)
    if embedding == "default" and contract.dim not in (dim, 0):
        raise EncoderError(
            f"encoder {contract.name}: its description says {contract.dim} numbers per tile, the network gives {dim}"
        )
    patches = getattr(network, "patch_embed", None)
    fixed_px = (getattr(patches, "img_size", None) or (None,))[0] if getattr(patches, "strict_img_size", False) else None
    if fixed_px not in (None, contract.tile_px):
        raise EncoderError(
            f"encoder {contract.name}: its description says {contract.tile_px} px, the network takes {fixed_px} px only; "
            'put "img_size" in model_args'
        )
    _check_patches(contract, patches)
    return replace(contract, dim=dim)


def _check_patches(contract: EncoderContract, patches: Any) -> None:
    """Raises EncoderError where a network that takes several sizes takes no input of `tile_px`."""
    side = (getattr(patches, "patch_size", None) or (None,))[0]
    loose = not getattr(patches, "strict_img_size", True) and not getattr(patches, "dynamic_img_pad", True)
    if loose and side and contract.tile_px is not None and contract.tile_px % side:
        raise EncoderError(
            f"encoder {contract.name}: its description says {contract.tile_px} px, which is no whole number of the network's "
            f"patches, {side} px each; a tile_px of {max(1, round(contract.tile_px / side)) * side} would be"
        )
