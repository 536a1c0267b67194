"""From what the user wrote to what has to be built and where its weights are; nothing is loaded here.

    texture                           built in
    uni2-h[@revision]                 an entry of the registry, weights from the hub or its cache
    uni2-h=weights/uni2-h             the same with weights that lie here: a file, or a folder as downloaded from the hub
    vit_small_patch16_224.dino        timm's name; vit_small_patch16_224=checkpoint.pth is timm's architecture with your weights
    hf-hub:org/model[@revision]       a timm model on the hub
    folder/                           your own encoder: encoder.json (see `save_encoder`) or timm's config.json, and the weights
    weights.pth                       the same, described by weights.json, encoder.json or config.json beside it
    random:vit_tiny_patch16_224[:7]   untrained, by seed; nothing else is ever random

- A registry or timm name wins over a file of the same name in the working folder; write ./name for the file.
- A description is read strictly: an unknown key is an error with the nearest name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from wsimil.encoders.contract import EncoderContract, Interpolation, Pooling
from wsimil.encoders.hub import fetch
from wsimil.encoders.registry import ENCODERS, TEXTURE, EncoderEntry, find_encoder
from wsimil.encoders.weights import WEIGHT_SUFFIXES
from wsimil.errors import EncoderError, EncoderWeightsError
from wsimil.files import read_json
from wsimil.settings import nearest

__all__ = ["DESCRIPTION_FILES", "FOLDER_WEIGHTS", "FORMAT", "FORMAT_VERSION", "Request", "resolve"]

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_RANDOM_PREFIX = "random:"

DESCRIPTION_FILES = ("encoder.json", "config.json")
FOLDER_WEIGHTS = ("backbone.safetensors", "model.safetensors", "pytorch_model.bin")

FORMAT = "wsimil-encoder"
FORMAT_VERSION = 1
_OWN_KEYS = {
    "format", "format_version", "name", "architecture", "model_args", "sha256", "dim", "tile_px", "mpp", "trained_mpps",
    "mean", "std", "interpolation", "pooling", "licence", "how_trained",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a name stands for: `file` (local weights), `seed` (random weights) or neither (weights from the hub)."""

    entry: EncoderEntry
    file: Path | None = None
    seed: int | None = None


def resolve(name: str) -> Request:
    """What `name` stands for (see the top of this module); `texture` is not for this function.

    Raises:
        EncoderError: the name or its description cannot be understood; the nearest known name is said.
        EncoderWeightsError: it names a file that is not there, or a model without weights.
    """
    if name.startswith(_RANDOM_PREFIX):
        return _random(name)
    if name.startswith(_HUB_PREFIXES):
        return Request(_hub_entry(name))
    plain, _, revision = name.partition("@")
    entry = find_encoder(plain)
    if entry is not None:
        return Request(_at(entry, revision))
    architecture, equals, path = name.partition("=")
    if equals and not Path(name).exists():
        known = find_encoder(architecture) or (_timm_entry(architecture) if _timm_knows(architecture) else None)
        if known is not None:
            return Request(known, file=_local_file(Path(path).expanduser(), known.weight_files, name))
    if _timm_knows(plain):
        entry = _timm_entry(plain)
        if not entry.hub_id:
            raise EncoderWeightsError(
                f"encoder {plain}: timm has the architecture but no weights on the hub; pass {plain}=FILE with your own, "
                f"or random:{plain} for an untrained network"
            )
        return Request(_at(entry, revision))
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if path.suffix in WEIGHT_SUFFIXES or "/" in name or "\\" in name:
        raise EncoderWeightsError(f"encoder {name}: no such file or folder; a model on the hub is written hf-hub:org/model")
    known_names = [TEXTURE.name, *ENCODERS, *(alias for entry in ENCODERS.values() for alias in entry.aliases)]
    raise EncoderError(
        f"encoder {name!r} is unknown{nearest(plain, known_names) or nearest(plain, _timm_names())} "
        "(names: `wsimil encoders`; or a timm name, hf-hub:org/model, a local file or folder, random:<timm name>)"
    )


