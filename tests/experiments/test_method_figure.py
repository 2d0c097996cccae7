"""Tests of the README's figure: which step's mask it shows, and that its words stay inside it."""
from __future__ import annotations

import torch
from experiments.method_figure import EARLY, SIDE, draw_branches, early_mask
from matplotlib import pyplot as plt


def test_the_mask_is_of_an_early_step_and_of_the_finest_layers() -> None:
    """Of 20 joint steps the one at a share of 0.35, 8th; each of two layers has two heads, whose mean is shown."""
    assert EARLY == 0.35
    record = []
    for step in range(20):
        fine = torch.full((2, 1, 2, SIDE, SIDE), step / 100)
        fine[0, 0, 1] += 0.5                                        # the second head
        record += [("fine", fine), ("coarse", torch.ones(2, 1, 2, 8, 8))]
    mask, told = early_mask(record)
    assert mask.shape == (SIDE, SIDE) and told == "joint step 8 of 20"
    torch.testing.assert_close(torch.from_numpy(mask), torch.full((SIDE, SIDE), 0.07 + 0.25))


def test_the_schematic_holds_its_words() -> None:
    figure = plt.figure(figsize=(12.6, 4.6))
    axes = figure.add_axes((0.005, 0.0, 0.65, 1.0))
    draw_branches(axes, "a V backpack in the desert", "a cat in the desert", "backpack")
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    for text in axes.texts:
        extent = text.get_window_extent(renderer)
        assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1 and extent.y1 <= frame.y1, text.get_text()
    plt.close(figure)
