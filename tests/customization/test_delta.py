"""Tests of concept files: what is in them to the bit, what they do to a model, which files are refused."""
from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from ldm import saving
from ldm.base import base_identity
from ldm.checkpoint import load_state, read_metadata
from ldm.customization.delta import AppliedConcept, Concept, load_concept
from ldm.customization.ico import PromptScheme
from ldm.customization.selection import trained_parameters
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import BasicTransformerBlock
from ldm.saving import save_safetensors
from ldm.util import UserError, instantiate_from_config

WIDTH = 16      # of the text features
UNET = "model.diffusion_model."
SMALL = {"unet_config": {"params": {"model_channels": 16, "channel_mult": [1, 2], "attention_resolutions": [2, 1],
                                    "num_head_channels": 8, "context_dim": WIDTH}},
         "first_stage_config": {"params": {"ddconfig": {"ch": 8, "ch_mult": [1, 1, 1]}}},
         "cond_stage_config": {"params": {"width": WIDTH, "layers": 1, "heads": 1}}}


def build(seed: int) -> LatentDiffusion:
    """Builds the embedded model's classes at a fraction of its size, with random weights, zeros included."""
    config = OmegaConf.load(Path(__file__).parents[2] / "configs/model/tiny.yaml").model
    config.params = OmegaConf.merge(config.params, SMALL)
    torch.manual_seed(seed)
    model = instantiate_from_config(config).eval().requires_grad_(False)
    for parameter in model.model.parameters():
        parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build(0)


def kv_names(model: LatentDiffusion) -> list[str]:
    """Names K and V of all cross-attention layers without asking `selection`."""
    return [f"{name}.attn2.to_{part}.weight" for name, module in model.model.diffusion_model.named_modules()
            if isinstance(module, BasicTransformerBlock) for part in "kv"]


