"""Tests of training: what moves and at which rate, the loss by hand, resuming, processes, previews."""
from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SmallWorld, run_until
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from ldm.checkpoint import read_metadata
from ldm.config import TrainConfig
from ldm.config_files import merge
from ldm.customization.delta import load_concept
from ldm.customization.finetune import ConceptFinetune
from ldm.customization.ico import make_scheme
from ldm.data.batches import CaptionedImages, TrainingBatch, TrainingPlan
from ldm.data.framing import Framing, load_framed
from ldm.data.listing import list_images
from ldm.modules.attention import SpatialTransformer
from ldm.training.run import Run, fine_tune
from ldm.training.setup import effective_learning_rate
from ldm.util import UserError

TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
UNET = "model.diffusion_model."
KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


def make_module(world: SmallWorld, *overrides: str, files: Sequence[Path] = ()) -> ConceptFinetune:
    """Prepares the small model for two reference photos."""
    config = merge(TrainConfig, [*world.training_files, *files], overrides)
    model, identity = world.build()
    scheme = make_scheme(model.cond_stage_model, config.method, "cat", config.method.words)
    return ConceptFinetune(model, config.method, [scheme], [2], identity, config.method.learning_rate, seed=23)


def make_plan(world: SmallWorld, module: ConceptFinetune, prior_weight: float | None = 1.0,
              batch_size: int = 1) -> TrainingPlan:
    """Plans batches of the small world's photos; `prior_weight` None leaves regularization out."""
    photos, others = (load_framed(list_images(folder)[0], Framing(32))[0] for folder in
                      (world.photos, world.folder / "class"))
    photos, others = CaptionedImages(photos, module.captions), CaptionedImages(others, ["a photo of a cat"] * 3)
    return TrainingPlan(photos, None if prior_weight is None else others, batch_size=batch_size,
                        prior_weight=prior_weight or 0.0, flip=True, seed=3)


def gradients(module: ConceptFinetune, batch: TrainingBatch) -> dict[str, Tensor]:
    """Returns the gradients of all trained tensors."""
    module.zero_grad()
    module.training_step(batch, 0).backward()
    named = {**module.trained, **{f"words.{i}": block for i, block in enumerate(module.word_blocks)},
             **{f"contexts.{i}": block for i, block in enumerate(module.context_blocks)}}
    return {name: parameter.grad.clone() for name, parameter in named.items()}


def take_step(module: ConceptFinetune, optimizer: torch.optim.Optimizer, batch: TrainingBatch) -> None:
    """Does what Lightning does in one optimizer step."""
    optimizer.zero_grad()
    module.training_step(batch, 0).backward()
    module.on_before_optimizer_step(optimizer)
    optimizer.step()


