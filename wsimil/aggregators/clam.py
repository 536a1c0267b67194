"""CLAM: gated attention, one for the slide (SB) or one for each class (MB).

Lu, Williamson, Chen et al. 2021 (arXiv 2004.09666). The paper's second half, clustering tiles by their attention, needs labels:
it is an objective, `wsimil.objectives.ClamInstances`.

- MB gives each output its own attention, embedding and weight vector: logit_c = w_c·z_c + b_c. A binary task has one output, and
  there SB and MB are the same model.
- Dropout acts on φ and inside both halves of the gate.
"""

from __future__ import annotations

from torch import nn

from wsimil.aggregators.abmil import AttentionScore, attended
from wsimil.aggregators.first_layer import FirstLayer
from wsimil.aggregators.packed import segment_softmax, segment_weighted_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput
from wsimil.errors import ConfigError

__all__ = ["CLAM"]


class CLAM(Aggregator):
    """z_k = Σ_i a_ik φ(h_i), a = softmax of the gated score, φ = Linear, ReLU, Dropout; a linear classifier reads z.

    The contribution of tile i to output c is exactly a_i (w_c·φ(h_i) + b_c), with the attention of c for several branches.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width H of φ.
        attention: width L of the attention network: 256 in the paper's small model, 384 in its big one.
        branches: "single" (SB) or "multiple" (MB): one attention for all outputs, or one for each.
        dropout: on φ's output and in the attention network.
    """

    contribution_kind = "exact"
    first_layer = "project.0"
    shares_rows = True

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 512,
        attention: int = 256,
        branches: str = "single",
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if branches not in ("single", "multiple"):
            raise ConfigError(f"branches is {branches!r}; expected single or multiple")
        self.dim, self.n_outputs = dim, n_outputs
        self.attends_per_output = branches == "multiple"
        self.project = nn.Sequential(FirstLayer(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = AttentionScore(hidden, attention, heads=n_outputs if self.attends_per_output else 1, dropout=dropout)
        self.classify = nn.Linear(hidden, n_outputs)  # with several branches row c reads z_c alone

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        self.check(bags)
        tiles, scores = attended(self.project, self.attend, bags.features)  # (ΣN, H), (ΣN, K)
        attention = segment_softmax(scores, bags)  # (ΣN, K)
        embedding = segment_weighted_sum(attention, tiles, bags)  # (B, K, H)
        if self.attends_per_output:
            logits = (embedding * self.classify.weight).sum(2) + self.classify.bias  # (B, C)
        else:
            embedding = embedding.squeeze(1)  # (B, H)
            logits = self.classify(embedding)
        return BagOutput(
            logits,
            bag_embedding=embedding,
            attention_logits=scores,
            tile_embedding=tiles,
            contributions=attention * self.classify(tiles) if explain else None,  # (ΣN, C)
        )
