"""Mean pooling: the slide is the average of its tiles.

The baseline that every attention model has to beat; see Mammadov et al. 2025 (arXiv 2505.01109) on how often it does not.
"""

from __future__ import annotations

from torch import nn

from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import in_pieces, segment_mean
from wsimil.batch import Aggregator, BagBatch, BagOutput

__all__ = ["MeanPool"]


class MeanPool(Aggregator):
    """logits = W mean_i φ(h_i) + b, φ = Linear, ReLU, Dropout.

    The classifier is linear, so tile i contributes exactly (W φ(h_i) + b) / N to the bag's logits.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        dropout: on φ's output.
    """

    contribution_kind = "exact"
    first_layer = "project.0"

    def __init__(self, dim: int, n_outputs: int, *, hidden: int = 256, dropout: float = 0.25) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.project = nn.Sequential(FirstLayer(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.classify = nn.Linear(hidden, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        (tiles,) = in_pieces(lambda piece: (self.project(piece),), bags.features)  # (ΣN, H)
        bag = segment_mean(tiles, bags)  # (B, H)
        contributions = None
        if explain:
            contributions = self.classify(tiles) / bags.sizes[bags.bag_index].unsqueeze(1)  # (ΣN, C)
        return BagOutput(self.classify(bag), bag_embedding=bag, tile_embedding=tiles, contributions=contributions)