def make_concept(model: LatentDiffusion, seed: int = 1, words: tuple[str, ...] = ("<new1>", "<new2>")) -> Concept:
    """Makes a concept as training does: words and contexts are rows of larger blocks, weights are the U-Net's."""
    rng = torch.Generator().manual_seed(seed)
    rows, contexts = torch.randn(2, WIDTH, generator=rng), torch.randn(8, WIDTH, generator=rng)
    scheme = PromptScheme(words, "tortoise plushy", prefix=3, suffix=1)
    names = [name for image in range(2) for name in scheme.context_words(image)]
    weights = {name: value + 0.1 * torch.randn(value.shape, generator=rng)
               for name, value in trained_parameters(model.model.diffusion_model, "crossattn-kv").items()}
    return Concept(dict(zip(words, rows, strict=True)), dict(zip(names, contexts, strict=True)), weights, (scheme,),
                   base_identity(model, "small"), 520, {"versions": {"torch": "2"}, "seed": 23})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Says whether two tables have the same keys in the same order, dtypes and bits."""
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)


def snapshot(model: LatentDiffusion) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_concept_comes_back_as_it_was(model, tmp_path, dtype):
    concept = make_concept(model)
    concept.save(tmp_path / "concept.safetensors", dtype)
    loaded = load_concept(tmp_path / "concept.safetensors")
    assert same(dict(concept.words), dict(loaded.words))
    assert dict(loaded.contexts).keys() == dict(concept.contexts).keys()
    assert all(torch.equal(loaded.contexts[name], vector) for name, vector in concept.contexts.items())
    assert loaded.weights.keys() == concept.weights.keys()
    assert all(loaded.weights[name].dtype == dtype and torch.equal(loaded.weights[name], value.to(dtype))
               for name, value in concept.weights.items())
    assert (loaded.schemes, loaded.base, loaded.step, loaded.info) == \
        (concept.schemes, concept.base, concept.step, concept.info)
    assert loaded.scheme.concept == "<new1> <new2> tortoise plushy"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["words", "contexts", "weights"])
def test_values_that_are_not_finite_are_neither_written_nor_read(model, tmp_path, part, bad):
    concept = make_concept(model)
    name, value = next(iter(getattr(concept, part).items()))
    broken = dataclasses.replace(concept, **{part: {**getattr(concept, part), name: value.clone().fill_(bad)}})
    with pytest.raises(UserError, match=f"concept of step 520 has values that are not finite, in {name};"):
        broken.save(tmp_path / "broken.safetensors")
    assert not list(tmp_path.iterdir())
    path = concept.save(tmp_path / "concept.safetensors")
    tensors, metadata = load_safetensors(path), read_metadata(path)
    key = {"words": "words.", "contexts": "contexts.", "weights": UNET}[part] + name
    save_safetensors(path, tensors | {key: tensors[key].fill_(bad)}, metadata)
    with pytest.raises(UserError, match=f"concept.safetensors' has values that are not finite, in {key};"):
        load_concept(path)


def test_a_weight_beyond_float16_is_stored_in_float32(model, tmp_path):
    concept = make_concept(model)
    large, *rest = concept.weights
    concept.weights[large][0, 0] = 70000.0
    with pytest.warns(UserWarning, match=f"'{large}' exceeds what float16 can hold"):
        loaded = load_concept(concept.save(tmp_path / "concept.safetensors"))
    assert torch.equal(loaded.weights[large], concept.weights[large])
    assert {loaded.weights[name].dtype for name in rest} == {torch.float16}


def test_several_concepts_keep_their_order_and_numbers(model, tmp_path):
    """Words are read back by scheme, not by the alphabet a file keeps them in."""
    rows = torch.randn(3, WIDTH)
    schemes = (PromptScheme(("<zebra>",), "cat", 1, 1),
               PromptScheme(("<b>", "<a>"), "toy", template="a {}", index=1))
    words = dict(zip(("<zebra>", "<b>", "<a>"), rows, strict=True))
    concept = Concept(words, {}, {}, schemes, {"name": "", "hash": ""})
    loaded = load_concept(concept.save(tmp_path / "two.safetensors"))
    assert loaded.schemes == schemes and same(dict(loaded.words), dict(concept.words))


def test_a_file_holds_keys_and_values_words_and_contexts_and_nothing_else(model, tmp_path):
    path = make_concept(model).save(tmp_path / "concept.safetensors")
    assert len(kv_names(model)) == 14       # seven layers: two going down, one in the middle, four going up
    expected = {UNET + name for name in kv_names(model)} | {"words.<new1>", "words.<new2>"}
    expected |= {f"contexts.<ctx-0-{image}-{position}>" for image in range(2) for position in range(4)}
    tensors = load_safetensors(path)
    assert set(tensors) == expected
    assert {tensor.dtype for key, tensor in tensors.items() if key.startswith(UNET)} == {torch.float16}
    assert set(read_metadata(path)) == {"format", "concepts", "base", "step", "info"}
    values = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert path.stat().st_size < values + 8000      # a row of a block does not bring the block along


@torch.no_grad()
def test_applying_and_removing_restores_the_model_to_the_bit(model):
    concept, before, size = make_concept(model), snapshot(model), len(model.cond_stage_model.tokenizer)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500])

    def predict(prompt: str) -> Tensor:
        return model.apply_model(x, t, model.cond_stage_model([prompt]))

    plain = predict("a tortoise plushy")
    applied = AppliedConcept(model, concept, base_identity(model, "renamed"))
    during = snapshot(model)
    assert {key.removeprefix(UNET) for key in before if not torch.equal(before[key], during[key])} == \
        set(kv_names(model))
    assert all(torch.equal(during[UNET + name], value) for name, value in concept.weights.items())
    assert torch.equal(model.cond_stage_model.vectors_of("<new2>")[0], concept.words["<new2>"])
    assert not torch.equal(predict("a <new1> <new2> tortoise plushy"), plain)
    assert not torch.equal(predict("a tortoise plushy"), plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    applied.remove()
    assert same(before, snapshot(model)) and torch.equal(predict("a tortoise plushy"), plain)
    assert len(model.cond_stage_model.tokenizer) == size and model.cond_stage_model.words == []
    with pytest.raises(UserError, match="unknown word <new1>"):
        predict("a <new1>")


def test_a_concept_of_another_base_is_refused(model):
    other, before = build(1), snapshot(model)
    with pytest.raises(UserError, match="made for the base 'small'.*not for 'other'"):
        AppliedConcept(other, make_concept(model), base_identity(other, "other"))
    assert same(before, snapshot(model))


def test_a_concept_that_does_not_fit_leaves_the_model_alone(model):
    concept, before = make_concept(model), snapshot(model)
    name = kv_names(model)[0]
    for weights, words, message in (
            ({**concept.weights, name: torch.zeros(3, 3)}, concept.words, f"1 tensors differ \\({name}\\)"),
            ({**concept.weights, "middle_block.9.weight": torch.zeros(1)}, concept.words, "middle_block.9.weight"),
            (concept.weights, {"<new1>": torch.zeros(WIDTH + 1)}, "another width")):
        misfit = Concept(words, {}, weights, (PromptScheme(("<new1>",), "cat"),), {"name": "", "hash": ""})
        with pytest.raises(UserError, match=message):
            AppliedConcept(model, misfit, base_identity(model, "small"))
    assert same(before, snapshot(model)) and model.cond_stage_model.words == []


def test_a_second_concept_of_the_same_words_leaves_the_first_alone(model):
    identity, before = base_identity(model, "small"), snapshot(model)
    one, other = make_concept(model, seed=1), make_concept(model, seed=2)
    first = AppliedConcept(model, one, identity)
    during = snapshot(model)
    with pytest.raises(UserError, match="<new1>' exists already"):
        AppliedConcept(model, other, identity)
    assert same(during, snapshot(model))
    first.remove()
    assert same(before, snapshot(model))


def test_a_bases_identity_is_what_a_concept_touches(model):
    """U-Net and text encoder, in any format; beside it the earlier measure, the whole model's values as float16."""
    identity = base_identity(model, "small")
    assert identity["name"] == "small" and {len(identity[kind]) for kind in ("hash", "network")} == {16}
    half = copy.deepcopy(model).half()
    assert base_identity(half, "small") == base_identity(half.float(), "small") == identity
    assert base_identity(build(0), "x") == identity | {"name": "x"}
    half.cond_stage_model.add_words({"<new1>": torch.zeros(WIDTH)})
    assert base_identity(half, "small") == identity
    coarse = base_identity(copy.deepcopy(model).bfloat16(), "small")
    assert coarse["network"] == identity["network"] and coarse["hash"] != identity["hash"]
    decoder = copy.deepcopy(model)
    decoder.first_stage_model.decoder.conv_out.bias[0] += 1.0
    found = base_identity(decoder, "small")
    assert found["network"] == identity["network"] and found["hash"] != identity["hash"]
    for part in ("model.diffusion_model.out.2.weight",
                 "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"):
        trained = copy.deepcopy(model)
        weight = trained.get_parameter(part)
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        assert base_identity(trained, "small")["network"] != identity["network"]
    assert base_identity(build(1), "small")["network"] != identity["network"]