def _at(entry: EncoderEntry, revision: str) -> EncoderEntry:
    """The same encoder at a revision that the user named; it is part of the name then, and so of the folder's."""
    if not revision:
        return entry
    contract = replace(entry.contract, name=f"{entry.contract.name}@{revision}")
    return replace(entry, contract=contract, revision=revision, exact_revision=True)


def _random(name: str) -> Request:
    architecture, _, seed = name.removeprefix(_RANDOM_PREFIX).partition(":")
    if not _timm_knows(architecture):
        raise EncoderError(f"encoder {name}: {architecture!r} is not a timm model{nearest(architecture, _timm_names())}")
    if seed and not seed.isdigit():
        raise EncoderError(f"encoder {name}: the seed is {seed!r}; expected a whole number, as in random:{architecture}:0")
    entry = _timm_entry(architecture)
    return Request(replace(entry, contract=replace(entry.contract, name=name, licence="", source="random")), seed=int(seed or 0))


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _timm_knows(name: str) -> bool:
    import timm

    architecture, _, tag = name.partition(".")
    return timm.is_model(architecture) and (not tag or timm.models.is_model_pretrained(name))


def _timm_entry(name: str) -> EncoderEntry:
    import timm

    config = timm.models.get_pretrained_cfg(name)
    facts = config.to_dict() if config is not None else {}
    files = (facts["hf_hub_filename"],) if facts.get("hf_hub_filename") else ("model.safetensors", "pytorch_model.bin")
    return EncoderEntry(
        _timm_contract(name, name.partition(".")[0], facts), hub_id=facts.get("hf_hub_id") or "", weight_files=files
    )


def _timm_contract(name: str, architecture: str, facts: Mapping[str, Any]) -> EncoderContract:
    return EncoderContract(
        name=name,
        architecture=architecture,
        dim=0,
        tile_px=int((facts.get("input_size") or (3, 224, 224))[1]),
        mean=_three(facts, "mean", (0.5, 0.5, 0.5)),
        std=_three(facts, "std", (0.5, 0.5, 0.5)),
        interpolation="bilinear" if facts.get("interpolation") == "bilinear" else "bicubic",
        licence=str(facts.get("license") or ""),
        source=f"https://huggingface.co/{facts['hf_hub_id']}" if facts.get("hf_hub_id") else "",
    )


def _hub_entry(name: str) -> EncoderEntry:
    hub_id, _, revision = name.partition(":")[2].partition("@")
    for entry in ENCODERS.values():  # their own config.json does not say all that it takes to build them
        if entry.hub_id.lower() == hub_id.lower():
            return _at(entry, revision)
    if hub_id.count("/") != 1 or not all(hub_id.split("/")):
        raise EncoderError(f"encoder {name}: expected hf-hub:org/model or hf-hub:org/model@revision")
    config = fetch(name, hub_id, ("config.json",), revision=revision or None, exact=bool(revision))
    entry = _described(config, name, "")
    return replace(entry, hub_id=hub_id, revision=revision or None, exact_revision=bool(revision))


def _local(path: Path) -> Request:
    """A folder or a weights file with a description of the network."""
    if path.is_dir():
        beside = [path / file for file in DESCRIPTION_FILES]
    else:
        beside = [path.with_suffix(".json"), *(path.parent / file for file in DESCRIPTION_FILES)]
    description = next((file for file in beside if file.is_file()), None)
    if description is None:
        raise EncoderError(
            f"encoder {path}: nothing says what network these weights are for; expected "
            f"{' or '.join(file.name for file in beside)} beside them. For a known architecture write its name first: "
            f"uni2-h={path} or vit_small_patch16_224={path}"
        )
    folder = path if path.is_dir() else path.parent
    fallback = path.stem if description == beside[0] and not path.is_dir() else folder.resolve().name
    entry = _described(description, str(path), fallback)
    return Request(entry, file=_local_file(path, (), str(path)))


