"""Tests of which tensors train, and of the start token's stopped gradient against the softmax's own derivative."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ldm.customization.selection import stopped_first_token, trained_parameters
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import UserError


@pytest.fixture(scope="module")
def sd_unet() -> UNetModel:
    """SD v1's U-Net without memory for its weights."""
    with torch.device("meta"):
        return UNetModel(image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=2,
                         attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4], num_heads=8, context_dim=768)


def test_keys_and_values_of_sixteen_layers_train(sd_unet):
    """19,169,280 values, the size of the release's files; the places of SD's transformers are written out."""
    places = [f"input_blocks.{block}.1" for block in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"]
    places += [f"output_blocks.{block}.1" for block in range(3, 12)]
    trained = trained_parameters(sd_unet, "crossattn-kv")
    assert list(trained) == [f"{place}.transformer_blocks.0.attn2.to_{part}.weight"
                             for place in places for part in "kv"]
    assert len(trained) == 32 and sum(parameter.numel() for parameter in trained.values()) == 19_169_280
    assert all(dict(sd_unet.named_parameters())[name] is parameter for name, parameter in trained.items())


def test_other_selections(sd_unet):
    crossed = trained_parameters(sd_unet, "crossattn")
    assert {name.partition("attn2.")[2] for name in crossed} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}
    assert len(crossed) == 16 * 5 and trained_parameters(sd_unet, "none") == {}
    with pytest.raises(UserError, match="'all' is unknown; use one of crossattn-kv, crossattn, none"):
        trained_parameters(sd_unet, "all")


def block_of_one_head() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns a network of one transformer block, image features (2, 5, 4) and text features (2, 3, 6)."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"block": BasicTransformerBlock(4, n_heads=1, d_head=4, context_dim=6)}).double()
    return network, torch.randn(2, 5, 4).double(), torch.randn(2, 3, 6).double()


def kv_gradients(weights: dict[str, np.ndarray], x: np.ndarray, context: np.ndarray,
                 first: int) -> dict[str, np.ndarray]:
    """Derives the gradients of sum(out**2) / 2 by hand, counting keys and values of tokens from `first` on."""
    gradients = {"to_k": 0.0, "to_v": 0.0}
    for image, text in zip(x, context, strict=True):
        q, k, v = image @ weights["to_q"].T, text @ weights["to_k"].T, text @ weights["to_v"].T
        scores = np.exp(q @ k.T / 2.0)                                           # (N, T), 2 = sqrt(d)
        probs = scores / scores.sum(axis=1, keepdims=True)                       # (N, T)
        out = probs @ v @ weights["to_out"].T + weights["bias"]                  # (N, C)
        d_heads = out @ weights["to_out"]                                        # (N, d)
        d_probs = d_heads @ v.T                                                  # (N, T)
        d_scores = probs * (d_probs - (d_probs * probs).sum(axis=1, keepdims=True))    # (N, T)
        d_k, d_v = d_scores.T @ q / 2.0, probs.T @ d_heads                       # (T, d)
        gradients["to_k"] = gradients["to_k"] + d_k[first:].T @ text[first:]     # (d, D)
        gradients["to_v"] = gradients["to_v"] + d_v[first:].T @ text[first:]     # (d, D)
    return gradients


@pytest.mark.parametrize("stopped", [False, True])
def test_the_start_token_gives_keys_and_values_no_gradient(stopped):
    network, x, context = block_of_one_head()
    layer = network["block"].attn2
    weights = {name: getattr(layer, name).weight.detach().numpy() for name in ("to_q", "to_k", "to_v")}
    weights |= {"to_out": layer.to_out[0].weight.detach().numpy(), "bias": layer.to_out[0].bias.detach().numpy()}
    expected = kv_gradients(weights, x.numpy(), context.numpy(), first=int(stopped))
    if stopped:
        with stopped_first_token(network):
            layer(x, context).square().sum().div(2).backward()
    else:
        layer(x, context).square().sum().div(2).backward()
    for name, gradient in expected.items():
        assert np.abs(getattr(layer, name).weight.grad.numpy() - gradient).max() < 1e-12
        assert np.abs(gradient).max() > 1e-3


def test_outputs_and_all_other_gradients_stay():
    network, x, context = block_of_one_head()
    others = [parameter for name, parameter in network.named_parameters()
              if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    results = []
    for stopped in (False, True):
        if stopped:
            with stopped_first_token(network):
                out = network["block"](x, context)
        else:
            out = network["block"](x, context)
        results.append([out, *torch.autograd.grad(out.square().sum(), others)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_hooks_are_gone_after_the_block_even_after_an_error():
    network, x, context = block_of_one_head()
    keys = network["block"].attn2.to_k.weight
    plain = torch.autograd.grad(network["block"](x, context).sum(), keys)[0]
    with pytest.raises(KeyError), stopped_first_token(network):
        assert sum(len(module._forward_hooks) for module in network.modules()) == 2
        raise KeyError
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(torch.autograd.grad(network["block"](x, context).sum(), keys)[0], plain)