def assert_close(first: Path, second: Path, tolerance: float) -> None:
    """Compares two concept files tensor by tensor; tolerance 0 asks for equal bits, and equal metadata."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    assert tolerance or read_metadata(first) == read_metadata(second)
    for name in one:
        difference = float((one[name] - other[name]).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def tensors_differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(first[name], second[name]) for name in first)


# What moves.

def test_only_words_contexts_and_keys_and_values_change(small_world: SmallWorld) -> None:
    module = make_module(small_world)
    optimizer, plan = module.configure_optimizers(), make_plan(small_world, module)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    for micro_step in range(3):
        take_step(module, optimizer, plan.batch(micro_step))
    after = module.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rows = {name for name in before if ".token_embedding.extra." in name}
    kv = {name for name in before if name.startswith(UNET) and name.endswith(KEYS_AND_VALUES)}
    layers = sum(isinstance(layer, SpatialTransformer) for layer in module.model.modules())
    assert before.keys() == after.keys()
    assert changed == rows | kv
    assert len(kv) == 2 * layers == 20 and len(rows) == 3                   # "V", and the contexts of two photos
    assert torch.equal(before[TABLE], after[TABLE])                         # the vocabulary, bit for bit


@pytest.mark.parametrize(("selection", "suffixes"), [
    ("none", []), ("crossattn", ["to_k.weight", "to_out.0.bias", "to_out.0.weight", "to_q.weight", "to_v.weight"])])
def test_the_method_chooses_what_is_trained(small_world: SmallWorld, selection: str, suffixes: list[str]) -> None:
    module = make_module(small_world, f"method.train={selection}")
    assert sorted({name.split("attn2.")[1] for name in module.trained}) == suffixes
    groups = module.configure_optimizers().param_groups
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


def test_optimizer_groups(small_world: SmallWorld) -> None:
    module = make_module(small_world, "method.weight_decay=0.03")
    kv, words, contexts = module.configure_optimizers().param_groups
    for group, blocks, rate, decay in ((kv, list(module.trained.values()), 1e-3, 0.03),
                                       (words, module.word_blocks, 1e-3, 0.0),
                                       (contexts, module.context_blocks, 1e-2, 0.0)):
        assert [id(parameter) for parameter in group["params"]] == [id(block) for block in blocks]
        assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == decay
    assert [tuple(block.shape) for block in [*words["params"], *contexts["params"]]] == [(2, 32)] * 3


def test_contexts_of_absent_images_stay(small_world: SmallWorld) -> None:
    """Adam's momentum would move them with a zero gradient (the release's bug)."""
    module = make_module(small_world)
    optimizer, plan = module.configure_optimizers(), make_plan(small_world, module)
    batches = {next(iter(batch.concept_images)): batch for batch in (plan.batch(0), plan.batch(1))}
    for present in (0, 1, 1):
        before = [block.detach().clone() for block in module.context_blocks]
        take_step(module, optimizer, batches[present])
        moved = [not torch.equal(old, new) for old, new in zip(before, module.context_blocks, strict=True)]
        assert moved == [present == 0, present == 1]


# The loss.

def test_loss_is_equation_1(small_world: SmallWorld) -> None:
    """|| eps - eps_theta(z_t, t, tau(P)) ||^2; a row's seed gives the posterior's draw, the noise, and t."""
    module = make_module(small_world)
    batch = make_plan(small_world, module, prior_weight=0.25, batch_size=2).batch(4)
    model, errors = module.model, []
    alpha_bar = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64)**2)
    with torch.no_grad():
        for image, caption, seed in zip(batch.images, batch.captions, batch.seeds, strict=True):
            rng = torch.Generator().manual_seed(seed)
            mean, logvar = model.first_stage_model.encode(image.permute(2, 0, 1)[None]).parameters.chunk(2, dim=1)
            z = 0.5 * (mean + (0.5 * logvar).exp() * torch.randn(1, 4, 8, 8, generator=rng))
            noise = torch.randn(1, 4, 8, 8, generator=rng)
            t = torch.randint(0, 1000, (1,), generator=rng)
            z_t = alpha_bar[t.item()]**0.5 * z + (1.0 - alpha_bar[t.item()])**0.5 * noise
            text = model.get_learned_conditioning([caption])
            errors.append(float((model.model.diffusion_model(z_t, t, context=text) - noise).square().mean()))
    assert len(errors) == 4 and len(set(batch.seeds)) == 4
    expected = (errors[0] + errors[1] + 0.25 * errors[2] + 0.25 * errors[3]) / 4
    assert module.training_step(batch, 0).item() == pytest.approx(expected, rel=1e-5)


def test_masked_pixels_do_not_count_in_the_loss(small_world: SmallWorld, monkeypatch) -> None:
    """The half of an error that the mask hides has no effect; the other half counts alone, not diluted."""
    module = make_module(small_world)
    batch = make_plan(small_world, module, prior_weight=None).batch(0)
    error = torch.arange(4.0 * 8 * 8).reshape(1, 4, 8, 8)
    monkeypatch.setattr(module.model, "p_losses", lambda *arguments: error)
    mask = torch.ones(1, 32, 32)
    mask[:, :, 16:] = 0.0
    masked = module.training_step(replace(batch, masks=mask), 0)
    assert masked.item() == pytest.approx(float(error[..., :4].mean()))
    assert module.training_step(batch, 0).item() == pytest.approx(float(error.mean()))


def test_a_reference_weighs_the_same_whatever_stands_beside_it(small_world: SmallWorld, monkeypatch) -> None:
    """Of two concepts one has class images: errors 1, 2 (references), 8 (class), however the step is divided."""
    module = make_module(small_world)
    plan = make_plan(small_world, module, batch_size=2)
    plan.concept, plan.regularization = (replace(plan.concept, groups=[0, 1]),
                                         replace(plan.regularization, groups=[0, 0, 0]))
    parts = {size: TrainingPlan(plan.concept, plan.regularization, batch_size=size, flip=False, seed=3)
             for size in (1, 2)}
    errors = {"a photo of a cat": 8.0, **{caption: 1.0 + image for image, caption in enumerate(module.captions)}}

    def step(rows: TrainingBatch) -> float:
        values = torch.tensor([errors[caption] for caption in rows.captions])
        monkeypatch.setattr(module.model, "p_losses", lambda *given: values[:, None, None, None])
        return module.training_step(rows, 0).item()

    assert step(parts[2].batch(0)) == pytest.approx((1 + 2 + 8) / 4)
    assert sum(step(parts[1].batch(part)) for part in (0, 1)) / 2 == pytest.approx((1 + 2 + 8) / 4)


def test_prior_weight_is_the_share_of_regularization_in_the_gradient(small_world: SmallWorld) -> None:
    module = make_module(small_world)
    alone, none, full, double = (gradients(module, make_plan(small_world, module, weight).batch(0))
                                 for weight in (None, 0.0, 1.0, 2.0))
    for name in alone:                    # with regularization images, the mean is over twice as many rows
        torch.testing.assert_close(none[name], alone[name] / 2, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(double[name] - full[name], full[name] - none[name], rtol=1e-3, atol=1e-6)
    assert tensors_differ(none, full)


def test_no_gradient_flows_through_the_start_token(small_world: SmallWorld) -> None:
    """It is the same in every prompt, so the option must change keys and values and leave the loss alone."""
    detached, attached = make_module(small_world), make_module(small_world, "method.detach_first_token=false")
    batch = make_plan(small_world, detached).batch(0)
    assert detached.training_step(batch, 0).item() == attached.training_step(batch, 0).item()
    assert tensors_differ(gradients(detached, batch), gradients(attached, batch))


# The prompts.

def test_prompts_of_equation_2(small_world: SmallWorld) -> None:
    assert make_module(small_world).captions == ["<ctx-0-0-0> <new1> <new2> cat <ctx-0-0-1>",
                                                 "<ctx-0-1-0> <new1> <new2> cat <ctx-0-1-1>"]


def test_without_contexts_it_is_custom_diffusion(small_world: SmallWorld) -> None:
    module = make_module(small_world, "method.initial_words=[random]",
                         files=[ROOT / "configs" / "method" / "custom_diffusion.yaml"])
    assert module.captions == ["photo of a <new1> cat"] * 2
    assert not module.context_blocks and len(module.configure_optimizers().param_groups) == 2


def test_contexts_and_words_start_as_the_words_named(small_world: SmallWorld) -> None:
    """So the first prompt means what "a ucd ... cat ." means, positions included."""
    module = make_module(small_world, "method.words=[<new1>]")
    embedder = module.model.cond_stage_model
    ids = embedder.content_ids("a cat .")
    assert embedder.content_ids("a") == ids[:1] and embedder.content_ids(".") == ids[-1:]
    table = embedder.embedding.weight
    for block in module.context_blocks:
        assert torch.equal(block.detach(), table[[ids[0], ids[-1]]])
    (rare,) = embedder.content_ids("ucd")
    assert torch.equal(module.word_blocks[0].detach(), table[[rare]])
    row = embedder.tokenize([module.captions[0]])[0]
    features = embedder.transformer(row[None]).last_hidden_state
    row = torch.where(row == embedder.tokenizer.convert_tokens_to_ids("<new1>"), rare, row)
    row[1], row[4] = ids[0], ids[-1]
    assert torch.equal(embedder.transformer(row[None]).last_hidden_state, features)


def test_a_caption_that_does_not_fit_is_refused_before_training(small_world: SmallWorld, tmp_path: Path) -> None:
    config = small_world.train_config(tmp_path, "method.prefix=random", "method.prefix_length=72")
    with pytest.raises(UserError, match="76 tokens and 75 fit"):
        fine_tune(config)
    assert not list(tmp_path.iterdir())


# Whole runs.

def test_what_a_concept_file_holds(small_world: SmallWorld, small_run: Run) -> None:
    tensors, metadata = load_file(small_run.concept), read_metadata(small_run.concept)
    kv = {name for name in tensors if name.startswith(UNET)}
    assert len(kv) == 20 and all(name.removesuffix(".difference").endswith(KEYS_AND_VALUES) for name in kv)
    assert tensors.keys() - kv == {"words.<new1>", "words.<new2>", *(f"contexts.<ctx-0-{image}-{position}>"
                                                                     for image in (0, 1) for position in (0, 1))}
    assert metadata["step"] == "2" and '"name": "small"' in metadata["base"]
    text = "".join(metadata.values())
    assert not any(str(folder) in text for folder in (small_world.folder, small_run.folder.parent, ROOT))


def test_seeds_reproduce(small_world: SmallWorld, small_run: Run, tmp_path: Path) -> None:
    again = fine_tune(small_world.train_config(tmp_path))
    assert_close(again.concept, small_run.concept, 0.0)
    other = fine_tune(small_world.train_config(tmp_path, "trainer.seed=24"))
    assert tensors_differ(load_file(other.concept), load_file(small_run.concept))


def test_previews_leave_training_alone(small_world: SmallWorld, small_run: Run, tmp_path: Path) -> None:
    """In the release, sampling inside training switched ICO off for the rest of the run."""
    run = fine_tune(small_world.train_config(tmp_path, "preview.every=1", "preview.prompts=['a {} in the snow']"))
    previews = sorted((run.folder / "images").glob("preview-*.png"))
    assert [path.name for path in previews] == ["preview-000001.png", "preview-000002.png"]
    assert run.preview == previews[-1]
    ours, theirs = load_file(run.concept), load_file(small_run.concept)
    assert ours.keys() == theirs.keys() and not tensors_differ(ours, theirs)


def test_a_mistake_in_the_preview_comes_to_light_before_training(small_world: SmallWorld, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not mention the concept"):
        fine_tune(small_world.train_config(tmp_path, "preview.prompts=[a dog in the snow]"))
    assert not list(tmp_path.glob("*/checkpoints/*"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_equals_the_whole_one(small_world: SmallWorld, tmp_path: Path, accumulate: int) -> None:
    def config(steps: int) -> DictConfig:
        return small_world.train_config(tmp_path, f"method.steps={steps}", f"method.accumulate={accumulate}")

    whole, stopped = fine_tune(config(4)), fine_tune(config(2))
    log = (stopped.folder / "metrics" / "metrics.csv").read_bytes()
    written = stopped.concept.stat().st_mtime_ns
    resumed = fine_tune(config(4), resume=stopped.folder)
    assert resumed.folder == stopped.folder and resumed.concept.name == "step-000004.safetensors"
    for name in ("step-000003.safetensors", "step-000004.safetensors"):
        assert_close(whole.folder / "checkpoints" / name, resumed.folder / "checkpoints" / name, 0.0)
    assert stopped.concept.stat().st_mtime_ns == written          # earlier results stay, the log among them
    assert (stopped.folder / "metrics" / "metrics.csv").read_bytes() == log


def test_a_run_goes_on_with_the_rates_it_is_given(small_world: SmallWorld, tmp_path: Path) -> None:
    """The optimizer's file holds the old ones; at rate 0 nothing may move."""
    stopped = fine_tune(small_world.train_config(tmp_path))
    config = small_world.train_config(tmp_path, "method.steps=3", "method.learning_rate=0", "method.weight_decay=0.5")
    resumed = fine_tune(config, resume=stopped.folder)
    assert not tensors_differ(load_file(stopped.concept), load_file(resumed.concept))
    state = torch.load(resumed.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]] == [0.5, 0.0, 0.0]


