"""The encoders as a table, without torch and without network."""

from __future__ import annotations

from typing import Any

from wsimil.encoders.contract import EncoderContract
from wsimil.encoders.hub import cached_file
from wsimil.encoders.registry import ENCODERS, TEXTURE

__all__ = ["describe_encoders", "encoder_rows"]

_COLUMNS = ("name", "dim", "px", "µm/px", "gated", "weights", "revision", "licence", "note")


def encoder_rows() -> list[dict[str, Any]]:
    """One row per built-in and registry encoder; `available` says that it works without network."""
    rows = [_row(TEXTURE) | {"revision": "", "available": True}]
    for entry in ENCODERS.values():
        available = cached_file(entry.hub_id, entry.weight_files, entry.revision) is not None
        rows.append(_row(entry.contract) | {"revision": entry.revision or "main", "available": available})
    return rows


def _row(contract: EncoderContract) -> dict[str, Any]:
    return {
        "name": contract.name,
        "dim": contract.dim,
        "px": contract.tile_px,
        "mpp": list(contract.trained_mpps or ((contract.mpp,) if contract.mpp else ())),
        "licence": contract.licence,
        "gated": contract.gated,
        "note": contract.note,
        "source": contract.source,
    }


def describe_encoders() -> str:
    """The table as text for a terminal, and how other encoders are named."""
    cells: list[tuple[str, ...]] = [_COLUMNS]
    for row in encoder_rows():
        scale = "/".join(f"{mpp:g}" for mpp in row["mpp"]) or "-"
        weights = "built in" if row["name"] == TEXTURE.name else "here" if row["available"] else "download"
        revision = "main (not pinned)" if row["revision"] == "main" else row["revision"][:10]
        gated = "gated" if row["gated"] else ""
        facts = (row["name"], str(row["dim"]), str(row["px"] or "any"), scale, gated, weights, revision)
        cells.append((*facts, row["licence"], row["note"]))
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(
        [
            *lines,
            "",
            "Also: any timm name, hf-hub:org/model, a local file or folder, NAME=FILE (one of these with your weights file),",
            "NAME@REVISION (a commit or tag of its hub repository), random:<timm name>[:seed].",
            "`wsimil doctor --encoder NAME` says what one needs and how to get it.",
        ]
    )
