"""What is compared: the network's rows, DBIM, whole runs, the autoencoder, a training step, start-up, file size."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from benchmarks.contestants import as_the_release, build_random, theirs
from benchmarks.measure import Contestant, Finding, interleave
from ldm.config import TrainConfig
from ldm.config_files import merge
from ldm.customization.feature_cache import CaptionFeatures, Posteriors
from ldm.customization.finetune import ConceptFinetune
from ldm.customization.ico import make_scheme
from ldm.data.batches import CaptionedImages, TrainingPlan
from ldm.device import FORMATS, compile_network, set_format
from ldm.files import write_atomically
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dual_branch import DualBranch, DualBranchGuidance
from ldm.models.diffusion.guidance import Guidance
from ldm.modules.dbim import BranchLayout, DBIMControl
from ldm.saving import save_safetensors
from ldm.util import instantiate_from_config

LAYOUTS = {torch.channels_last: "channels-last", torch.contiguous_format: "contiguous"}
STEP = 700                     # a time step; which one makes no difference to the time
METHOD = "configs/method/ico.yaml"


@dataclass
class Bench:
    """The models of a comparison and how they are run.

    Attributes:
        theirs: diffusers' U-Net and autoencoder with the same weights; None leaves them out.
        precision: full, bf16 or fp16, of the weights.
        steps, agg_time: of the whole runs.
        compiled: the U-Net is compiled; only the contestants that say so use it.
        images: concept images of the training steps, each with as many of the class.
    """

    model: LatentDiffusion
    node: DictConfig
    theirs: tuple[nn.Module, nn.Module] | None
    device: torch.device
    precision: str
    repeats: int
    steps: int
    agg_time: float
    compiled: bool = False
    images: tuple[int, ...] = (1, 2)

    @property
    def dtype(self) -> torch.dtype:
        """The format of the weights."""
        return FORMATS[self.precision]

    def time(self, row: str, contestants: dict[str, Contestant]) -> list[Finding]:
        """Times contestants without gradients; what is compiled runs compiled only where a name says so."""
        chosen = dict(contestants)
        for name, contestant in contestants.items():
            if self.compiled and "compiled" not in name:
                chosen[name] = replace(contestant, run=_eager(contestant.run))
        with torch.no_grad():
            return interleave(row, chosen, self.repeats, self.device)

    def drawn(self, *shape: int, seed: int = 0) -> Tensor:
        """Draws values on the device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def latents(self, rows: int) -> Tensor:
        """Draws latents of the model's own size."""
        side = self.model.image_size
        return self.drawn(rows, self.model.channels, side, side, seed=rows)

    def text(self, rows: int) -> Tensor:
        """Draws text features."""
        unet = self.model.model.diffusion_model
        return self.drawn(rows, self.model.cond_stage_model.max_length, unet.context_dim, seed=10 + rows)


def make_bench(node: DictConfig, device: torch.device, precision: str, repeats: int, steps: int, agg_time: float,
               ours_only: bool, compiled: bool = False, images: tuple[int, ...] = (1, 2)) -> Bench:
    """Builds the models on the device."""
    model = build_random(node)
    others = None if ours_only else theirs(model, node)
    bench = Bench(model.to(device), node, others, device, precision, repeats, steps, agg_time, compiled, images)
    set_format(bench.model, bench.dtype)
    if compiled:
        compile_network(bench.model)
    for network in others or ():
        network.to(device, bench.dtype)
    return bench


def _eager(run: Callable[[], object]) -> Callable[[], object]:
    """Runs a compiled network as it is written."""
    def eagerly() -> object:
        with torch.compiler.set_stance("force_eager"):
            return run()

    return eagerly


def control_of(bench: Bench, layout: BranchLayout) -> DBIMControl:
    """Makes DBIM's control for one prompt of eight tokens and one of seven."""
    def mask(*positions: int) -> Tensor:
        row = torch.zeros(1, bench.model.cond_stage_model.max_length, dtype=torch.bool, device=bench.device)
        row[0, list(positions)] = True
        return row

    return DBIMControl(mask(2, 3, 4, 5), mask(*range(1, 9)), mask(1, 3, 4, 5, 6, 7), mask(*range(1, 8)),
                       torch.tensor(0.5, device=bench.device), layout, bench.model.image_size**2)


