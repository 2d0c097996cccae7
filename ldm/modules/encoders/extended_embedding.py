"""ExtendedEmbedding: a frozen vocabulary and the learned rows beside it."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExtendedEmbedding(nn.Embedding):
    """An embedding table whose ids past the end of `weight` are rows of `extra`, in blocks that train apart.

    Until rows are added it is an `nn.Embedding` to the bit, state-dict keys included. Optimizers are given blocks of
    `extra` only, so that nothing, weight decay included, can move the vocabulary.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)
        self.extra = nn.ParameterList()

    def add_rows(self, rows: Tensor) -> nn.Parameter:
        """Appends a block of `rows` (n, D) behind the rows there are and returns it."""
        self.extra.append(nn.Parameter(rows.detach().to(self.weight)))
        return self.extra[-1]

    def clear_rows(self) -> None:
        """Takes all added rows away."""
        self.extra = nn.ParameterList()

    @torch.no_grad()
    def resize(self, rows: int) -> None:
        """Gives `weight` so many rows: those there are, the added ones after them, then random ones as wide spread."""
        known = torch.cat([self.weight, *self.extra])[:rows]                         # (<= rows, D)
        fresh = known.std() * torch.randn(rows - len(known), known.shape[1], device=known.device, dtype=known.dtype)
        self.weight = nn.Parameter(torch.cat([known, fresh]), self.weight.requires_grad)
        self.num_embeddings = rows
        self.clear_rows()

    def forward(self, input: Tensor) -> Tensor:
        """Returns vectors (B, T, D) of ids (B, T)."""
        if not len(self.extra):
            return super().forward(input)
        new = input >= self.num_embeddings                                           # (B, T)
        known = F.embedding(input.masked_fill(new, 0), self.weight)                  # (B, T, D)
        rows = torch.cat(list(self.extra))                                           # (words, D)
        added = F.embedding((input - self.num_embeddings).clamp(min=0), rows)        # (B, T, D)
        return torch.where(new[..., None], added, known)                             # (B, T, D)