def test_another_decoder_or_format_is_the_same_base_and_another_network_is_so_on_request(model):
    concept = make_concept(model)
    other = build(1)
    for change in ("decoder", "bfloat16"):
        changed = copy.deepcopy(model)
        if change == "bfloat16":
            changed.bfloat16().float()
        else:
            changed.first_stage_model.decoder.conv_out.bias[0] += 1.0
        AppliedConcept(changed, concept, base_identity(changed, change)).remove()
    earlier = dataclasses.replace(concept, base={"name": "small", "hash": concept.base["hash"]})
    AppliedConcept(model, earlier, base_identity(model, "small")).remove()       # a file of before `network`
    for made in (concept, earlier):
        with pytest.raises(UserError, match="--any_base"):
            AppliedConcept(other, made, base_identity(other, "other"))
        with pytest.warns(UserWarning, match="made for the base 'small'.*not for 'other'.*all the same"):
            AppliedConcept(other, made, base_identity(other, "other"), any_base=True).remove()


def factors_of(model: LatentDiffusion, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors of a difference for every K and V."""
    rng, unet = torch.Generator().manual_seed(5), model.model.diffusion_model.state_dict()
    return {name: (torch.randn(len(unet[name]), rank, generator=rng), torch.randn(rank, WIDTH, generator=rng))
            for name in kv_names(model)}


def test_a_compressed_delta_is_added_to_the_base(model, tmp_path, capsys):
    """Custom Diffusion's {"u", "v"}; and a file of ours keeps the factors."""
    factors, before = factors_of(model), snapshot(model)
    state = {UNET + name: {"u": u, "v": v} for name, (u, v) in factors.items()}
    torch.save({"state_dict": {**state, "embed": torch.ones(1, WIDTH)}}, tmp_path / "delta.ckpt")
    concept = load_concept(tmp_path / "delta.ckpt", class_noun="cat")
    assert capsys.readouterr().out == ""                         # nothing is left out
    for made in (concept, load_concept(concept.save(tmp_path / "ours.safetensors", torch.float32))):
        assert not made.weights and made.factors.keys() == factors.keys()
        applied = AppliedConcept(model, made, base_identity(model, "small"))
        during = snapshot(model)
        assert {key for key in before if not torch.equal(before[key], during[key])} == \
            {UNET + name for name in factors}
        for name, (u, v) in factors.items():
            expected = torch.from_numpy(before[UNET + name].double().numpy() + u.double().numpy() @ v.double().numpy())
            assert torch.allclose(during[UNET + name].double(), expected, atol=1e-6)
        applied.remove()
        assert same(before, snapshot(model))
    wide = dataclasses.replace(concept, factors={kv_names(model)[0]: (torch.ones(3, 1), torch.ones(1, 3))})
    with pytest.raises(UserError, match="1 tensors differ"):
        AppliedConcept(model, wide, base_identity(model, "small"))
    assert same(before, snapshot(model))


def test_a_difference_is_added_to_the_base_and_half_precision_keeps_it(model, tmp_path):
    """Weights that move by 2 %: as differences they lose half an ulp of what was learned, in full one of themselves."""
    rng, base = torch.Generator().manual_seed(3), model.model.diffusion_model.state_dict()
    learned = {name: 0.002 * torch.randn(base[name].shape, generator=rng) for name in kv_names(model)}
    whole = dataclasses.replace(make_concept(model), weights={name: base[name] + learned[name] for name in learned})
    parts = dataclasses.replace(whole, weights={}, differences=learned)
    before, errors = snapshot(model), []
    for kind in (parts, whole):
        loaded = load_concept(kind.save(tmp_path / "concept.safetensors"))
        assert loaded.differences.keys() == kind.differences.keys() and loaded.weights.keys() == kind.weights.keys()
        applied = AppliedConcept(model, loaded, base_identity(model, "small"))
        during = snapshot(model)
        wrong = [(during[UNET + name] - before[UNET + name] - learned[name]).square().sum() for name in learned]
        errors.append(float((sum(wrong) / sum(value.square().sum() for value in learned.values())).sqrt()))
        applied.remove()
        assert same(before, snapshot(model))
    assert errors[0] < 3e-4 and errors[1] > 1e-2


def test_a_weight_in_two_ways_is_refused(model, tmp_path):
    concept = dataclasses.replace(make_concept(model), weights={}, factors=factors_of(model))
    name, (u, v) = next(iter(concept.factors.items()))
    for other in ({"weights": {name: u @ v}}, {"differences": {name: u @ v}}):
        path = dataclasses.replace(concept, **other).save(tmp_path / "concept.safetensors")
        with pytest.raises(UserError, match=f"damaged .it holds {name} in two ways"):
            load_concept(path)


def write_delta(path: Path, rows: int | None, **entries: object) -> Path:
    """Writes a Custom Diffusion delta of one K."""
    state = {UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, WIDTH), **entries}
    torch.save({"state_dict": state | ({} if rows is None else {"embed": torch.ones(rows, WIDTH)})}, path)
    return path