def test_a_resumed_run_may_divide_its_steps_otherwise(small_world: SmallWorld, tmp_path: Path) -> None:
    """As a run out of memory is told to: half the batch, twice as often."""
    def config(*overrides: str) -> DictConfig:
        return small_world.train_config(tmp_path, "method.learning_rate=2e-5", *overrides)

    whole = fine_tune(config("method.batch_size=2", "method.steps=3"))
    stopped = fine_tune(config("method.batch_size=2", "method.steps=1"))
    resumed = fine_tune(config("method.accumulate=2", "method.steps=3"), resume=stopped.folder)
    assert_close(whole.concept, resumed.concept, 1e-6)


def test_accumulated_steps_equal_a_larger_batch(small_world: SmallWorld, tmp_path: Path) -> None:
    parts = fine_tune(small_world.train_config(tmp_path, "method.learning_rate=2e-5", "method.accumulate=2"))
    whole = fine_tune(small_world.train_config(tmp_path, "method.learning_rate=2e-5", "method.batch_size=2"))
    assert_close(parts.concept, whole.concept, 1e-6)


def test_two_processes_equal_one(small_world: SmallWorld, tmp_path: Path) -> None:
    """The one test with several processes: Lightning's DDP on two CPU "devices" of half the batch each.

    A signal the first alone is sent ends both between two steps, with one message.
    """
    logs = tmp_path / "two"
    result = run_until([ROOT / "scripts" / "train.py", "-b", *small_world.training_files, "trainer.devices=2",
                        "method.steps=1000", "method.learning_rate=2e-5", "preview.prompts=[]", "-l", logs],
                       lambda: any(logs.rglob("step-000002.safetensors")), signal.SIGTERM)
    assert result.returncode == 143, result.stderr
    assert result.stdout.count("run folder:") == result.stderr.count("go on with") == 1
    assert "Traceback" not in result.stderr
    (folder,) = logs.iterdir()
    one = fine_tune(small_world.train_config(tmp_path / "one", "method.learning_rate=2e-5", "method.batch_size=2"))
    for name in ("step-000001.safetensors", "step-000002.safetensors"):
        assert_close(folder / "checkpoints" / name, one.folder / "checkpoints" / name, 1e-6)
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert not list(folder.rglob("*.part")) and f"saved at step {step};" in result.stderr


