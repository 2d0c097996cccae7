"""Several concept files side by side: the tokens of each go through its own K/V, all others through the base's.

Keys and values are made of each token's feature alone, so nothing has to be merged: with c the text features, s_0 the
share of the base in a token and s_i that of file i, a layer's keys are

    k = W_0 (s_0 c) + W_1 (s_1 c) + ... + W_n (s_n c)

which one wider matrix [W_0 W_1 ... W_n] makes of one wider feature. Every concept is its own for any prompt and any
number of others, exactly (ours; the merge of `merge.py` is Custom Diffusion's).
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.customization import tokens
from ldm.customization.delta import Concept, check_base, check_fit
from ldm.customization.merge import all_schemes, all_words, keys_and_values, with_own_words
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.dbim import BranchLayout


class RoutedConcepts:
    """Concept files put into a model side by side; `remove` gives the model back as it was, to the bit.

    Words that two files share are renamed in the later one. `concept` names the words and schemes of all.

    Args:
        model: the base, of the identity `base`.
        any_base: takes concepts that were made for another base, with a warning.
        padding: whose K/V a prompt's end token and padding go through: "concepts", the mean of those that it mentions,
            or "base".

    Raises:
        UserError: a concept was made for another base, does not fit this model, or changes more than K/V.
    """

    def __init__(self, model: LatentDiffusion, concepts: Sequence[Concept], base: Mapping[str, str],
                 any_base: bool = False, padding: str = "concepts"):
        self.model, self.padding = model, padding
        for concept in concepts:
            check_base(concept, base, any_base)
            check_fit(model, concept)
        files = with_own_words(concepts)
        step = max(file.step for file in files)
        self.concept = Concept(all_words(files), {}, {}, all_schemes(files), dict(base), step)
        self._owners: list[int] = []                    # which file each scheme is of
        for index, file in enumerate(files):
            self._owners += [index] * len(file.schemes)
        wide = wider_weights(model, files)              # may refuse, as words may; so before any change
        if self.concept.words:
            model.cond_stage_model.add_words(self.concept.words).requires_grad_(False)
        self._originals: dict[nn.Linear, nn.Parameter] = {}
        for name, weight in wide.items():
            layer = model.model.diffusion_model.get_submodule(name.removesuffix(".weight"))
            self._originals[layer] = layer.weight
            layer.weight = nn.Parameter(weight, requires_grad=False)

    @torch.no_grad()
    def widen(self, features: Tensor, text: str) -> Tensor:
        """Returns a text's features (T, D) as the wider K/V take them, (T, (1 + files) D)."""
        if not self._originals:         # words alone: no K/V became wider
            return features
        shares = self.shares(text).to(features)                                        # (T, 1 + files)
        return (shares[:, :, None] * features[:, None]).flatten(1)

    def shares(self, text: str) -> Tensor:
        """Returns how much of each token of a text belongs to the base and to each file, (T, 1 + files)."""
        embedder, schemes = self.model.cond_stage_model, self.concept.schemes
        shares = torch.zeros(embedder.max_length, 1 + max(self._owners) + 1)
        shares[:, 0] = 1.0
        if not tokens.find(text, [scheme.concept for scheme in schemes]).mentions:
            return shares
        sets = tokens.concept_prompt(embedder, text, schemes)
        mentioned = []
        for owner, phrase in zip(self._owners, sets.phrases[0], strict=True):
            if phrase.any():
                mentioned.append(owner)
                shares[phrase, 0], shares[phrase, 1 + owner] = 0.0, 1.0
        if self.padding == "concepts":
            first = int(sets.content[0].nonzero().max()) + 1                           # the end token, then padding
            shares[first:, 0] = 0.0
            for owner in mentioned:
                shares[first:, 1 + owner] += 1.0 / len(mentioned)
        return shares

    @contextmanager
    def base_in_auxiliary(self, layout: BranchLayout) -> Iterator[None]:
        """Does nothing: the auxiliary branch names no concept, so that all of it goes through the base's weights."""
        yield

    def remove(self) -> None:
        """Restores the base's weights and vocabulary."""
        for layer, weight in self._originals.items():
            layer.weight = weight
        self.model.cond_stage_model.clear_words()


def wider_weights(model: LatentDiffusion, files: Sequence[Concept]) -> dict[str, Tensor]:
    """Returns [W_0 W_1 ... W_n] (d, (1 + n) D) of each layer that one of the files changes, by names of the U-Net.

    Raises:
        UserError: a file changes more than K/V.
    """
    base = dict(model.model.diffusion_model.named_parameters())
    for name in {name for file in files for name in file.changed}:
        base[name] = _on_cpu(base[name])
    changes = [keys_and_values(file, base) for file in files]
    wide = {}
    for name in sorted(set().union(*changes)):
        own = model.model.diffusion_model.get_parameter(name)
        # In float64, as differences are; half precision would round what was learned away.
        blocks = [base[name].double() + change.get(name, 0.0) for change in [{}, *changes]]
        wide[name] = torch.cat(blocks, dim=1).to(own)
    return wide


def _on_cpu(weight: Tensor) -> Tensor:
    """Returns a weight on the CPU; of a model without weights, zeros that take no memory."""
    if weight.device.type == "meta":
        return torch.zeros(()).expand(weight.shape)
    return weight.detach().cpu()
