"""bag → logits, attention, contributions: one file per method, one line in the table below.

To add an aggregator: write its file, add its line to `AGGREGATORS`; the tests enrol it by themselves.
The annotations of its arguments say what its options may be: whole numbers at least 1, others as their `Range` says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from wsimil.aggregators.abmil import ABMIL
from wsimil.aggregators.abmilx import ABMILX
from wsimil.aggregators.acmil import ACMIL
from wsimil.aggregators.additive import Additive
from wsimil.aggregators.clam import CLAM
from wsimil.aggregators.dsmil import DSMIL
from wsimil.aggregators.dtfd import DTFD
from wsimil.aggregators.ilra import ILRA
from wsimil.aggregators.mean_pool import MeanPool
from wsimil.aggregators.pooling import Pool
from wsimil.aggregators.query_decoder import QueryDecoder
from wsimil.aggregators.r2t import R2T
from wsimil.aggregators.simple_mil import SimpleMIL
from wsimil.aggregators.sm_abmil import SmABMIL
from wsimil.aggregators.standardized import Standardized
from wsimil.aggregators.transformer import TransformerMIL
from wsimil.aggregators.transmil import TransMIL
from wsimil.aggregators.wikg import WiKG
from wsimil.batch import Aggregator
from wsimil.errors import ConfigError
from wsimil.settings import checked_options, nearest

__all__ = ["AGGREGATORS", "AggregatorEntry", "Standardized", "check_aggregator", "make_aggregator"]


@dataclass(frozen=True)
class AggregatorEntry:
    """How an aggregator is made: make(dim, n_outputs, hidden=…, dropout=…)."""

    make: Callable[..., Aggregator]
    summary: str
    paper: str
    parity: str = "untested"  # against the authors' code on the same weights: verified | approximate, why | untested | own


AGGREGATORS: dict[str, AggregatorEntry] = {
    "mean_pool": AggregatorEntry(MeanPool, "average of the tiles, linear classifier", "baseline", "own"),
    "max_pool": AggregatorEntry(partial(Pool, level="embedding", pool="max"), "largest value of every feature", "baseline", "own"),
    "topk_pool": AggregatorEntry(
        partial(Pool, level="embedding", pool="topk"), "mean of every feature's top hundredth", "baseline", "own"
    ),
    "lse_pool": AggregatorEntry(partial(Pool, level="embedding", pool="lse"), "log-mean-exp of every feature", "baseline", "own"),
    "instance_mean": AggregatorEntry(partial(Pool, level="instance", pool="mean"), "mean of the tiles' scores", "baseline", "own"),
    "instance_max": AggregatorEntry(partial(Pool, level="instance", pool="max"), "largest score of a tile", "baseline", "verified"),
    "instance_topk": AggregatorEntry(
        partial(Pool, level="instance", pool="topk"), "mean of the top hundredth of scores", "baseline", "own"
    ),
    "instance_lse": AggregatorEntry(
        partial(Pool, level="instance", pool="lse"), "log-mean-exp of the tiles' scores", "baseline", "own"
    ),
    "noisy_or": AggregatorEntry(
        partial(Pool, level="instance", pool="noisy_or"), "positive if any tile is", "Maron and Lozano-Pérez 1997; baseline", "own"
    ),
    "abmil": AggregatorEntry(partial(ABMIL, gated=False), "attention-weighted mean", "Ilse 2018, arXiv 1802.04712", "verified"),
    "gated_abmil": AggregatorEntry(ABMIL, "attention-weighted mean, gated", "Ilse 2018, arXiv 1802.04712", "verified"),
    "additive": AggregatorEntry(
        Additive, "sum of tile classifiers, attended: exact map", "Javed 2022, arXiv 2206.01794", "verified, with bias=true"
    ),
    "clam_sb": AggregatorEntry(partial(CLAM, branches="single"), "CLAM: gated attention", "Lu 2021, arXiv 2004.09666", "verified"),
    "clam_mb": AggregatorEntry(
        partial(CLAM, branches="multiple"), "CLAM: gated attention for each class", "Lu 2021, arXiv 2004.09666", "verified"
    ),
    "dsmil": AggregatorEntry(DSMIL, "tiles weighed by likeness to each class's top tile", "Li 2021, arXiv 2011.08939", "verified"),
    "dsmil_linear": AggregatorEntry(
        partial(DSMIL, nonlinear_query=False, value_projection=True),
        "DSMIL with a linear query and learned values, as in Self-ViT-MIL",
        "Gul 2022, arXiv 2210.09021",
        "verified",
    ),
    "sm_abmil": AggregatorEntry(
        SmABMIL, "attention smoothed over neighbouring tiles", "Castro-Macías 2024, arXiv 2410.03276", "verified"
    ),
    "transmil": AggregatorEntry(
        TransMIL, "Nyström attention and convolutions, tiles in file order", "Shao 2021, arXiv 2106.00908", "verified"
    ),
    "transmil_grid": AggregatorEntry(
        partial(TransMIL, tile_order="coords"),
        "TransMIL with tiles where they lie on the slide",
        "Shao 2021, arXiv 2106.00908",
        "own",
    ),
    "ilra": AggregatorEntry(ILRA, "tiles exchange through 64 latent vectors", "Xiang 2023, ICLR", "verified"),
    "abmilx": AggregatorEntry(ABMILX, "attention refined between tiles that look alike", "Tang 2025, arXiv 2506.02408", "verified"),
    "dtfd": AggregatorEntry(
        DTFD, "attention over pseudo-bags, then over what they distil to", "Zhang 2022, arXiv 2203.12081", "verified"
    ),
    "acmil": AggregatorEntry(
        ACMIL, "five attention branches, strong tiles hidden at random", "Zhang 2024, arXiv 2311.07125", "verified"
    ),
    "r2t": AggregatorEntry(
        R2T,
        "tiles re-embedded within and between regions, in file order",
        "Tang 2024, arXiv 2402.17228",
        "verified, with compat=true and regions=8",
    ),
    "transformer": AggregatorEntry(
        TransformerMIL,
        "class token and softmax attention among all tiles",
        "Wagner 2023, arXiv 2301.09617",
        "verified, against torch.nn.TransformerEncoder",
    ),
    "transformer_alibi": AggregatorEntry(
        partial(TransformerMIL, alibi_um=256.0),
        "transformer whose attention falls with distance on the slide",
        "after Press 2022, arXiv 2108.12409",
        "own",
    ),
    "wikg": AggregatorEntry(
        WiKG,
        "a graph of the tiles that each tile likes best",
        "Li 2024, arXiv 2403.07719",
        "verified, with gate=authors and gate=mil-lab",
    ),
    "query_decoder": AggregatorEntry(
        QueryDecoder,
        "one query per output reads the tiles; for several labels at once",
        "after Query2Label, Liu 2021, arXiv 2107.10834",
        "own",
    ),
    "simple_mil": AggregatorEntry(
        SimpleMIL, "gated attention that sees half of the features at a time", "Luo 2025, arXiv 2511.14907", "verified"
    ),
}


def check_aggregator(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, held against kinds and ranges.

    Raises:
        ConfigError: the name is not in `AGGREGATORS`, or an option is unknown, of the wrong kind or out of range.
    """
    if name not in AGGREGATORS:
        raise ConfigError(f"aggregator {name!r} is unknown{nearest(name, AGGREGATORS)} (known: {', '.join(AGGREGATORS)})")
    make = AGGREGATORS[name].make
    known = [one for one in inspect.signature(make).parameters if one not in ("dim", "n_outputs", "hidden", "dropout")]
    if unknown := [option for option in options if option not in known]:
        listed = f" (options: {', '.join(known)})" if known else " (it has none)"
        raise ConfigError(f"aggregator {name}: no option {unknown[0]}{nearest(unknown[0], known)}{listed}")
    try:
        inspect.signature(make).bind(1, 1, hidden=1, dropout=0.0, **options)
    except TypeError as error:
        raise ConfigError(f"aggregator {name} with {dict(options)}: {error}") from error
    return checked_options(make, options, f"aggregator {name}")


def make_aggregator(
    name: str, dim: int, n_outputs: int, *, hidden: int = 256, dropout: float = 0.25, check: bool = True, **options: Any
) -> Aggregator:
    """A freshly initialised aggregator by its registry name.

    Args:
        check: whether options that are not of their kind or range are refused; not those of a model that is there already.
        options: further arguments of the aggregator's own.

    Raises:
        ConfigError: the name is not in `AGGREGATORS`, or an option is of the wrong kind or out of range.
    """
    try:
        options = check_aggregator(name, options)
    except ConfigError:
        if check or name not in AGGREGATORS:
            raise
    return AGGREGATORS[name].make(dim, n_outputs, hidden=hidden, dropout=dropout, **options)