def test_mixed_precision_learns_in_float32(small_world: SmallWorld, small_run: Run, tmp_path: Path) -> None:
    mixed = load_file(fine_tune(small_world.train_config(tmp_path, "trainer.precision=bf16-mixed")).concept)
    full = load_file(small_run.concept)
    assert tensors_differ(mixed, full)
    for name in full:                                             # each of Adam's two steps is 1e-2 at most
        assert mixed[name].dtype == torch.float32 and (mixed[name] - full[name]).abs().max() < 0.05


def test_learning_rate_scaling_is_opt_in_and_printed(small_world: SmallWorld, tmp_path: Path, capsys) -> None:
    settings = ["method.batch_size=2", "method.steps=1"]
    assert effective_learning_rate(small_world.train_config(tmp_path, *settings)) == 1e-3
    config = small_world.train_config(tmp_path, *settings, "method.scale_lr=true")     # x 1 device x (2 + 2) rows
    assert effective_learning_rate(config) == pytest.approx(4e-3)
    run = fine_tune(config)
    assert "effective learning rate: 0.004 for K/V, 0.004 for words, 0.04 for contexts" in capsys.readouterr().out
    state = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    groups = state["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([4e-3, 4e-3, 4e-2])
    assert set(state["state_dict"]) == {*(f"contexts.{i}" for i in range(2)), "words.0",
                                        *(f"trained.{name}" for name in make_module(small_world).trained)}


def test_how_far_each_kind_has_moved_is_told_from_its_values(small_world: SmallWorld, small_run: Run,
                                                             tmp_path: Path) -> None:
    """||now - start|| / ||start||, worked out from the base and a concept file of full precision; a resumed run too."""
    fine_tune(small_world.train_config(tmp_path, "trainer.save_dtype=fp32"))
    path = next(tmp_path.rglob("step-000002.safetensors"))
    concept = load_concept(path)
    module = make_module(small_world)
    assert not concept.weights
    pairs = {"weights": [(value, value.detach() + concept.differences[name]) for name, value in module.trained.items()],
             "words": [(module.word_blocks[0], torch.stack(list(concept.words.values())))]}
    for kind, values in pairs.items():
        start = torch.cat([value.detach().flatten() for value, _ in values])
        now = torch.cat([value.flatten() for _, value in values])
        assert concept.info["moved"][kind] == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-4)
    resumed = fine_tune(small_world.train_config(tmp_path, "method.steps=3"), resume=path.parents[1])
    apart = fine_tune(small_world.train_config(tmp_path / "apart", "method.steps=3"))
    assert load_concept(resumed.concept).info["moved"] == load_concept(apart.concept).info["moved"]


