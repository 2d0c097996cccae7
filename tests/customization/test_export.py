"""Tests of what other tools are given: a reader of our own, names as a literal table, diffusers itself."""
from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Call, Run, SmallWorld
from modules.test_parity import unet_pair
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.base import empty_model
from ldm.customization.delta import Concept, load_concept
from ldm.customization.export import Exported, as_diff, as_lora, as_processors, embeddings, layer_name, slug_of
from ldm.customization.ico import PromptScheme
from ldm.customization.low_rank import by_error, by_rank, spectra
from ldm.customization.selection import trained_parameters
from ldm.saving import save_safetensors

# SD v1's sixteen cross-attentions as other tools count them.
LAYERS = [*(f"down_blocks_{block}_attentions_{index}" for block, index in itertools.product((0, 1, 2), (0, 1))),
          "mid_block_attentions_0",
          *(f"up_blocks_{block}_attentions_{index}" for block, index in itertools.product((1, 2, 3), (0, 1, 2)))]
NAMES = [f"lora_unet_{layer}_transformer_blocks_0_attn2_to_{part}" for layer in LAYERS for part in "kv"]


def test_the_names_are_those_of_the_tools() -> None:
    unet = empty_model(OmegaConf.load(ROOT / "configs/model/sd-v1.yaml").model).model.diffusion_model
    names = [layer_name(name, 2) for name in trained_parameters(unet, "crossattn-kv")]
    assert len(NAMES) == 32 and sorted(names) == sorted(NAMES)


def concept_for(unet: nn.Module, low: bool = False) -> Concept:
    """Random differences; `low`: of ranks that differ from layer to layer."""
    rng, differences = torch.Generator().manual_seed(0), {}
    for index, (name, value) in enumerate(trained_parameters(unet, "crossattn-kv").items()):
        rows, columns = value.shape
        rank = 1 + index % 3 if low else min(rows, columns)
        differences[name] = 0.3 * (torch.randn(rows, rank, generator=rng) @ torch.randn(rank, columns, generator=rng))
    words = {"<new1>": torch.randn(24, generator=rng), "<new2>": torch.randn(24, generator=rng)}
    schemes = (PromptScheme(("<new1>", "<new2>"), "teddy bear"),)
    return Concept(words, {}, {}, schemes, {"name": "a", "hash": "b"}, 1, {}, differences)


def read_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's formula: alpha / rank, up times down."""
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        layer = key.removesuffix(".lora_down.weight")
        up, down = tensors[f"{layer}.lora_up.weight"].double(), tensors[key].double()
        found[layer] = tensors[f"{layer}.alpha"].item() / len(down) * up @ down
    return found


def written(exported: Exported, path: Path) -> dict[str, Tensor]:
    save_safetensors(path, exported.tensors, exported.metadata)
    return load_file(path)


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """Our U-Net in SD v1's structure, a tenth as wide, and diffusers'."""
    torch.manual_seed(0)
    return unet_pair(32, [1, 2, 4, 4], 2, [4, 2, 1], 8, 8)


def test_a_lora_of_mixed_ranks_says_the_differences_with_one_alpha(pair, tmp_path: Path) -> None:
    concept = concept_for(pair[0], low=True)
    found = spectra(concept, {})
    exported = as_lora(concept, found, by_error(found, 1e-6), 2)
    tensors = written(exported, tmp_path / "lora.safetensors")
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {3.0}
    assert {len(value) for key, value in tensors.items() if key.endswith("lora_down.weight")} == {1, 2, 3}
    read = read_lora(tensors)
    assert sorted(read) == sorted(NAMES) and len(tensors) == 3 * 32
    for name, value in concept.differences.items():
        assert (read[layer_name(name, 2)] - value).norm() < 1e-3 * value.norm()
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        told = file.metadata()
    content = (tmp_path / "lora.safetensors").read_bytes()
    assert told["sshs_model_hash"] == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little"):]).hexdigest()
    assert told["dci_concepts"] == "<new1> <new2> teddy bear" and told["ss_v2"] == "False"


def test_differences_are_kept_to_half_precision(pair, tmp_path: Path) -> None:
    concept = concept_for(pair[0])
    tensors = written(as_diff(concept, concept.differences, 2), tmp_path / "diff.safetensors")
    assert sorted(tensors) == sorted(f"{name}.diff" for name in NAMES)
    for name, value in concept.differences.items():
        assert torch.equal(tensors[f"{layer_name(name, 2)}.diff"], value.half())


def test_a_bias_is_said_apart(pair, tmp_path: Path) -> None:
    """In `.diff_b` of its layer, where A1111 and ComfyUI look for it; it is read from there too."""
    name = "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias"
    exported = as_diff(concept_for(pair[0]), {name: torch.ones(4)}, 2)
    assert list(exported.tensors) == ["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.diff_b"]
    written(exported, tmp_path / "diff.safetensors")
    assert list(load_concept(tmp_path / "diff.safetensors", class_noun="cat").differences) == [name]


@torch.no_grad()
def tuned(unet: nn.Module, concept: Concept) -> nn.Module:
    for name, value in concept.differences.items():
        unet.get_parameter(name).add_(value)
    return unet