def test_a_joint_delta_asks_whose_its_words_are(tmp_path, capsys):
    path = write_delta(tmp_path / "joint.ckpt", 2)
    with pytest.raises(UserError, match=r"holds 2 new words, which may be one concept's or 2 concepts'.*"
                                        r"--class_noun cat dog.*--modifier_token '<new1>\+<new2>'"):
        load_concept(path, class_noun="cat")
    two = load_concept(path, class_noun=["cat", "tortoise plushy"])
    assert two.schemes == (PromptScheme(("<new1>",), "cat"), PromptScheme(("<new2>",), "tortoise plushy", index=1))
    assert "read as 2 concepts: <new1> cat, <new2> tortoise plushy" in capsys.readouterr().out
    assert load_concept(path, ("<a>", "<b>"), ["cat", "dog"]).schemes[1] == PromptScheme(("<b>",), "dog", index=1)
    assert load_concept(path, ("<a>", "<b>"), "cat").schemes == (PromptScheme(("<a>", "<b>"), "cat"),)
    with pytest.raises(UserError, match=r"2 new words but 3 class nouns were named \(cat, a, b\).*quote"):
        load_concept(path, class_noun=["cat", "a", "b"])


def test_what_a_delta_holds_besides_is_used_named_or_refused(model, tmp_path, capsys):
    path = write_delta(tmp_path / "more.ckpt", 1, epoch=3, **{"some.thing": torch.ones(1), "other": {"u": 1},
                                                             UNET + "out.2.bias": torch.ones(4)})
    concept = load_concept(path, class_noun="cat")
    assert "out.2.bias" in concept.weights and len(concept.weights) == 2
    line = capsys.readouterr().out
    assert "left out" in line and all(name in line for name in ("epoch", "some.*", "other"))
    wordless = load_concept(write_delta(tmp_path / "wordless.ckpt", None), class_noun="cat")
    assert not wordless.words and wordless.scheme.concept == "cat" and len(wordless.weights) == 1
    wordless = dataclasses.replace(wordless, weights={})
    AppliedConcept(model, wordless, base_identity(model, "small")).remove()
    text = write_delta(tmp_path / "text.ckpt", 1, **{"cond_stage_model.transformer.x": torch.ones(1)})
    with pytest.raises(UserError, match="changes the text encoder too"):
        load_concept(text, class_noun="cat")
    bad = write_delta(tmp_path / "bad.ckpt", 1, **{UNET + "out.2.bias": torch.full((4,), torch.nan)})
    with pytest.raises(UserError, match="not finite, in out.2.bias"):
        load_concept(bad, class_noun="cat")