def guided(bench: Bench, joint: bool) -> Callable[[], Tensor]:
    """Returns one guided prediction of a run: 3 rows with DBIM and shared guidance, or 2 rows."""
    model = bench.model
    concept, unconditional, auxiliary = bench.text(3).split(1)
    if joint:
        dual = DualBranch(auxiliary, control_of(bench, BranchLayout.SHARED), bench.agg_time)
        guidance: Guidance = DualBranchGuidance(model, concept, unconditional, 6.0, None, dual)
    else:
        guidance = Guidance(model, concept, unconditional, 6.0)
    return partial(guidance.eps, bench.latents(2 if joint else 1), STEP)       # the auxiliary branch has latents too


def in_format(network: nn.Module, layout: torch.memory_format) -> Callable[[], object]:
    """Returns what puts a network into a memory format before it is timed."""
    return partial(network.to, memory_format=layout)


def unet_rows(bench: Bench) -> Iterator[Finding]:
    """The U-Net's forward pass: guided steps of our sampler, the same rows in full, diffusers in both layouts."""
    best = partial(set_format, bench.model)         # before each run: the contestant before may have changed it
    unet = bench.model.model.diffusion_model
    other = torch.contiguous_format if _channels_last(unet) else torch.channels_last     # what `best` did not take
    for rows in (2, 3):
        x, text, t = bench.latents(rows), bench.text(rows), torch.full((rows,), STEP, device=bench.device)
        contestants = {}
        if bench.theirs:
            x_half, text_half = x.to(bench.dtype), text.to(bench.dtype)
            for layout, name in LAYOUTS.items():
                contestants[f"diffusers, {name}"] = Contestant(
                    partial(bench.theirs[0], x_half, t, text_half), in_format(bench.theirs[0], layout))
        contestants["ours, every row in full"] = Contestant(partial(unet, x, t, text), best)
        contestants[f"ours, every row in full, {LAYOUTS[other]}"] = Contestant(
            partial(unet, x, t, text), in_format(unet, other))
        if rows == 2:
            contestants["ours, as sampled"] = Contestant(guided(bench, False), best)
        yield from bench.time(f"U-Net, {rows} rows", contestants)
    yield from dbim_rows(bench)


def _channels_last(network: nn.Module) -> bool:
    # Kernels of one pixel are the same in both layouts, and tell nothing.
    weight = next(value for value in network.parameters() if value.ndim == 4 and value.shape[-1] > 1)
    return weight.is_contiguous(memory_format=torch.channels_last)


def dbim_rows(bench: Bench) -> Iterator[Finding]:
    """Three rows without DBIM and with it, all rows in full, so that nothing else differs."""
    unet, x, text = bench.model.model.diffusion_model, bench.latents(3), bench.text(3)
    t = torch.full((3,), STEP, device=bench.device)
    control = control_of(bench, BranchLayout.SHARED)
    best = partial(set_format, bench.model)
    yield from bench.time("DBIM in 3 rows", {"without": Contestant(partial(unet, x, t, text), best),
                                             "with": Contestant(partial(unet, x, t, text, control), best)})


def run_rows(bench: Bench) -> Iterator[Finding]:
    """A whole guided run, extrapolated from the times of its two kinds of steps."""
    best, release = partial(set_format, bench.model), partial(as_the_release, bench.device, bench.dtype)
    ways = {"release's cost model": release, "ours": nullcontext}
    if bench.compiled:
        ways["ours, compiled"] = nullcontext
    found = {}
    for rows in (2, 3):
        contestants = {}
        for name, context in ways.items():
            contestants[name] = Contestant(_within(context, guided(bench, rows == 3)), best)
        for finding in bench.time(f"guided step, {rows} rows", contestants):
            found[finding.contestant, rows] = finding.seconds
            yield finding
    # A whole run would take minutes for each contestant, and its steps differ in nothing but their kind.
    joint_steps = round(bench.steps * bench.agg_time)
    for kind, joint in (("plain guidance", 0), (f"DCI shared, agg_time {bench.agg_time:g}", joint_steps)):
        for name in ways:
            seconds = joint * found[name, 3] + (bench.steps - joint) * found[name, 2]
            yield Finding(f"guided run, S={bench.steps}, {kind}", name, seconds, None, bench.repeats,
                          "extrapolated from steps; without decoding")