def test_a_rate_of_zero_leaves_the_weights_where_they_are(small_world: SmallWorld, tmp_path: Path) -> None:
    run = fine_tune(small_world.train_config(tmp_path, "method.kv_lr_factor=0"))
    moved = load_concept(run.concept).info["moved"]
    assert moved["weights"] == 0 and moved["words"] > 0.001


def test_resuming_with_other_images_is_refused(small_world: SmallWorld, small_run: Run, tmp_path: Path) -> None:
    folder, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(small_run.folder, folder)
    shutil.copytree(small_world.photos, photos)
    (photos / "1.png").unlink()
    config = small_world.train_config(tmp_path, "method.steps=3", f"concepts.0.images={photos}")
    with pytest.raises(UserError, match=r"trained with the photos 2 \(\w+\), and this is 1 \("):
        fine_tune(config, resume=folder)
    for path in (small_run.folder / "checkpoints").iterdir():
        assert (folder / "checkpoints" / path.name).read_bytes() == path.read_bytes()


def test_two_concepts_train_together(small_world: SmallWorld, tmp_path: Path) -> None:
    """Each has its own words and its own contexts, although both count their photos from 0 (the release's bug)."""
    second = {"name": "other", "images": str(small_world.folder / "class"), "class_noun": "dog",
              "words": ["<new3>"]}
    config = small_world.train_config(tmp_path, "method.steps=1")
    config = merge(TrainConfig, [], extra=OmegaConf.create({**config, "concepts": [config.concepts[0], second]}))
    tensors = load_file(fine_tune(config).concept)
    assert {name for name in tensors if name.startswith("words.")} == {f"words.<new{i}>" for i in (1, 2, 3)}
    assert {name.split("-")[1] + name.split("-")[2] for name in tensors if name.startswith("contexts.")} == \
        {"00", "01", "10", "11", "12"}