@pytest.mark.parametrize("content, kind", [
    ({"lora_unet_mid_block_attn2_to_k.lokr_w1": torch.ones(1)}, "a LoRA file"),
    ({"clip_g": torch.ones(2, 1280)}, "a textual-inversion embedding"),
    ({UNET + "out.2.bias": torch.ones(4), "first_stage_model.quant_conv.bias": torch.ones(8)}, "a whole checkpoint")])
def test_other_kinds_of_file_are_told_by_what_they_are(tmp_path, content, kind):
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(UserError, match=f"is no concept: it is {kind}"):
        load_concept(tmp_path / "file.ckpt", class_noun="cat")


def test_a_file_of_another_version_of_the_format_is_refused(model, tmp_path):
    path = make_concept(model).save(tmp_path / "concept.safetensors")
    tensors, metadata = load_safetensors(path), read_metadata(path)
    for change, more in (({"format": "dci-ico-concept-9"}, {}), ({}, {"routing.x": torch.ones(1)})):
        save_safetensors(path, tensors | more, metadata | change)
        with pytest.raises(UserError, match="written by another version"):
            load_concept(path)


def test_a_custom_diffusion_file_is_read(model, tmp_path):
    """One table under 'state_dict': full names, the new rows alone under 'embed'."""
    weights, rows = make_concept(model).weights, torch.randn(1, WIDTH)
    torch.save({"state_dict": {**{UNET + name: value for name, value in weights.items()}, "embed": rows}},
               tmp_path / "delta.ckpt")
    concept = load_concept(tmp_path / "delta.ckpt", class_noun="tortoise plushy")
    assert same(dict(concept.weights), dict(weights)) and same(dict(concept.words), {"<new1>": rows[0]})
    assert concept.scheme == PromptScheme(("<new1>",), "tortoise plushy") and concept.contexts == {}
    applied = AppliedConcept(model, concept, base_identity(model, "any"))    # says no base, so any of its shape
    applied.remove()


