"""Tests that the networks compute what diffusers' and transformers' do, on the same random weights."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.convert.diffusers import unet_state, vae_state
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip_text import CLIPTextModel


def randomize(module: nn.Module) -> nn.Module:
    """Gives every parameter random values, those that start at zero too; activations stay near 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            vector = parameter.ndim == 1                             # scales and biases
            parameter.normal_(mean=float(vector), std=0.3 if vector else parameter[0].numel() ** -0.5)
    return module.eval()


def set_groups(module: nn.Module, groups: int) -> nn.Module:
    """Gives all group norms one number of groups, as diffusers' models have (ours have 32 from 256 channels on)."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups
    return module


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """The two agree to 1e-5 of the values' spread, and are not trivially equal."""
    assert ours.shape == theirs.shape and theirs.std() > 1e-3 and torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def unet_pair(width: int, mults: list[int], res_blocks: int, attention: list[int], heads: int, groups: int | None):
    """Builds our U-Net and diffusers' with the same random weights."""
    from diffusers import UNet2DConditionModel
    ours = UNetModel(image_size=16, in_channels=4, model_channels=width, out_channels=4, num_res_blocks=res_blocks,
                     attention_resolutions=attention, channel_mult=mults, num_heads=heads, context_dim=24,
                     use_spatial_transformer=True, transformer_depth=1, legacy=False)
    crossed = [2**level in attention for level in range(len(mults))]
    theirs = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=[width * mult for mult in mults],
        layers_per_block=res_blocks, cross_attention_dim=24, attention_head_dim=heads, norm_num_groups=groups or 32,
        down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in crossed],
        up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(crossed)])
    randomize(ours if groups is None else set_groups(ours, groups))
    theirs.load_state_dict(unet_state(ours.state_dict(), res_blocks))
    return ours, theirs.eval()


@pytest.mark.parametrize("width, mults, res_blocks, attention, heads, groups", [
    (32, [1, 2, 4, 4], 2, [4, 2, 1], 8, 8),     # SD v1's structure, a tenth as wide
    (64, [1, 2], 1, [2, 1], 4, 16),             # attention on the coarsest level as well
    (256, [1, 1], 1, [2], 8, None),             # wide enough for 32 groups of our own; attention on one level
], ids=["sd", "all levels", "32 groups"])
@torch.no_grad()
def test_unet_equals_diffusers(width, mults, res_blocks, attention, heads, groups):
    torch.manual_seed(0)
    ours, theirs = unet_pair(width, mults, res_blocks, attention, heads, groups)
    x, context = torch.randn(2, 4, 16, 24), torch.randn(2, 7, 24)
    for t in (torch.tensor([0, 999]), torch.tensor([500.25, 37.5])):     # solvers ask for times between the steps
        assert_close(ours(x, t, context), theirs(x, t, context).sample)


def test_sd_sizes_have_the_released_group_norms():
    """What `set_groups` sets by hand above is SD's 32 by itself at SD's widths; the epsilons are SD's at any."""
    with torch.device("meta"):
        unet = UNetModel(image_size=32, in_channels=4, model_channels=320, out_channels=4, num_res_blocks=2,
                         attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4], num_heads=8, context_dim=768)
        vae = AutoencoderKL(vae_config(ch=128, mults=[1, 2, 4, 4]), {"target": "torch.nn.Identity"}, 4)
    norms = {part: [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
             for part, model in (("unet", unet), ("vae", vae))}
    transformers = {id(part.norm) for part in unet.modules() if isinstance(part, SpatialTransformer)}
    assert len(transformers) == 16
    assert len(norms["unet"]) == 22 * 2 + 16 + 1                     # residual blocks, transformers, output
    assert len(norms["vae"]) == (10 * 2 + 1 + 1) + (14 * 2 + 1 + 1)  # encoder, decoder: blocks, attention, output
    assert {norm.num_groups for norm in norms["unet"] + norms["vae"]} == {32}
    assert all(norm.eps == (1e-6 if id(norm) in transformers else 1e-5) for norm in norms["unet"])
    assert all(norm.eps == 1e-6 for norm in norms["vae"])


def vae_config(ch: int, mults: list[int]) -> dict:
    return dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=ch, ch_mult=mults,
                num_res_blocks=2, attn_resolutions=[], dropout=0.0)