@pytest.mark.parametrize("rank", [None, 2, 24], ids=["mixed", "equal", "full"])
@torch.no_grad()
def test_diffusers_draws_the_same_with_the_lora(pair, tmp_path: Path, rank: int | None) -> None:
    """Read and put in by diffusers' own code; what it predicts is what our U-Net with the differences does."""
    pytest.importorskip("peft")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
    ours, theirs = pair
    concept = concept_for(ours, low=rank != 24)
    found = spectra(concept, {})
    ranks = by_rank(found, rank) if rank else by_error(found, 1e-6)
    kept = as_lora(concept, found, ranks, 2)
    written(kept, tmp_path / "lora.safetensors")
    state, alphas, metadata = Loader.lora_state_dict(tmp_path, weight_name="lora.safetensors",
                                                     unet_config=theirs.config, return_lora_metadata=True)
    Loader.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, metadata=metadata)
    differences = read_lora(dict(kept.tensors))
    cut = {name: differences[layer_name(name, 2)].float() for name in concept.differences}
    tuned(ours, Concept({}, {}, {}, concept.schemes, {}, differences=cut))
    x, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24), torch.tensor([10, 900])
    expected = ours(x, t, context)
    assert (theirs(x, t, context).sample - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_diffusers_draws_the_same_with_the_processors(pair) -> None:
    """By the recipe that the script prints."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
    ours, theirs = pair
    concept = concept_for(ours)
    weights = as_processors(concept.differences, dict(ours.named_parameters()), 2)
    processors = dict(theirs.attn_processors)
    for name in [name for name in processors if name.endswith("attn2.processor")]:
        part = {key.removeprefix(name + "."): value for key, value in weights.items() if key.startswith(name)}
        size = part["to_k_custom_diffusion.weight"].shape
        processors[name] = CustomDiffusionAttnProcessor(train_kv=True, train_q_out=False, hidden_size=size[0],
                                                        cross_attention_dim=size[1])
        processors[name].load_state_dict(part)
    theirs.set_attn_processor(processors)
    x, context, t = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24), torch.tensor([10, 900])
    expected = tuned(ours, concept)(x, t, context)
    assert (theirs(x, t, context).sample - expected).abs().max() < 1e-5 * expected.abs().max()


def test_words_are_one_tensor_a_file(tmp_path: Path) -> None:
    concept = Concept({"<b>": torch.ones(4), "<a>": torch.zeros(4)}, {}, {}, (PromptScheme(("<b>", "<a>"), "cat"),), {})
    files = embeddings(concept, "my-cat")
    assert list(files) == ["my-cat-v", "b", "a"]
    assert torch.equal(files["my-cat-v"].tensors["emb_params"], torch.stack([torch.ones(4), torch.zeros(4)]))
    assert files["b"].tensors.keys() == {"<b>"} and torch.equal(files["a"].tensors["<a>"], torch.zeros(4))
    assert slug_of("Tortoise  Plushy!") == "tortoise-plushy" and slug_of("<>") == "concept"


@pytest.mark.parametrize("form", ["lora", "diff", "embedding"])
def test_a_run_of_the_script(small_world: SmallWorld, small_run: Run, tmp_path: Path, call_script: Call,
                             form: str) -> None:
    arguments = ("export", small_run.concept, "--to", form, "--name", "My Thing", "--outdir", tmp_path)
    other = call_script(*arguments)
    assert other.status == 1 and "is none of this model's; name its model's configuration with -b" in other.err
    arguments += ("-b", *small_world.sampling_files)
    done = call_script(*arguments)
    assert done.status == 0, done.err
    main = {"lora": ["my-thing"], "diff": ["my-thing-diff"], "embedding": []}[form]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted([*main, "my-thing-v", "new1", "new2"])
    assert "a my-thing-v" in done.out and "DCI needs scripts/sample.py" in done.out
    concept = load_concept(small_run.concept)
    vectors = load_file(tmp_path / "my-thing-v.safetensors")["emb_params"]
    assert torch.equal(vectors, torch.stack(list(concept.words.values())))
    if form == "lora":
        read = read_lora(load_file(tmp_path / "my-thing.safetensors"))
        left = sum(float((read[layer_name(name, 1)] - value).square().sum()) if layer_name(name, 1) in read
                   else float(value.square().sum()) for name, value in concept.differences.items())
        whole = sum(float(value.square().sum()) for value in concept.differences.values())
        assert (left / whole) ** 0.5 < 0.0501
    again = call_script(*arguments)
    assert again.status == 1 and "exists already; remove it first" in again.err


def test_a_whole_model_is_the_tuned_one(small_world: SmallWorld, small_run: Run, tmp_path: Path,
                                        call_script: Call) -> None:
    model = ["-b", *small_world.sampling_files]
    done = call_script("export", small_run.concept, "--to", "ckpt", "--name", "x", "--outdir", tmp_path, *model)
    assert done.status == 0, done.err
    base, made = load_file(small_world.checkpoint), load_file(tmp_path / "x-model.safetensors")
    concept = load_concept(small_run.concept)
    for key, value in base.items():
        learned = concept.differences.get(key.removeprefix("model.diffusion_model."))
        expected = value.float() if learned is None else value.float() + learned.float()
        assert torch.allclose(made[key].float(), expected, rtol=1e-3, atol=1e-6), key
    assert made["betas"].dtype == torch.float32 and made["model.diffusion_model.out.2.weight"].dtype == torch.float16
