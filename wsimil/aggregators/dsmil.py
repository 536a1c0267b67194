"""DSMIL: each class's top tile asks the others how much they are like it.

Li, Li, Eliceiri 2021 (arXiv 2011.08939). There are two of them: the authors' repository has a query of two layers and pools the
features as they are; Self-ViT-MIL (Gul 2022, arXiv 2210.09021) has a linear query and learned values.

- The top tile of each class is trained beside the slide: its score is an extra logit of the same weight, ½ and ½ in the paper up to
  the factor that both share.
- The slide's logits are the pooled ones alone, as in the authors' training; `tile_logits` has the others for who wants the mean.
- No projection comes first: features go in as they are, and D decides the size of the model.
- Dropout acts on learned values, as in both codes; where the features are pooled as they are nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wsimil.aggregators.packed import segment_argmax, segment_softmax, segment_weighted_sum
from wsimil.batch import Aggregator, BagBatch, BagOutput, ExtraLogits
from wsimil.errors import ConfigError

__all__ = ["DSMIL", "dsmil_from_reference"]


class DSMIL(Aggregator):
    """s_i = W h_i; m_c = argmax_i s_ic; a_ic = softmax_i(q_i·q_{m_c} / √Q); z_c = Σ_i a_ic v(h_i); logits = Σ_c W_c z_c + b.

    Every output reads the embeddings of all classes. The logits are linear in z, so tile i contributes exactly
    Σ_c a_ic (W_c v(h_i) + b/C) to them.

    Args:
        dim: width D of the features.
        n_outputs: C.
        hidden: width Q of the query.
        nonlinear_query: q = Linear, ReLU, Linear, Tanh; a Linear without.
        value_projection: v = Linear; the features themselves without.
        dropout: on the features that `value_projection` reads; without it there is none.
    """

    attends_per_output = True
    contribution_kind = "exact"

    def __init__(
        self,
        dim: int,
        n_outputs: int,
        *,
        hidden: int = 128,
        nonlinear_query: bool = True,
        value_projection: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.n_outputs = dim, n_outputs
        self.score = nn.Linear(dim, n_outputs)
        if nonlinear_query:
            self.query = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.Tanh())
        else:
            self.query = nn.Linear(dim, hidden)
        self.value = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, dim)) if value_projection else nn.Identity()
        self.classify = nn.Linear(n_outputs * dim, n_outputs)

    def forward(self, bags: BagBatch, *, explain: bool = False) -> BagOutput:
        bags = self.read(bags)
        with torch.autocast(bags.features.device.type, enabled=False):  # rounded to eight bits, many tiles would be the top one
            scores = self.score(bags.features.to(self.score.weight.dtype))  # (ΣN, C)
        top = segment_argmax(scores, bags)  # (B, C) rows
        query = self.query(bags.features)  # (ΣN, Q)
        asked = query[top] * query.shape[1] ** -0.5  # (B, C, Q)
        sizes = bags.lengths
        likeness = torch.cat([part @ one.T for part, one in zip(query.split(sizes), asked, strict=True)])  # (ΣN, C)
        attention = segment_softmax(likeness, bags)  # (ΣN, C)
        values = self.value(bags.features)  # (ΣN, D)
        embedding = segment_weighted_sum(attention, values, bags)  # (B, C, D)
        best = ExtraLogits("top_tile", scores.gather(0, top), torch.arange(len(bags), device=top.device))
        return BagOutput(
            self.classify(embedding.flatten(1)),  # (B, C)
            bag_embedding=embedding,
            attention_logits=likeness,
            tile_logits=scores,
            contributions=self._contributions(attention, values) if explain else None,
            extra_logits=(best,),
        )

    def _contributions(self, attention: Tensor, values: Tensor) -> Tensor:
        """(ΣN, C)."""
        per_class = values @ self.classify.weight.unflatten(1, (self.n_outputs, self.dim)).flatten(0, 1).T  # (ΣN, C · C)
        per_class = per_class.unflatten(1, (self.n_outputs, self.n_outputs))  # (ΣN, output, class)
        return (attention.unsqueeze(1) * per_class).sum(2) + attention.mean(1, keepdim=True) * self.classify.bias


def dsmil_from_reference(weights: Mapping[str, Tensor]) -> DSMIL:
    """A DSMIL with the weights of the authors' `MILNet`: what `torch.load(path, map_location="cpu", weights_only=True)`
    gives of their files.

    Names of an encoder inside it (`i_classifier.feature_extractor…`) are left out: bags hold what it computes.

    Raises:
        ConfigError: the weights are another model's.
    """
    weights = {name: values for name, values in weights.items() if not name.startswith("i_classifier.feature_extractor.")}
    scorer = "i_classifier.fc.0" if "i_classifier.fc.0.weight" in weights else "i_classifier.fc"
    nonlinear = "b_classifier.q.0.weight" in weights
    names = {scorer: "score", "b_classifier.fcc": "classify"}
    names |= {"b_classifier.q.0": "query.0", "b_classifier.q.2": "query.2"} if nonlinear else {"b_classifier.q": "query"}
    expected = {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in names.items() for part in ("weight", "bias")}
    if expected.keys() != weights.keys():
        differing = sorted(expected.keys() ^ weights.keys())
        raise ConfigError(f"these are not the weights of a DSMIL with identity values; they differ in {', '.join(differing[:4])}")
    state = {ours: weights[theirs] for theirs, ours in expected.items()}
    state["classify.weight"] = state["classify.weight"].flatten(1)  # a convolution as wide as the features, (C, C, D)
    n_outputs, dim = state["score.weight"].shape
    query = state["query.0.weight" if nonlinear else "query.weight"]
    model = DSMIL(dim, n_outputs, hidden=len(query), nonlinear_query=nonlinear)
    model.load_state_dict(state)
    return model
