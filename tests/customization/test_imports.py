"""Tests of other tools' files: what was exported comes back, forms written by hand, nothing is used in part."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from customization.test_export import concept_for, written
from modules.test_parity import unet_pair
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.customization.delta import Concept, load_concept
from ldm.customization.export import as_diff, as_lora, as_processors, embeddings
from ldm.customization.imports import our_names
from ldm.customization.low_rank import by_error, by_rank, differences, spectra
from ldm.util import UserError

K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
OURS = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def unet() -> nn.Module:
    torch.manual_seed(0)
    return unet_pair(32, [1, 2, 4, 4], 2, [4, 2, 1], 8, 8)[0]


def saved(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


def test_every_weight_of_the_network_has_a_name() -> None:
    names = our_names()
    assert len(names) == 686 and len(set(names.values())) == 686 and names[f"{K}.weight"] == OURS


@pytest.mark.parametrize("form", ["lora", "mixed", "diff", "processors"])
def test_what_was_exported_comes_back(unet: nn.Module, tmp_path: Path, capsys, form: str) -> None:
    concept, base = concept_for(unet, low=form != "lora"), dict(unet.named_parameters())
    path = tmp_path / "file.safetensors"
    if form in ("lora", "mixed"):
        found = spectra(concept, {})
        written(as_lora(concept, found, by_rank(found, 24) if form == "lora" else by_error(found, 1e-6), 2), path)
    elif form == "diff":
        written(as_diff(concept, concept.differences, 2), path)
    else:
        path = saved(tmp_path / "file.bin", {**as_processors(concept.differences, base, 2),
                                             "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor": {}})
    read = load_concept(path, class_noun="teddy bear")
    assert "all 32 changed weights of the U-Net are read" in capsys.readouterr().out
    assert read.scheme.concept == "teddy bear" and not read.words
    back = differences(read, base)
    assert back.keys() == concept.differences.keys()
    for name, value in concept.differences.items():
        assert (back[name] - value).norm() < 1e-3 * value.norm()


def test_words_come_back_with_every_embedding_and_with_a_lora(unet: nn.Module, tmp_path: Path) -> None:
    concept = concept_for(unet)
    files = embeddings(concept, "x")
    both = written(files["x-v"], tmp_path / "both.safetensors")["emb_params"]
    table = {"string_to_param": {"*": both}, "name": "x", "step": 7}
    dictionary = nn.ParameterDict({"*": nn.Parameter(both[:1]), "@": nn.Parameter(both[1:])})
    bundle = {"bundle_emb.x.string_to_param.*": both, f"lora_unet_{K.replace('.', '_')}.diff": torch.ones(2, 24)}
    paths = [tmp_path / "both.safetensors", saved(tmp_path / "a1111.pt", table),
             saved(tmp_path / "inversion.pt", {"string_to_token": {"*": torch.tensor(265)},
                                               "string_to_param": dictionary}),
             saved(tmp_path / "bundle.pt", bundle)]
    for path in paths:
        read = load_concept(path, class_noun="teddy bear")
        assert read.scheme.concept == "<new1> <new2> teddy bear", path
        assert torch.equal(torch.stack(list(read.words.values())), both)
    saved(tmp_path / "delta.bin", {"modifier_token": {"<b>": both[0], "<a>": both[1]},
                                   "unet": {f"{K}.weight": torch.ones(2, 24)}})
    with pytest.raises(UserError, match="2 new words, which may be one concept's or 2 concepts'"):
        load_concept(tmp_path / "delta.bin", class_noun="cat")
    one = load_concept(tmp_path / "delta.bin", ("<b>", "<a>"), ["cat", "dog"])
    assert [scheme.concept for scheme in one.schemes] == ["<b> cat", "<a> dog"]
    assert torch.equal(one.weights[OURS], torch.ones(2, 24))


def factors(**more: Tensor) -> dict[str, Tensor]:
    return {"lora_up.weight": torch.tensor([[1.0], [2.0]]), "lora_down.weight": torch.tensor([[3.0, 4.0, 5.0]]), **more}


@pytest.mark.parametrize(("entries", "scale"), [
    ({f"lora_unet_{K.replace('.', '_')}.{part}": value for part, value in factors().items()}, 1.0),
    ({f"lora_unet_{K.replace('.', '_')}.{part}": value
      for part, value in factors(alpha=torch.tensor(0.5)).items()}, 0.5),
    ({f"unet.{K}.lora_B.weight": factors()["lora_up.weight"],
      f"unet.{K}.lora_A.weight": factors()["lora_down.weight"]}, 1.0),
    ({f"unet.{K.removesuffix('.to_k')}.processor.to_k_lora.{side}.weight": factors()[f"lora_{side}.weight"]
      for side in ("up", "down")}, 1.0)], ids=["no alpha", "alpha", "peft", "processor"])
def test_loras_of_all_spellings(tmp_path: Path, entries: dict[str, Tensor], scale: float) -> None:
    save_file(entries, tmp_path / "lora.safetensors")
    (u, v), = load_concept(tmp_path / "lora.safetensors", class_noun="cat").factors.values()
    assert torch.equal(u @ v, scale * torch.tensor([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]))


def test_a_lora_of_a_convolution_is_added_to_it(unet: nn.Module, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    up, down = torch.randn(32, 2, 1, 1, generator=rng), torch.randn(2, 32, 3, 3, generator=rng)
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, tmp_path / "lora.safetensors")
    ((name, (u, v)),) = load_concept(tmp_path / "lora.safetensors", class_noun="cat").factors.items()
    convolved = nn.functional.conv2d(nn.functional.conv2d(torch.eye(32)[:, :, None, None], down, padding=1), up)
    assert name == "input_blocks.1.0.in_layers.2.weight" and unet.get_parameter(name).shape == (32, 32, 3, 3)
    assert torch.allclose((u @ v).view(32, 32, 3, 3)[:, :, 1, 1].T, convolved[:, :, 0, 0], atol=1e-5)


@torch.no_grad()
def test_a_lora_that_diffusers_wrote_is_read(tmp_path: Path) -> None:
    """Every kind of layer, alpha unlike the rank; what our U-Net then predicts is what theirs does."""
    peft = pytest.importorskip("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Saver
    torch.manual_seed(0)
    ours, theirs = unet_pair(32, [1, 2, 4, 4], 2, [4, 2, 1], 8, 8)
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False,
                                       target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]))
    Saver.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(theirs))
    read = load_concept(tmp_path / "pytorch_lora_weights.safetensors", class_noun="cat")
    assert len(read.factors) == 32 * 4 + 16 + 22 and not read.misfits(dict(ours.named_parameters()))
    for name, (u, v) in read.factors.items():
        weight = ours.get_parameter(name)
        weight.add_((u @ v).view_as(weight))
    x, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24), torch.tensor([10, 900])
    expected = theirs(x, t, context).sample
    assert (ours(x, t, context) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("entries", "message"), [
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(1, 1)}, "changes the text encoder too"),
    ({f"lora_unet_{K.replace('.', '_')}.lora_up.weight": torch.ones(1, 1)}, "has one factor of two"),
    ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_1_attn2_to_k.diff": torch.ones(1, 1)},
     "transformer_blocks_1_attn2_to_k', which Stable Diffusion v1 does not have"),
    ({f"lora_unet_{K.replace('.', '_')}.diff": torch.ones(1, 1), "lora_mid.weight": torch.ones(1, 1)},
     "has 'lora_mid.weight', which has no place here"),
    ({f"lora_unet_{K.replace('.', '_')}.hada_w1_a": torch.ones(1, 1)}, "it is a LoRA file"),
    ({"clip_g": torch.ones(2, 1280), "clip_l": torch.ones(2, 768)}, "it is a textual-inversion embedding")])
def test_what_would_be_used_in_part_is_refused_by_name(tmp_path: Path, entries: dict, message: str) -> None:
    save_file(entries, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=message):
        load_concept(tmp_path / "file.safetensors", class_noun="cat")


def test_what_is_read_can_be_saved_as_a_concept(unet: nn.Module, tmp_path: Path) -> None:
    concept = concept_for(unet, low=True)
    found = spectra(concept, {})
    written(as_lora(concept, found, by_error(found, 1e-6), 2), tmp_path / "lora.safetensors")
    read = load_concept(tmp_path / "lora.safetensors", class_noun="cat")
    again: Concept = load_concept(read.save(tmp_path / "concept.safetensors"))
    assert again.factors.keys() == read.factors.keys() and again.schemes == read.schemes


ONE = torch.ones
FLAT = f"lora_unet_{K.replace('.', '_')}"


@pytest.mark.parametrize("content", [
    {"string_to_param": ONE(2, 4)}, {"string_to_param": [ONE(4)]}, {"string_to_param": {"*": 3}},
    {"string_to_param": {"*": torch.tensor(1.0)}}, {"emb_params": ONE(1, 4), "<a>": ONE(5)},
    {"emb_params": ONE(2, 4).int()}, {"emb_params": {"u": ONE(1, 1), "v": ONE(1, 1)}},
    {"unet": {}, "modifier_token": {"a": 3}}, {"unet": {}, "modifier_token": {"a": ONE(3), "b": ONE(4)}},
    {"unet": {}, "modifier_token": [1]}, {"unet": {f"{K}.weight": {"u": 3, "v": 4}}, "modifier_token": {}},
    {"unet": {f"{K}.weight": {"u": ONE(2, 3), "v": ONE(4, 2)}}, "modifier_token": {}},
    {f"{FLAT}.lora_up.weight": ONE(2, 3), f"{FLAT}.lora_down.weight": ONE(2, 4)},
    {f"{FLAT}.lora_up.weight": ONE(2, 3), f"{FLAT}.lora_down.weight": ONE(3, 4), f"{FLAT}.alpha": ONE(3)},
    {f"{FLAT}.lora_up.weight": ONE(2, 0), f"{FLAT}.lora_down.weight": ONE(0, 4)},
    {f"{FLAT}.lora_up.weight": ONE(2), f"{FLAT}.lora_down.weight": ONE(2)},
    {f"{FLAT}.diff": ONE(2, 3).int()}])
def test_damaged_files_are_one_sentence(tmp_path: Path, content: dict) -> None:
    with pytest.raises(UserError, match="is damaged"):
        load_concept(saved(tmp_path / "file.bin", content), class_noun="cat")


def test_a_network_alone_is_told_by_what_it_is(tmp_path: Path) -> None:
    content = {"conv_in.weight": ONE(1), f"{K}.weight": ONE(2, 2)}
    with pytest.raises(UserError, match="it is the U-Net alone of a diffusers folder"):
        load_concept(saved(tmp_path / "file.bin", content), class_noun="cat")
