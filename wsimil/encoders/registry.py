"""The encoders of the field by name: where their weights are, how their network is built, what it expects.

- A plain dict. To add an encoder: one entry; if timm cannot build it, a network in `networks.py`.
- Facts are from model cards, the authors' code and published tables. `params_m` is the published size (None: not found), which a
  test compares with the network that `architecture` and `model_args` build.
- `tested=False` says that the real weights were never run through this code: most are gated or large. Loading is strict, so weights
  that do not fit end in an error, not in other vectors.
- `mpp` None: no pathology, or a scale that was not found stated by the authors.
- `_REVISIONS` pins what is downloaded. A commit is there only if a public page or log shows the weights in it; the others follow
  the hub's main branch, and say so. Which commit the weights at hand came from is recorded either way.
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

_REVISIONS = {
    # seen as a snapshot in other people's caches, with the weights file in it
    "MahmoodLab/UNI": "b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
    "MahmoodLab/UNI2-h": "d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
    "MahmoodLab/conchv1_5": "3e5766a5d1500d53c73c03005e24c30c1f27be13",
    "paige-ai/Virchow": "19eebc84ae33e79f1b2d866e6ff90ae50e522f9a",
    "paige-ai/Virchow2": "3158645804b69e3f3bc4439d4116edddf0840a72",
    "bioptimus/H-optimus-0": "7bb31657b49434acc78732d9e2f393b846619393",
    "prov-gigapath/prov-gigapath": "eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
    # the hub's own page of that commit lists the weights file, or its history shows it older than the commit
    "1aurent/vit_base_patch16_224.owkin_pancancer": "3fc9281f2bc722315154278e600a2dc437454c82",  # after "switch weights to teacher"
    "owkin/phikon-v2": "419e8285b80eac3b60beca0d9b91942d48ad7b8e",
    "histai/hibou-b": "7fdc8cce365ebfd9e7e60ee6ee9a8d4d59388f3c",
    "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms": "48560ea39969fe44b7b2ab057de01484243a7d43",
    "1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms": "003775444da0119f90ca63e2b86e454fd06ba797",
    "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms": "797c524a94c7fdae8ea33064d0ac6966ed8956bb",
    "1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms": "a4eb74de76274a5f3fe8260841a1b07a90930f43",
    "1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms": "d86df45eccdb957aa7869bab7d11f8e158dcbda2",
    "1aurent/vit_small_patch8_224.lunit_dino": "c23bc01cfbe022bc1f2a8a9306125a07818e4eb4",
    "1aurent/swin_tiny_patch4_window7_224.CTransPath": "59c740e4ed91dda4ebe094b64e4cd2e015c31810",
    "timm/resnet50.tv_in1k": "aa6c2d36d56bc0209040c02b5a7b7d7bf11d57b8",
}


@dataclass(frozen=True)
class EncoderEntry:
    """What it takes to build an encoder and to find its weights."""

    contract: EncoderContract
    model_args: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str = ""
    weight_files: tuple[str, ...] = _SAFE_FIRST  # in the order they are looked for
    revision: str | None = None  # commit, branch or tag on the hub; None: its main branch
    exact_revision: bool = False  # the user named it: weights of another one that lie here are not used instead
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
    revision = _REVISIONS.get(hub_id)
    return EncoderEntry(contract, model_args or {}, hub_id, weight_files, revision=revision, params_m=params_m, aliases=aliases)


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
        note="DINOv2 with registers; scale not stated by its authors (others use 0.5 µm/px)",
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
        _entry(
            "openmidnight",
            "vit_giant_patch14_reg4_dinov2",
            "SophontAI/OpenMidnight",
            dim=1536,
            licence="Apache-2.0",
            gated=True,
            params_m=1135,
            model_args={"img_size": 224, "init_values": 1e-5},
            mpp=None,
            weight_files=("teacher_checkpoint_load.pt",),
            note="open replication of Midnight, with registers; its scales were not found stated",
        ),
        _entry(
            "gpfm",
            "vit_large_patch14_dinov2",
            "majiabo/GPFM",
            dim=1024,
            licence="CC-BY-NC-4.0 or MIT: see its card",
            params_m=303.2,
            model_args={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
            interpolation="bicubic",
            weight_files=("GPFM.pth",),
            note="cut at 512 px at 0.25 µm/px by its authors, the field of 256 px at 0.5",
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