def test_a_file_of_the_release_is_read(tmp_path):
    """Names without prefix, parameters instead of tensors, and CLIP's whole token table before the new rows."""
    names = ["middle_block.1.transformer_blocks.0.attn2.to_k.weight",
             "middle_block.1.transformer_blocks.0.attn2.to_v.weight"]
    weights = {name: nn.Parameter(torch.randn(4, 8)) for name in names}
    table = torch.zeros(49408 + 3, 8)
    table[49408:] = torch.arange(24.0).view(3, 8)
    torch.save({**weights, "transformer.text_model.embeddings.token_embedding.weight": nn.Parameter(table)},
               tmp_path / "embeddings_gs-520.ckpt")
    concept = load_concept(tmp_path / "embeddings_gs-520.ckpt", ("<a>", "<b>", "<c>"), "cat")
    assert same(dict(concept.weights), {name: value.detach() for name, value in weights.items()})
    assert same(dict(concept.words), dict(zip(("<a>", "<b>", "<c>"), table[49408:], strict=True)))
    unnamed = load_concept(tmp_path / "embeddings_gs-520.ckpt", (), "cat")
    assert list(unnamed.words) == ["<new1>", "<new2>", "<new3>"]
    assert not any(value.requires_grad for value in [*concept.weights.values(), *concept.words.values()])
    loaded = load_concept(concept.save(tmp_path / "ours.safetensors", torch.float32))
    assert same(dict(loaded.words), dict(concept.words)) and loaded.base["hash"] == ""
    with pytest.raises(UserError, match=r"holds 3 new words but 2 were named \(<a> <b>\)"):
        load_concept(tmp_path / "embeddings_gs-520.ckpt", ("<a>", "<b>"), "cat")
    with pytest.raises(UserError, match="does not say its class noun.*--class_noun"):
        load_concept(tmp_path / "embeddings_gs-520.ckpt", ("<a>", "<b>", "<c>"))


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.target, "ran")


def test_a_pickle_that_names_code_is_refused(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"state_dict": {"embed": torch.zeros(1, WIDTH), "other": Payload(marker)}}, tmp_path / "delta.ckpt")
    with pytest.raises(UserError, match="refused.*code that is not tensor data"):
        load_concept(tmp_path / "delta.ckpt", class_noun="cat")
    assert not marker.exists()