def _local_file(path: Path, preferred: tuple[str, ...], name: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise EncoderWeightsError(f"encoder {name}: there is no file or folder {path}")
    for file in (*preferred, *FOLDER_WEIGHTS):
        if (path / file).is_file():
            return path / file
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} weights files: {', '.join(file.name for file in files)}" if files else "no weights file"
    raise EncoderWeightsError(f"encoder {name}: {path} holds {found}; name the file itself")


def _described(description: Path, name: str, fallback_name: str) -> EncoderEntry:
    """The entry that an encoder.json (ours) or a config.json (timm's) writes down; an empty `fallback_name` stands for `name`."""
    try:
        facts = read_json(description)
    except (OSError, ValueError) as error:
        raise EncoderError(f"encoder {name}: {description} cannot be read as JSON ({error})") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("architecture"), str):
        kind = (
            "a transformers model; known ones are loaded by their name"
            if isinstance(facts, dict) and "model_type" in facts
            else "no encoder"
        )
        raise EncoderError(
            f'encoder {name}: {description} describes {kind} (it has no "architecture"); for example phikon-v2=FOLDER'
        )
    try:
        arguments = dict(facts.get("model_args") or {})
        if "pretrained_cfg" in facts or "input_size" in facts:  # timm's layout, new and old
            contract = _timm_contract(fallback_name or name, facts["architecture"], facts.get("pretrained_cfg", facts))
        else:
            contract = _own_contract(facts, fallback_name or name)
        return EncoderEntry(contract, arguments)
    except (TypeError, ValueError) as error:
        raise EncoderError(f"encoder {name}: {description}: {error}") from error


def _own_contract(facts: Mapping[str, Any], name: str) -> EncoderContract:
    for key in facts.keys() - _OWN_KEYS:
        raise ValueError(f"unknown key {key!r}{nearest(key, _OWN_KEYS)}")
    if facts.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ValueError(f"format {facts['format_version']} is newer than this wsimil, which reads {FORMAT_VERSION}")
    architecture = facts["architecture"]
    default = _timm_contract(name, architecture, {})
    if _timm_knows(architecture):
        default = _timm_entry(architecture).contract
    pooling, interpolation = facts.get("pooling", "model"), facts.get("interpolation", default.interpolation)
    for key, value, allowed in (("pooling", pooling, get_args(Pooling)), ("interpolation", interpolation, get_args(Interpolation))):
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}; expected {', '.join(allowed)}")
    return EncoderContract(
        name=str(facts.get("name") or name),
        architecture=architecture,
        dim=int(facts.get("dim", 0)),
        tile_px=int(facts.get("tile_px") or facts.get("model_args", {}).get("img_size") or default.tile_px or 224),
        mpp=None if facts.get("mpp") is None else float(facts["mpp"]),
        trained_mpps=tuple(float(mpp) for mpp in facts.get("trained_mpps", ())),
        mean=_three(facts, "mean", default.mean),
        std=_three(facts, "std", default.std),
        interpolation=interpolation,
        pooling=pooling,
        sha256=str(facts.get("sha256", "")),
        licence=str(facts.get("licence", "")),
        **_seen(facts.get("how_trained")),
    )


def _seen(how_trained: Any) -> dict[str, Any]:
    """What an encoder pretrained here says of its slides; nothing of others."""
    slides = how_trained.get("slides") if isinstance(how_trained, Mapping) else None
    if not isinstance(slides, Mapping):
        return {}
    seen = tuple((str(name).rpartition("/")[2], str(content or "")) for name, content in slides.items())
    return {"seen": seen, "transductive": bool(how_trained.get("transductive")), "stain": str(how_trained.get("stain") or "")}


def _three(facts: Mapping[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    values = tuple(float(value) for value in facts.get(key) or default)
    if len(values) != 3:
        raise ValueError(f"{key} has {len(values)} numbers; expected three, R G B, of pixels scaled to 0 to 1")
    return values[0], values[1], values[2]
