"""Signed contributions where the logits are no sum over tiles: leave-one-out, or gradient times input.

- Leave-one-out: logits minus the logits of the bag without the tile. Attention pooling has it in closed form, the model is not
  run N times. The only tile of a bag is owed all of the logits: without it there is no bag.
- Gradient × input: c_ic = Σ_h z_ih ∂logit_c/∂z_ih: exact where the logits are linear in the embedding z, a first-order account
  elsewhere. One forward and C backward passes.
- Both work for callers under `torch.inference_mode` or `no_grad`; the results carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from wsimil.aggregators.packed import segment_argmax, segment_softmax, segment_weighted_sum
from wsimil.batch import BagBatch

__all__ = ["gradient_contributions", "leave_one_out"]

CHUNK = 16_384
"""Rows for which embeddings without one tile are held at a time."""


@torch.no_grad()
def leave_one_out(scores: Tensor, tiles: Tensor, bags: BagBatch, head: nn.Module) -> Tensor:
    """(ΣN, C): what the logits lose without each tile, for z_k = Σ_i softmax(e_k)_i h_i and any head.

    - Without tile i, z loses a_i (h_i - z) / (1 - a_i). Where a_i is nearly 1 that divides by a difference of equals: for a tile
      with more than half of the attention, the mean over the others is computed by itself.
    - In a bag of 100,000 tiles both logits agree in all digits of float32: the head is evaluated in float64.

    Args:
        scores: (ΣN, K) attention before softmax.
        tiles: (ΣN, H) what is averaged.
        head: embeddings (M, K · H), one row for itself each → logits (M, C).
    """
    bag = bags.bag_index
    attention = segment_softmax(scores, bags)  # (ΣN, K)
    whole = segment_weighted_sum(attention, tiles, bags)  # (B, K, H)
    top = segment_argmax(scores, bags)  # (B, K) rows
    lowest = torch.finfo(attention.dtype).min / 4  # finite: a bag of one tile has no other, and is put right at the end
    others = segment_softmax(scores.to(attention.dtype).scatter(0, top, lowest), bags)
    top_loses = whole - segment_weighted_sum(others, tiles, bags)  # (B, K, H)

    wide = torch.float32 if tiles.device.type == "mps" else torch.float64  # which Apple's GPUs lack
    weights = {name: value.detach().to(wide) for name, value in head.state_dict(keep_vars=True).items()}

    def logits_of(embedding: Tensor) -> Tensor:
        return functional_call(head, weights, (embedding.flatten(1),))

    logits = logits_of(whole.to(wide))  # (B, C)
    lost = []
    for start in range(0, len(tiles), CHUNK):
        rows = slice(start, start + CHUNK)
        own, weight = bag[rows], attention[rows].unsqueeze(2)
        loses = weight * (tiles[rows].unsqueeze(1) - whole[own]) / (1 - weight).clamp_min(0.5)  # (n, K, H)
        loses = torch.where(weight > 0.5, top_loses[own], loses)
        lost.append(logits[own] - logits_of(whole[own].to(wide) - loses.to(wide)))
    alone = (bags.sizes == 1)[bag].unsqueeze(1)  # (ΣN, 1)
    return torch.where(alone, logits[bag], torch.cat(lost)).to(attention.dtype)


def gradient_contributions(tiles: Tensor, bags: BagBatch, logits_of: Callable[[BagBatch], Tensor]) -> Tensor:
    """(ΣN, C): gradient × input of every tile for every output of its own bag.

    Args:
        tiles: (ΣN, H) embedding of the tiles.
        logits_of: the rest of the model: bags whose features are the embedding → logits (B, C). It must read bags and tiles
            from its argument alone: tensors kept from outside may belong to inference mode.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = tiles.detach().clone().requires_grad_()  # (ΣN, H)
        own = replace(
            bags,
            features=leaf,
            offsets=bags.offsets.clone(),
            coords_um=None if bags.coords_um is None else bags.coords_um.clone(),
            tile_um=None if bags.tile_um is None else bags.tile_um.clone(),
        )
        # bags do not see one another, so the gradient of the sum over bags is each bag's own
        sums = logits_of(own).sum(0)  # (C,)
        gradients = [torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in sums]
        return torch.stack([(gradient * leaf.detach()).sum(1) for gradient in gradients], 1)