def test_files_that_are_no_concepts_are_refused(tmp_path):
    path = save_safetensors(tmp_path / "model.safetensors", {"weight": torch.zeros(1)}, {"format": "pt"})
    with pytest.raises(UserError, match="no concept"):
        load_concept(path)
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="no concept: it has neither"):
        load_concept(tmp_path / "model.ckpt", class_noun="cat")
    (tmp_path / "text.ckpt").write_text("not a checkpoint, but long enough to look at")
    with pytest.raises(UserError, match="text.ckpt' "):
        load_concept(tmp_path / "text.ckpt", class_noun="cat")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(UserError, match="is empty"):
        load_concept(tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        load_concept(tmp_path / "absent.safetensors")


def test_a_truncated_concept_is_refused(model, tmp_path):
    path = make_concept(model).save(tmp_path / "concept.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        load_concept(path)


def test_a_full_disk_leaves_the_earlier_file(model, tmp_path, monkeypatch):
    path = make_concept(model, seed=1).save(tmp_path / "concept.safetensors")
    earlier = path.read_bytes()

    def fill(tensors: dict[str, Tensor], part: Path, metadata: dict[str, str]) -> None:
        Path(part).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", fill)
    with pytest.raises(UserError, match="could not be written.*No space left.*earlier files are intact"):
        make_concept(model, seed=2).save(path)
    assert path.read_bytes() == earlier and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", [
    {"concepts": "{"}, {"concepts": "[" * 100_000}, {"concepts": "7"}, {"concepts": '[{"words": 7}]'},
    {"concepts": '[{"words": ["<a>"], "class_noun": 7}]'}, {"base": "nothing"}, {"step": "many"}, {"info": "{"},
    {"concepts": "[]"}, {"step": "-5"}, {"step": "NaN"}, {"step": "9" * 5000}, {"base": '{"name": "\\u001b[2J"}'},
    {"concepts": '[{"words": ["<new1>", "<new2>"], "class_noun": "\\u001b[31mcat"}]'},
    {"concepts": '[{"words": ["<new1>", "<new2>"], "class_noun": "cat", "prefix": "1"}]'},
    {"concepts": '[{"words": ["<new1>"], "class_noun": "cat"}]'}],
    ids=lambda change: str(change)[:40])
def test_metadata_of_strangers_is_a_sentence(small_run, tmp_path: Path, change: dict[str, str]) -> None:
    metadata = read_metadata(small_run.concept) | change
    path = save_safetensors(tmp_path / "a.safetensors", load_state(small_run.concept), metadata)
    with pytest.raises(UserError, match="concept file '.*a.safetensors'|concept word|control characters"):
        load_concept(path)


def test_further_metadata_of_strangers_is_passed_over(small_run, tmp_path: Path) -> None:
    metadata = read_metadata(small_run.concept)
    concepts = [entry | {"mood": "bright"} for entry in json.loads(metadata["concepts"])]
    more = metadata | {"author": "\x1b[2J", "concepts": json.dumps(concepts)}
    path = save_safetensors(tmp_path / "a.safetensors", load_state(small_run.concept), more)
    assert load_concept(path).schemes == load_concept(small_run.concept).schemes


@pytest.mark.parametrize(("name", "value"), [
    ("words.<new1>", torch.tensor(1.0)), ("words.<new1>", torch.ones(2, 256)), ("words.<new9>", torch.ones(256)),
    ("contexts.<ctx-0-0-0>", torch.ones(256, dtype=torch.int64)),
    ("model.diffusion_model.out.0.weight.u", torch.ones(8, 2)), ("model.diffusion_model.a.v", torch.ones(3))])
def test_tensors_of_strangers_are_a_sentence(small_run, tmp_path: Path, name: str, value: Tensor) -> None:
    state = load_state(small_run.concept) | {name: value}
    path = save_safetensors(tmp_path / "a.safetensors", state, read_metadata(small_run.concept))
    with pytest.raises(UserError, match="concept file '.*a.safetensors' is damaged"):
        load_concept(path)


@pytest.mark.parametrize("embed", [torch.tensor(1.0), torch.ones(256), torch.ones(1, 2, 256), torch.ones(1, 256).int()])
def test_new_words_of_another_shape_are_a_sentence(tmp_path: Path, embed: Tensor) -> None:
    torch.save({"embed": embed}, tmp_path / "delta.bin")
    with pytest.raises(UserError, match="'embed'"):
        load_concept(tmp_path / "delta.bin", class_noun="cat")
