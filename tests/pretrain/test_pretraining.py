"""Tests of how the embedded model is made: the optimizer by hand, resuming after a kill, processes that share work."""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SmallWorld
from torch import Tensor, nn

FOLDER = ROOT / "scripts" / "pretrain"


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules that stages share, imported as scripts import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import common
    import muon
    yield common, muon
    for name in ("common", "muon", "diffusion"):
        sys.modules.pop(name, None)


def arguments(folder: Path, minutes: float = 1.0, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"state": folder, "minutes": minutes, "device": "cpu", "precision": "full", **changes})


def test_orthogonalize_keeps_directions_and_levels_singular_values(stages: tuple[ModuleType, ModuleType]) -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, 6, generator=rng, dtype=torch.float64)).Q for size in (6, 20))
    matrix = left @ torch.diag(torch.tensor([1.0, 0.8, 0.5, 0.3, 0.2, 0.1], dtype=torch.float64)) @ right.T
    for given, found in ((matrix, stages[1].orthogonalize(matrix)), (matrix.T, stages[1].orthogonalize(matrix.T).T)):
        inner = left.T @ found @ right                    # diagonal: the singular vectors are the matrix's own
        assert (inner - inner.diag().diag()).abs().max() < 1e-6 and given.shape in ((6, 20), (20, 6))
        assert 0.65 < inner.diag().min() and inner.diag().max() < 1.25


def test_a_first_step_by_hand(stages: tuple[ModuleType, ModuleType]) -> None:
    start, gradient = torch.full((16, 4, 2, 2), 0.5), torch.zeros(16, 4, 2, 2)
    gradient.view(16, 16)[3, 5] = -7.0                    # of rank one: its only singular value becomes about one
    weight = nn.Parameter(start.clone())
    weight.grad = gradient
    stages[1].Muon([weight], lr=0.1, weight_decay=0.5).step()
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    expected = start * (1 - 0.1 * 0.5)
    expected.view(16, 16)[3, 5] += 0.1 * 0.2 * math.sqrt(16) * x
    assert torch.allclose(weight.detach(), expected, atol=1e-5)


def test_who_is_trained_by_muon(stages: tuple[ModuleType, ModuleType]) -> None:
    module = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    muon, adam = stages[1].optimizers_for(module, 0.1, (0.9, 0.99), 0.0)
    assert [tuple(weight.shape) for weight in muon.param_groups[0]["params"]] == [(32, 32), (16, 3, 3, 3),
                                                                                (16, 16, 3, 3)]
    assert len(adam.param_groups[0]["params"]) == 4       # the embedding and three biases


def test_the_rate_warms_up_holds_and_falls_to_zero(stages: tuple[ModuleType, ModuleType]) -> None:
    rate = stages[0].learning_rate
    assert rate(2.0, 99, 0.0) == 1.0 and rate(2.0, 500, 0.3) == 2.0
    assert rate(2.0, 500, 0.7) == pytest.approx(1.0) and rate(2.0, 500, 1.0) == pytest.approx(0.0)


def test_a_packed_model_to_go_on_from(stages: tuple[ModuleType, ModuleType]) -> None:
    import diffusion
    from omegaconf import OmegaConf

    from ldm.base import build_model
    from ldm.config import BaseConfig
    found = diffusion.denoiser_of(ROOT / "ldm/tiny/model.safetensors")
    model, _ = build_model(OmegaConf.load(ROOT / "configs/model/tiny.yaml").model, BaseConfig())
    expected = model.model.diffusion_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[key]) for key, value in found.items())