def _within(context: Callable[[], AbstractContextManager], run: Callable[[], object]) -> Callable[[], object]:
    """Runs within a context."""
    def running() -> object:
        with context():
            return run()

    return running


def vae_rows(bench: Bench) -> Iterator[Finding]:
    """The autoencoder, one image in and out."""
    vae, best = bench.model.first_stage_model, partial(set_format, bench.model)
    z = bench.latents(1)
    side = bench.model.image_size * vae.encoder.reduction
    image = bench.drawn(1, 3, side, side)
    for name, work, value in (("decode", "decode", z), ("encode", "encode", image)):
        contestants = {}
        if bench.theirs:
            theirs_run = partial(getattr(bench.theirs[1], work), value.to(bench.dtype))
            for layout, label in LAYOUTS.items():
                contestants[f"diffusers, {label}"] = Contestant(theirs_run, in_format(bench.theirs[1], layout))
        contestants["ours"] = Contestant(partial(getattr(vae, work), value), best)
        yield from bench.time(f"VAE {name}", contestants)


def training_rows(bench: Bench) -> Iterator[Finding]:
    """A training step of ICO, with its savings switched off one by one, and a step as diffusers' users take it."""
    unet = bench.model.model.diffusion_model
    mixed = None if bench.dtype == torch.float32 else bench.dtype
    module, plan = _finetune(bench, mixed)
    optimizer = module.configure_optimizers()
    kept = Posteriors(plan(1).seen_images(), plan(1).load, lambda image: module._moments(image[None])[0])
    plain_text, fixed_text = module.text, CaptionFeatures(module.text)

    def settle(cache: bool = True, checkpointing: bool = False, light: bool = True) -> None:
        module.posteriors = kept if cache else None
        module.text = fixed_text if cache else plain_text
        if not light:
            unet.float()            # `lighten` casts down only, so an earlier contestant's format would stay
        module.lighten(mixed if light else None, checkpointing)

    for size in bench.images:
        batch = plan(size).batch(0)

        def step(batch=batch) -> None:          # bound here: it runs when the loop has gone on
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, mixed or torch.bfloat16, enabled=mixed is not None):
                loss = module.training_step(batch, 0)
            loss.backward()
            optimizer.step()

        contestants = {}
        if bench.theirs:
            contestants["diffusers' U-Net and VAE, nothing kept"] = Contestant(_their_step(bench, batch, mixed))
        contestants |= {
            "ours": Contestant(_eager(step), settle),
            "ours, checkpointing": Contestant(_eager(step), partial(settle, checkpointing=True)),
            "ours, nothing kept": Contestant(_eager(step), partial(settle, cache=False))}
        if mixed is not None:
            contestants["ours, frozen weights in float32"] = Contestant(_eager(step), partial(settle, light=False))
        yield from interleave(f"training step, {size}+{size} images", contestants, bench.repeats, bench.device)


def _finetune(bench: Bench, mixed: torch.dtype | None) -> tuple[ConceptFinetune, Callable[[int], TrainingPlan]]:
    """Prepares our fine-tuning on random images, and plans of batches of a size."""
    model = bench.model
    model.model.diffusion_model.float()              # trained tensors are float32; `lighten` casts the others
    model.first_stage_model.to(bench.dtype)
    method = merge(TrainConfig, [METHOD], ["method.initial_words=[random,random]"]).method
    scheme = make_scheme(model.cond_stage_model, method, "cat", method.words)
    module = ConceptFinetune(model, method, [scheme], [2], {"name": "random", "hash": ""}, 1e-5, seed=1)
    module.lighten(mixed, False)
    side = model.image_size * model.first_stage_model.encoder.reduction
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    references, others = CaptionedImages(images, module.captions), CaptionedImages(images, ["a cat", "a dog"])
    return module.to(bench.device), lambda size: TrainingPlan(references, others, batch_size=size)


