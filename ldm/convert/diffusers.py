"""The names diffusers gives to a Stable Diffusion v1 model's weights: one table of key pairs."""
from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
UNET_ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
             "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
             "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
             "middle_block.2": "mid_block.resnets.1"}
VAE_PARTS = {"mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
             "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.q": "mid_block.attentions.0.to_q",
             "mid.attn_1.k": "mid_block.attentions.0.to_k", "mid.attn_1.v": "mid_block.attentions.0.to_v",
             "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0", "norm_out": "conv_norm_out",
             "nin_shortcut": "conv_shortcut"}
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}    # until diffusers 0.17


def rename(key: str, table: Mapping[str, str]) -> str:
    """Replaces the parts of a dotted key that stand in `table`."""
    for ours, theirs in table.items():
        key = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", key)
    return key


def unet_key(key: str, res_blocks: int) -> str:
    """Names a U-Net weight as diffusers does: its levels count blocks and resamplers apart."""
    per_level = res_blocks + 1     # blocks and a resampler, or in the upper half one more block
    found = re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.*)", key)
    if found:
        half, index, part, rest = found[1], int(found[2]), int(found[3]), found[4]
        kind = ("resnets", "attentions", "upsamplers")[part]
        if half == "output":
            level, position = divmod(index, per_level)
            place = "upsamplers.0" if rest.startswith("conv.") else f"{kind}.{position}"
            key = f"up_blocks.{level}.{place}.{rest}"
        elif index > 0:                       # input block 0 is the first convolution
            level, position = divmod(index - 1, per_level)
            place = "downsamplers.0" if rest.startswith("op.") else f"{kind}.{position}"
            key = f"down_blocks.{level}.{place}.{rest.replace('op.', 'conv.')}"
    return rename(rename(key, UNET_ENDS), RESNET)


def vae_key(key: str, levels: int) -> str:
    """Names an autoencoder weight as diffusers does: its decoder counts levels from the coarsest."""
    key = rename(key, VAE_PARTS)
    key = re.sub(r"encoder\.down\.(\d)\.block", r"encoder.down_blocks.\1.resnets", key)
    key = re.sub(r"encoder\.down\.(\d)\.downsample", r"encoder.down_blocks.\1.downsamplers.0", key)
    key = re.sub(r"decoder\.up\.(\d)\.block", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets", key)
    return re.sub(r"decoder\.up\.(\d)\.upsample",
                  lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0", key)


def unet_state(state: Mapping[str, Tensor], res_blocks: int) -> dict[str, Tensor]:
    """Renames a U-Net's state dict."""
    return {unet_key(key, res_blocks): value for key, value in state.items()}


def vae_state(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Renames an autoencoder's state dict; the 1x1 convolutions of its attention are linear layers there."""
    renamed = {}
    for key, value in state.items():
        name = vae_key(key, levels)
        if ".to_" in name and value.ndim == 4:
            value = value.flatten(1)
        renamed[name] = value
    return renamed


def our_vae_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts an autoencoder's state dict under the names and shapes of `expected`, where diffusers' names are known."""
    levels = len({key.split(".")[2] for key in expected if key.startswith("decoder.up.")})     # of the decoder
    ours = {vae_key(key, levels): key for key in expected}
    fitted = {}
    for key, value in state.items():
        name = rename(key, OLDER_ATTENTION)
        name = ours.get(name, name)
        if name in expected and value.numel() == expected[name].numel():
            value = value.view_as(expected[name])      # linear layers there are 1x1 convolutions here
        fitted[name] = value
    return fitted