def test_boxes_on_latent_pixels(stages: tuple[ModuleType, ModuleType]) -> None:
    import diffusion
    boxes = torch.tensor([[0.25, 0.0, 0.5, 1.0], [0.125, 0.5, 0.8125, 0.625]])
    covered = diffusion.coverage(boxes, 4)                                        # (2, 1, 4, 4)
    assert torch.equal(covered[0, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(4, 4))
    expected = torch.zeros(4, 4)
    expected[2] = torch.tensor([0.5, 1.0, 1.0, 0.25]) * 0.5                       # half of the third row's height
    assert torch.equal(covered[1, 0], expected)
    assert torch.equal(diffusion.coverage(diffusion.mirrored(boxes), 4), covered.flip(3))


def test_latents_are_kept_for_the_encoders_and_pictures_they_came_from(stages: tuple[ModuleType, ModuleType],
                                                                       small_world: SmallWorld, tmp_path: Path) -> None:
    import diffusion
    model, _ = small_world.build()

    def draw(count: int) -> None:
        np.save(tmp_path / "pictures.npy", np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8))
        (tmp_path / "captions.jsonl").write_text('{"caption": "a cat"}\n' * count)

    draw(3)
    first = diffusion.cache(model, tmp_path)
    assert first["latents"].shape[:2] == (3, 2) and len(first["features"]) == 2
    stamp = (tmp_path / "latents.pt").stat().st_mtime_ns
    assert torch.equal(diffusion.cache(model, tmp_path)["latents"], first["latents"])
    assert (tmp_path / "latents.pt").stat().st_mtime_ns == stamp
    draw(4)
    assert len(diffusion.cache(model, tmp_path)["latents"]) == 4
    model.first_stage_model.quant_conv.bias.data += 1.0                           # trained on, as it were
    moved = diffusion.cache(model, tmp_path)["latents"][:3, :, 0] - first["latents"][:, :, 0]
    assert torch.allclose(moved, torch.ones_like(moved), atol=0.01)


class Killed(Exception):
    """Stands for a machine that goes away."""


def trained(common: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, killed_at: int | None = None,
            **changes: object) -> tuple[nn.Module, list[bool]]:
    """Trains a line to fit random points while a clock ticks a quarter of a second at every look."""
    torch.manual_seed(0)
    module, ticks, half = nn.Linear(16, 16), iter(range(1_000_000)), []
    monkeypatch.setattr(common.time, "monotonic", lambda: next(ticks) * 0.25)

    def loss_of(step: int) -> Tensor:
        if step == killed_at:
            raise Killed
        rng = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=rng)
        y = module(x)
        half.append(y.dtype == torch.bfloat16)
        return (y.float() - x.flip(1)).square().mean()

    def sheet(averaged: nn.Module, path: Path) -> str:
        return f"drawn {path.name}"

    return common.train("line", module, loss_of, arguments(folder, **changes), peak_lr=0.01, sheet=sheet,
                        save_seconds=4.0), half


def test_a_killed_training_goes_on_where_it_was_saved(stages: tuple[ModuleType, ModuleType], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    common, folders = stages[0], [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    whole, _ = trained(common, monkeypatch, folders[0])
    with pytest.raises(Killed):
        trained(common, monkeypatch, folders[1], killed_at=90)
    saved = common.load_file(folders[1] / "line.pt")
    assert 0 < saved["step"] <= 90
    broken, _ = trained(common, monkeypatch, folders[1])
    assert f"line: resumed at step {saved['step']}" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))
    ends = [common.load_file(folder / "line.pt") for folder in folders]
    assert ends[0]["step"] == ends[1]["step"] and ends[0]["spent"] == ends[1]["spent"] == 60.0


def test_half_precision_where_there_is_some(stages: tuple[ModuleType, ModuleType], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages[0], "supported_precision", lambda name, device: name)
    assert all(trained(stages[0], monkeypatch, tmp_path, minutes=0.1, precision="bf16")[1])
    (tmp_path / "line.pt").unlink()
    assert not any(trained(stages[0], monkeypatch, tmp_path, minutes=0.1)[1])


def share(rank: int, folder: Path) -> None:
    """One of two processes: half of the gradient, half of the matrices."""
    sys.path.insert(0, str(FOLDER))
    import common
    import muon
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module, optimizer = pair_of_layers(muon)
    for weight, gradient in zip(module.parameters(), gradients(module), strict=True):
        weight.grad = gradient * (0.5 if rank == 0 else 1.5)
    common.average_gradients(module)
    optimizer.step()
    torch.save(module.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def pair_of_layers(muon: ModuleType) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False), nn.Linear(16, 16, bias=False))
    return module, muon.Muon(module.parameters(), 0.1)


def gradients(module: nn.Module) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(weight.shape, generator=rng) for weight in module.parameters()]


def test_two_processes_do_what_one_does(stages: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(share, args=(tmp_path,), nprocs=2)
    module, optimizer = pair_of_layers(stages[1])
    for weight, gradient in zip(module.parameters(), gradients(module), strict=True):
        weight.grad = gradient
    optimizer.step()
    for rank in range(2):
        for name, value in stages[0].load_file(tmp_path / f"{rank}.pt").items():
            assert torch.allclose(value, module.state_dict()[name], atol=1e-6), name
