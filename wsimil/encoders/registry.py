"""The encoders of the field by name: where their weights are, how their network is built, what it expects.

- A plain dict. To add an encoder: one entry; if timm cannot build it, a network in `networks.py`.
- Facts are from model cards, the authors' code and published tables. `params_m` is the published size (None: not found), which a
  test compares with the network that `architecture` and `model_args` build.
- `tested=False` says that the real weights were never run through this code: most are gated or large. Loading is strict, so weights
  that do not fit end in an error, not in other vectors.
- `mpp` None: no pathology, or a scale that was not found stated.
- No torch here. `model_args` are JSON-like; layer names are turned into layers by `networks.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wsimil.encoders.contract import IMAGENET_MEAN, IMAGENET_STD, EncoderContract, Interpolation, Pooling

__all__ = ["ENCODERS", "TEXTURE", "EncoderEntry", "find_encoder"]

_SAFE_FIRST = ("model.safetensors", "pytorch_model.bin")
_MIXED_MPPS = (0.25, 0.5, 1.0, 2.0)

_SWIGLU = {"mlp_layer": "swiglu", "act_layer": "silu"}
_VIT_L16 = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True}

TEXTURE = EncoderContract(
    name="texture",
    architecture="texture",
    dim=136,
    sha256=hashlib.sha256(b"texture 1").hexdigest(),  # count up with any change of a number in texture.py
    licence="Apache-2.0",
    note="built in, no download: colour and gradient statistics",
)

_CC_NC_ND = "CC-BY-NC-ND-4.0"


@dataclass(frozen=True)
class EncoderEntry:
    """What it takes to build an encoder and to find its weights."""

    contract: EncoderContract
    model_args: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str = ""
    weight_files: tuple[str, ...] = _SAFE_FIRST  # in the order they are looked for
    revision: str | None = None  # None: the hub's main branch
    params_m: float | None = None
    aliases: tuple[str, ...] = ()  # TRIDENT's names, mostly
    tested: bool = False


def _entry(
    name: str,
    architecture: str,
    hub_id: str,
    *,
    dim: int,
    licence: str,
    params_m: float | None,
    gated: bool = False,
    model_args: Mapping[str, Any] | None = None,
    tile_px: int = 224,
    mpp: float | None = 0.5,
    trained_mpps: tuple[float, ...] = (),
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    interpolation: Interpolation = "bilinear",
    pooling: Pooling = "cls",
    weight_files: tuple[str, ...] = _SAFE_FIRST,
    aliases: tuple[str, ...] = (),
    note: str = "",
) -> EncoderEntry:
    contract = EncoderContract(
        name=name,
        architecture=architecture,
        dim=dim,
        tile_px=tile_px,
        mpp=mpp,
        trained_mpps=trained_mpps,
        mean=mean,
        std=std,
        interpolation=interpolation,
        pooling=pooling,
        licence=licence,
        gated=gated,
        source=f"https://huggingface.co/{hub_id}",
        note=note,
    )
    return EncoderEntry(contract, model_args or {}, hub_id, weight_files, params_m=params_m, aliases=aliases)


_KAIKO_HUB = "1aurent/{}.kaiko_ai_towards_large_pathology_fms"
_HALF = (0.5, 0.5, 0.5)


def _kaiko(name: str, architecture: str, hub_model: str, dim: int, params_m: float, *, registers: bool = False) -> EncoderEntry:
    return _entry(
        name,
        architecture,
        _KAIKO_HUB.format(hub_model),
        dim=dim,
        licence="kaiko non-commercial",
        params_m=params_m,
        # made for 518 px, used at 224: the position embedding is resampled when the weights are read
        model_args={"img_size": 224} if registers else {"dynamic_img_size": True},
        trained_mpps=_MIXED_MPPS,
        mean=_HALF,
        std=_HALF,
    )


def _lunit(name: str, architecture: str) -> EncoderEntry:
    return _entry(
        name,
        architecture,
        f"1aurent/{architecture}.lunit_dino",
        dim=384,
        licence="Lunit non-commercial",
        params_m=21.7,
        trained_mpps=(0.25, 0.5),
        mean=(0.70322989, 0.53606487, 0.66096631),
        std=(0.21716536, 0.26081574, 0.20723464),
        interpolation="bicubic",
        note="DINO, Kang 2023 (arXiv 2212.04690)",
    )


def _hibou(name: str, architecture: str, hub_id: str, dim: int, params_m: float, mlp_ratio: float, alias: str) -> EncoderEntry:
    return _entry(
        name,
        architecture,
        hub_id,
        dim=dim,
        licence="Apache-2.0",
        gated=True,
        params_m=params_m,
        model_args={"img_size": 224, "mlp_ratio": mlp_ratio, **_SWIGLU},
        mpp=None,
        mean=(0.7068, 0.5755, 0.722),
        std=(0.195, 0.2316, 0.1816),
        interpolation="bicubic",
        aliases=(alias,),
        note="DINOv2 with registers; weights are converted from the transformers layout",
    )


def _h_optimus(version: int, licence: str) -> EncoderEntry:
    return _entry(
        f"h-optimus-{version}",
        "vit_giant_patch14_reg4_dinov2",
        f"bioptimus/H-optimus-{version}",
        dim=1536,
        licence=licence,
        gated=True,
        params_m=1135,
        model_args={"img_size": 224, "init_values": 1e-5},
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        interpolation="bicubic",
        aliases=(f"hoptimus{version}",),
    )


def _virchow(
    name: str, hub_id: str, licence: str, model_args: Mapping[str, Any], trained_mpps: tuple[float, ...], note: str
) -> EncoderEntry:
    return _entry(
        name,
        "vit_huge_patch14_224",
        hub_id,
        dim=2560,
        licence=licence,
        gated=True,
        params_m=631.2,
        model_args={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "dynamic_img_size": True, **_SWIGLU, **model_args},
        trained_mpps=trained_mpps,
        interpolation="bicubic",
        pooling="cls+mean",
        note=note,
    )


ENCODERS: dict[str, EncoderEntry] = {
    entry.contract.name: entry
    for entry in (
        _entry(
            "uni",
            "vit_large_patch16_224",
            "MahmoodLab/UNI",
            dim=1024,
            licence=_CC_NC_ND,
            gated=True,
            params_m=303.4,
            model_args=_VIT_L16,
            aliases=("uni_v1",),
            note="cut at 256 px by its authors",
        ),
        _entry(
            "uni2-h",
            "vit_giant_patch14_224",
            "MahmoodLab/UNI2-h",
            dim=1536,
            licence=_CC_NC_ND,
            gated=True,
            params_m=681.4,
            model_args={
                "img_size": 224,
                "depth": 24,
                "num_heads": 24,
                "init_values": 1e-5,
                "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2,
                "no_embed_class": True,
                "reg_tokens": 8,
                "dynamic_img_size": True,
                **_SWIGLU,
            },
            aliases=("uni2", "uni_v2"),
            note="cut at 256 px by its authors",
        ),
        _entry(
            "conch-v1.5",
            "conch_v1_5",
            "MahmoodLab/conchv1_5",
            dim=768,
            licence=_CC_NC_ND,
            gated=True,
            params_m=None,
            tile_px=448,
            pooling="model",
            weight_files=("pytorch_model_vision.bin",),
            aliases=("conch_v15", "conchv1_5"),
            note="cut at 512 px by its authors: use --tile-px 512",
        ),
        _virchow("virchow", "paige-ai/Virchow", "Apache-2.0", {}, (), ""),
        _virchow("virchow2", "paige-ai/Virchow2", _CC_NC_ND, {"reg_tokens": 4}, _MIXED_MPPS, "class token and mean patch token"),
        _h_optimus(0, "Apache-2.0"),
        _h_optimus(1, _CC_NC_ND),
        _entry(
            "gigapath",
            "vit_giant_patch14_dinov2",
            "prov-gigapath/prov-gigapath",
            dim=1536,
            licence="Apache-2.0 with terms of use",
            gated=True,
            params_m=1135,
            model_args={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334},
            interpolation="bicubic",
            weight_files=("pytorch_model.bin",),
            aliases=("prov-gigapath",),
            note="tile encoder; its authors cut 256 px and crop the centre, here the whole tile is resized",
        ),
        _entry(
            "phikon",
            "vit_base_patch16_224",
            "1aurent/vit_base_patch16_224.owkin_pancancer",
            dim=768,
            licence="Owkin non-commercial",
            params_m=85.8,
        ),
        _entry(
            "phikon-v2",
            "vit_large_patch16_224",
            "owkin/phikon-v2",
            dim=1024,
            licence="Owkin non-commercial",
            params_m=303.4,
            model_args={"img_size": 224, "init_values": 1e-5},
            interpolation="bicubic",
            aliases=("phikon_v2",),
            note="weights are converted from the transformers layout",
        ),
        _hibou("hibou-b", "vit_base_patch14_reg4_dinov2", "histai/hibou-b", 768, 85.7, 5.33334, "hibou_b"),
        _hibou("hibou-l", "vit_large_patch14_reg4_dinov2", "histai/hibou-L", 1024, 303.7, 5.34375, "hibou_l"),
        _entry(
            "midnight-12k",
            "vit_giant_patch14_dinov2",
            "kaiko-ai/midnight",
            dim=3072,
            licence="MIT",
            params_m=1135,
            model_args={"img_size": 224},
            trained_mpps=_MIXED_MPPS,
            mean=_HALF,
            std=_HALF,
            pooling="cls+mean",
            aliases=("midnight", "midnight12k"),
            note="weights are converted from the transformers layout",
        ),
        _kaiko("kaiko-vits16", "vit_small_patch16_224", "vit_small_patch16_224", 384, 21.7),
        _kaiko("kaiko-vits8", "vit_small_patch8_224", "vit_small_patch8_224", 384, 21.7),
        _kaiko("kaiko-vitb16", "vit_base_patch16_224", "vit_base_patch16_224", 768, 85.8),
        _kaiko("kaiko-vitb8", "vit_base_patch8_224", "vit_base_patch8_224", 768, 85.8),
        _kaiko("kaiko-vitl14", "vit_large_patch14_reg4_dinov2", "vit_large_patch14_reg4_224", 1024, 303.2, registers=True),
        _lunit("lunit-vits16", "vit_small_patch16_224"),
        _lunit("lunit-vits8", "vit_small_patch8_224"),
        _entry(
            "ctranspath",
            "ctranspath",
            "1aurent/swin_tiny_patch4_window7_224.CTransPath",
            dim=768,
            licence="GPL-3.0, academic use",
            params_m=27.5,
            mpp=1.0,
            pooling="model",
        ),
        _entry(
            "resnet50",
            "resnet50",
            "timm/resnet50.tv_in1k",
            dim=1024,
            licence="BSD-3-Clause",
            params_m=23.5,
            mpp=None,
            pooling="layer3",
            note="ImageNet, cut after the third stage as CLAM does; resnet50.a1_in1k is timm's whole network",
        ),
    )
}


def find_encoder(name: str) -> EncoderEntry | None:
    """The entry of a registry name or alias, whatever its case, `_` or `-`; None if there is none."""
    return _BY_KEY.get(_key(name))


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


_BY_KEY = {_key(name): entry for entry in ENCODERS.values() for name in (entry.contract.name, *entry.aliases)}
