"""CLIP's text transformer, under the key names a Stable Diffusion v1 checkpoint uses."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.encoders.extended_embedding import ExtendedEmbedding


class TextEmbeddings(nn.Module):
    """Token vectors plus position vectors, added once, after all words stand in their places."""

    def __init__(self, vocabulary_size: int, width: int, positions: int):
        super().__init__()
        self.token_embedding = ExtendedEmbedding(vocabulary_size, width)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]  # (B, T, D)


class SelfAttention(nn.Module):
    """Causal multi-head self-attention with biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(layer(x), "b t (h d) -> b h t d", h=self.heads)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))                     # (B, H, T, d)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)                        # (B, H, T, d)
        return self.out_proj(rearrange(out, "b h t d -> b t (h d)"))                         # (B, T, D)


class MLP(nn.Module):
    """Two linear layers around CLIP's quick approximation of GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class EncoderLayer(nn.Module):
    """Attention and MLP, each normalized before and added after."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextLayers(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns what goes into the first layer and what comes out of each, (B, T, D)."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class TextOutput(NamedTuple):
    """What the text tower returns: the features (B, T, D), and where asked for the states between layers, unnormalized.

    `hidden_states[-1]` is the last layer's, before the final normalization, as in transformers.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class TextTransformer(nn.Module):
    """Embeddings, layers, final normalization."""

    def __init__(self, vocabulary_size: int, width: int, layers: int, heads: int, positions: int):
        super().__init__()
        self.embeddings = TextEmbeddings(vocabulary_size, width, positions)
        self.encoder = TextLayers(width, layers, heads)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> TextOutput:
        states = self.encoder(self.embeddings(input_ids))                                    # (B, T, D) each
        return TextOutput(self.final_layer_norm(states[-1]), tuple(states) if output_hidden_states else None)


class CLIPTextModel(nn.Module):
    """CLIP's text tower; `text_model` is a name in every SD v1 checkpoint, whatever transformers calls it today."""

    def __init__(self, vocabulary_size: int = 49408, width: int = 768, layers: int = 12, heads: int = 12,
                 positions: int = 77):
        super().__init__()
        self.text_model = TextTransformer(vocabulary_size, width, layers, heads, positions)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> TextOutput:
        """Returns the features of token ids (B, T), under transformers' names."""
        return self.text_model(input_ids, output_hidden_states)

    def get_input_embeddings(self) -> ExtendedEmbedding:
        """Returns the token table."""
        return self.text_model.embeddings.token_embedding

    def resize_token_embeddings(self, new_num_tokens: int) -> ExtendedEmbedding:
        """Gives the token table so many rows, further ones at random, and returns it."""
        table = self.get_input_embeddings()
        table.resize(new_num_tokens)
        return table