@pytest.mark.parametrize("ch, mults, groups", [(32, [1, 2, 4, 4], 8), (128, [1, 2], None)], ids=["sd", "32 groups"])
@torch.no_grad()
def test_autoencoder_equals_diffusers(ch, mults, groups):
    from diffusers import AutoencoderKL as Theirs
    torch.manual_seed(1)
    ours = AutoencoderKL(vae_config(ch, mults), {"target": "torch.nn.Identity"}, embed_dim=4)
    randomize(ours if groups is None else set_groups(ours, groups))
    levels = len(mults)
    theirs = Theirs(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2,
                    norm_num_groups=groups or 32, block_out_channels=[ch * mult for mult in mults],
                    down_block_types=["DownEncoderBlock2D"] * levels,
                    up_block_types=["UpDecoderBlock2D"] * levels).eval()
    theirs.load_state_dict(vae_state(ours.state_dict(), levels))
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    posterior, reference = ours.encode(images), theirs.encode(images).latent_dist
    assert_close(posterior.mean, reference.mean)
    assert_close(posterior.logvar, reference.logvar)
    assert_close(posterior.kl(), reference.kl())
    latents = torch.randn(2, 4, 5, 6)
    assert_close(ours.decode(latents), theirs.decode(latents).sample)


@torch.no_grad()
def test_text_tower_equals_transformers():
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as Theirs
    torch.manual_seed(2)
    ours = randomize(CLIPTextModel(vocabulary_size=300, width=32, layers=3, heads=4, positions=77))
    theirs = Theirs(CLIPTextConfig(vocab_size=300, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
                                   num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu",
                                   bos_token_id=298, eos_token_id=299, pad_token_id=299)).eval()
    # transformers 5 dropped the "text_model." that SD's files and transformers 4 have
    prefix = "" if any(key.startswith("text_model.") for key in theirs.state_dict()) else "text_model."
    theirs.load_state_dict({key.removeprefix(prefix): value for key, value in ours.state_dict().items()})
    ids = torch.randint(0, 299, (2, 77))
    ids[:, 20:] = 299
    for found, expected in ((ours(input_ids=ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)),
                            (ours(ids[:, :9]), theirs(ids[:, :9]))):
        assert_close(found.last_hidden_state, expected.last_hidden_state)
        for state, other in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
            assert_close(state, other)


def control_of_two() -> DBIMControl:
    """A control for one prompt of four positions, in three blocks."""
    return DBIMControl(concept_tokens=torch.tensor([[0, 1, 1, 0]]), concept_prompt=torch.tensor([[1, 1, 1, 0]]),
                       context_tokens=torch.tensor([[1, 0, 0, 0]]), context_prompt=torch.tensor([[1, 1, 0, 0]]),
                       strength=torch.tensor(0.7), layout=BranchLayout.SHARED, full_pixels=16)


@pytest.mark.parametrize("control", [None, control_of_two()], ids=["plain", "dbim"])
def test_checkpointing_changes_neither_output_nor_gradients(control):
    """The same to the bit, and the checkpointed block does run its forward a second time."""
    torch.manual_seed(3)
    block = BasicTransformerBlock(32, n_heads=4, d_head=8, context_dim=12)
    x, context = torch.randn(3, 16, 32), torch.randn(3, 4, 12)
    results, runs = [], []
    for checkpointed in (False, True):
        block.checkpoint = checkpointed
        calls: list[int] = []
        handle = block.attn2.to_q.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        inputs = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        output = block(*inputs, control)
        gradients = torch.autograd.grad(output.square().sum(), [*inputs, *block.parameters()])
        handle.remove()
        results.append([output, *gradients])
        runs.append(len(calls))
    assert runs == [1, 2]
    assert all(torch.equal(plain, saved) for plain, saved in zip(*results, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1:])


@pytest.mark.parametrize("control", [None, control_of_two()], ids=["plain", "dbim"])
def test_checkpointing_the_whole_unet_changes_nothing(control):
    torch.manual_seed(4)
    config = dict(image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1,
                  attention_resolutions=[2, 1], channel_mult=[1, 2], num_heads=4, context_dim=12)
    plain = randomize(UNetModel(**config))
    saving = UNetModel(**config, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x, t, context = torch.randn(3, 4, 4, 4), torch.tensor([10, 500, 900]), torch.randn(3, 4, 12)
    results = []
    for unet in (plain, saving):
        output = unet(x, t, context, control)
        results.append([output, *torch.autograd.grad(output.square().mean(), list(unet.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