def _their_step(bench: Bench, batch: object, mixed: torch.dtype | None) -> Callable[[], None]:
    """A step in the manner of diffusers' examples: encode, noise, predict, differentiate K/V, AdamW."""
    unet, vae = bench.theirs
    trained = []
    for name, value in unet.named_parameters():
        if ".attn2.to_k" in name or ".attn2.to_v" in name:
            value.data = value.data.float()         # AdamW's small steps would be lost in half precision
            value.requires_grad_(True)
            trained.append(value)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    images = batch.images.to(bench.device).permute(0, 3, 1, 2).contiguous()
    encode_text = bench.model.cond_stage_model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, mixed or torch.bfloat16, enabled=mixed is not None):
            with torch.no_grad():
                z = vae.encode(images.to(vae.dtype)).latent_dist.sample().float() * bench.model.scale_factor
                text = encode_text(batch.captions)
            noise = torch.randn_like(z)
            t = torch.randint(0, bench.model.num_timesteps, (len(z),), device=z.device)
            predicted = unet(bench.model.q_sample(z, t, noise), t, text).sample
            loss = (predicted.float() - noise).square().mean()
        loss.backward()
        optimizer.step()

    return step


START = f"import sys\nsys.path.append({str(Path(__file__).parents[1])!r})" + """
import json, time
start = time.perf_counter()
import torch
from omegaconf import OmegaConf
from ldm.config import BaseConfig
from ldm.base import build_model
imported = time.perf_counter()
from benchmarks.measure import Peak
peak = Peak(torch.device("cpu"))
peak.start()                                                  # the imports' own peak may be higher, and is forgotten
begun = time.perf_counter()
model, _ = build_model(OmegaConf.load(sys.argv[1]), BaseConfig(ckpt=sys.argv[2]))
sum(float(value.sum()) for value in model.parameters())       # every page is read, as a first image would
print(json.dumps([imported - start, time.perf_counter() - begun, peak.stop()]))
"""


def startup_rows(bench: Bench) -> Iterator[Finding]:
    """Import, and loading a checkpoint in either format in a process of its own, read to the last byte."""
    with tempfile.TemporaryDirectory() as folder:
        OmegaConf.save(bench.node, f"{folder}/model.yaml")
        state = {}
        for key, value in bench.model.state_dict().items():
            if ".extra." not in key:            # concept words are no part of a base checkpoint
                state[key] = value.detach().cpu().float().contiguous()
        files = {".safetensors": save_safetensors(f"{folder}/model.safetensors", state),
                 ".ckpt": write_atomically(f"{folder}/model.ckpt", partial(torch.save, {"state_dict": state}))}
        del state                   # or the loading process may find too little memory
        for kind, path in files.items():
            done = subprocess.run([sys.executable, "-c", START, f"{folder}/model.yaml", str(path)], text=True,
                                  stdout=subprocess.PIPE, check=True)
            importing, loading, memory = json.loads(done.stdout.splitlines()[-1])       # as START prints it
            size = path.stat().st_size
            yield Finding("start-up", f"import (before {kind})", importing)
            note = "" if memory is None else f"{memory / size:.2f} x the file"
            yield Finding("start-up", f"load {kind}", loading, memory, note=note)


def file_rows(bench: Bench) -> Iterator[Finding]:
    """The size of a concept file, K/V in float16."""
    with tempfile.TemporaryDirectory() as folder:
        module, _ = _finetune(bench, None)
        size = module.concept().save(Path(folder) / "concept.safetensors").stat().st_size
    bench.model.cond_stage_model.clear_words()          # later rows share the model
    yield replace(Finding("concept file", "ours, fp16", None), memory=size, note="size on disk")


ROWS = {"unet": unet_rows, "run": run_rows, "vae": vae_rows, "startup": startup_rows, "file": file_rows,
        "training": training_rows}


def needed_memory(node: DictConfig, ours_only: bool) -> int:
    """Returns the bytes the comparison needs: every weight in float32, once more for diffusers, and room to work."""
    with torch.device("meta"):
        weights = sum(value.nbytes for value in instantiate_from_config(node).parameters())
    return weights * (2 if ours_only else 3)
