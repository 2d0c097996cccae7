"""Concepts trained apart in one set of K/V weights: constrained least squares (Kumari et al. 2023, section 3.3).

    W* = argmin ||(W - W0) R^T||_F   subject to   W C^T = V

R: text features of captions that shall stay as they are; C: those of every concept's words; V: what each concept's own
weights make of its words. With G = R^T R and what has to change, D = V^T - C W0^T (s, d):

    W* = W0 + D^T (C G^-1 C^T)^-1 C G^-1

All of it in float64: text features leave a normalization, so G's condition is about 1e11, and float32 misses the
constraint by percents. A ridge on G keeps weights from running away along directions that no caption has; the
constraint holds whatever it is.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.checkpoint import named
from ldm.customization.delta import Concept, check_base, words_of
from ldm.customization.ico import PromptScheme
from ldm.customization.low_rank import differences
from ldm.customization.selection import selected
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import UserError

LEAD = "photo of a"     # before the concept in the second of its two target texts; its own tokens are no targets
BATCH = 50              # captions at once
SAME = 1e-6             # relative distance under which two rows of features are one


@dataclass(frozen=True)
class Merged:
    """A merged concept, and how it came out.

    Attributes:
        residual: ||W* C^T - V|| / ||V - W0 C^T||, over all weights: 0 where every concept keeps what it learned.
        change: ||(W* - W0) R^T|| / ||W0 R^T||: how much other texts change.
        moved: ||W* - W0|| / ||W0||.
        targets, rows, rank: of C and of R.
    """

    concept: Concept
    residual: float
    change: float
    moved: float
    targets: int
    rows: int
    rank: int


def merge(model: LatentDiffusion, base: Mapping[str, str], concepts: Sequence[Concept], captions: Sequence[str],
          ridge: float = 1e-2, any_base: bool = False) -> Merged:
    """Merges concepts of one base into one, whose words are all of theirs.

    Args:
        model: that base, without a concept; its identity is `base`.
        captions: whose features shall stay as they are.
        ridge: of G, as a share of its mean diagonal.
        any_base: takes concepts of other bases, with a warning.

    Raises:
        UserError: a concept is of another base, changes other weights than K/V or some of them only, two concepts ask
            for different things at the same words, they are too many, or captions too few.
    """
    if not captions:
        raise UserError("there are no captions; name a file of texts that shall stay as they are, one per line.")
    for concept in concepts:
        check_base(concept, base, any_base)
    renamed = with_own_words(concepts)
    schemes = all_schemes(renamed)
    weights = {name: value.detach().cpu() for name, value in model.model.diffusion_model.named_parameters()}
    with _words_in(model, renamed):
        rows = [target_rows(model, scheme) for scheme in schemes]                       # of each (s_i, D)
        r = feature_rows(model, captions)                                               # (m, D)
    c, wanted = torch.cat(rows), _wanted(renamed, rows, weights)
    owners = [scheme.concept for scheme, part in zip(schemes, rows, strict=True) for _ in part]
    kept = _without_doubles(c, wanted, owners)
    c, wanted = c[kept], {name: value[kept] for name, value in wanted.items()}
    if len(c) > c.shape[1]:
        raise UserError(f"the words of these concepts are {len(c)} tokens in their texts, more than the {c.shape[1]} "
                        "dimensions that weights can keep apart; merge fewer concepts.")
    gram = r.T @ r                                                                      # (D, D): G
    try:
        changes = solve(c, wanted, gram, ridge)
    except torch.linalg.LinAlgError as error:
        raise UserError(f"the captions' {len(r)} tokens, or the concepts' words, leave too much open ({error}); give "
                        "more captions, or a --ridge above 0.") from error
    info = {"merged": [scheme.concept for scheme in schemes], "ridge": ridge}
    merged = Concept(all_words(renamed), {}, {}, schemes, dict(base), max(one.step for one in renamed), info,
                     {name: change.float() for name, change in changes.items()})
    residual = _ratio([c @ changes[name].T - wanted[name] for name in wanted], wanted.values())
    before = {name: weights[name].double() for name in changes}
    # ||W R^T||^2 is the trace of W G W^T, and G is smaller than R.
    change = _share([((value @ gram) * value).sum() for value in changes.values()],
                    [((value @ gram) * value).sum() for value in before.values()])
    moved = _ratio(changes.values(), before.values())
    rank = int(torch.linalg.matrix_rank(gram, hermitian=True))
    return Merged(merged, residual, change, moved, len(c), len(r), rank)


def solve(c: Tensor, wanted: Mapping[str, Tensor], gram: Tensor, ridge: float) -> dict[str, Tensor]:
    """Returns each weight's change (d, D) to the base, the closed form above; all in float64.

    Args:
        c: features (s, D).
        wanted: D (s, d) of each weight.
        gram: G (D, D).
        ridge: of G, as a share of its mean diagonal.
    """
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    spread = torch.cholesky_solve(c.T, torch.linalg.cholesky(gram)).T                   # (s, D): C G^-1
    solved = torch.linalg.solve(c @ spread.T, spread)                                   # (s, D)
    return {name: value.T @ solved for name, value in wanted.items()}


def _wanted(concepts: Sequence[Concept], rows: Sequence[Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns V^T - C W0^T (s, d) of each weight: what concepts' own weights change of their words' keys and values."""
    learned = []
    for concept in concepts:
        learned += [keys_and_values(concept, base)] * len(concept.schemes)
    wanted = {}
    for name in sorted(set().union(*learned)):
        nothing = torch.zeros_like(base[name], dtype=torch.float64)      # of concepts that are words alone
        parts = [part @ changes.get(name, nothing).T for part, changes in zip(rows, learned, strict=True)]
        wanted[name] = torch.cat(parts)
    return wanted


def with_own_words(concepts: Sequence[Concept]) -> list[Concept]:
    """Renames words that an earlier concept has already: to the next <new...> that is free."""
    taken: set[str] = set()
    found = []
    for concept in concepts:
        names = {}
        for word in words_of(concept.schemes):
            free = word
            number = 1
            while free in taken or (free != word and free in concept.words):
                free, number = f"<new{number}>", number + 1
            names[word] = free
            taken.add(free)
        schemes = tuple(replace(scheme, words=tuple(names[word] for word in scheme.words))
                        for scheme in concept.schemes)
        found.append(replace(concept, schemes=schemes,
                             words={names[word]: vector for word, vector in concept.words.items()}))
    return found


def keys_and_values(concept: Concept, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a concept learned, all K/V or none, as differences in float64.

    Raises:
        UserError: it changes other weights too, or some K/V only.
    """
    found = differences(concept, base)
    kv = selected(base, "crossattn-kv")
    others = [name for name in found if name not in kv]
    if others:
        raise UserError(f"'{concept.scheme.concept}' changes more than K/V ({named(others)}), which is not kept apart "
                        "from other concepts; put together those trained with method.train=crossattn-kv.")
    if found and len(found) < len(kv):
        missing = [name for name in kv if name not in found]
        raise UserError(f"'{concept.scheme.concept}' changes {len(found)} of {len(kv)} K/V weights, not "
                        f"{named(missing)}; the file is not whole, get it again.")
    return found


@contextmanager
def _words_in(model: LatentDiffusion, concepts: Sequence[Concept]) -> Iterator[None]:
    """Gives the text encoder the words of all concepts, for a while."""
    encoder = model.cond_stage_model
    try:
        words = all_words(concepts)
        if words:
            encoder.add_words(words).requires_grad_(False)
        yield
    finally:
        encoder.clear_words()


def all_words(concepts: Sequence[Concept]) -> dict[str, Tensor]:
    """Returns the words of all concepts, in their order."""
    words: dict[str, Tensor] = {}
    for concept in concepts:
        words |= concept.words
    return words


def all_schemes(concepts: Sequence[Concept]) -> tuple[PromptScheme, ...]:
    """Returns the schemes of all concepts, numbered anew; contexts are dropped."""
    schemes = [scheme for concept in concepts for scheme in concept.schemes]
    return tuple(replace(scheme, prefix=0, suffix=0, index=index) for index, scheme in enumerate(schemes))


@torch.no_grad()
def feature_rows(model: LatentDiffusion, texts: Sequence[str], skip: int = 0) -> Tensor:
    """Returns the features (m, D) of the texts' tokens, without start and padding, with the first end token.

    Args:
        skip: how many tokens of each text are left out at its beginning.
    """
    encoder, parts = model.cond_stage_model, []
    for first in range(0, len(texts), BATCH):
        ids = encoder.tokenize(texts[first:first + BATCH], strict=True)                  # (B, T)
        ends = (ids == encoder.tokenizer.eos_token_id).int().argmax(dim=1)               # (B,)
        # Causal: what stands behind the longest text changes nothing before it.
        states = encoder.transformer(ids[:, :int(ends.max()) + 1]).last_hidden_state     # (B, t, D)
        parts += [row[1 + skip:end + 1] for row, end in zip(states, ends.tolist(), strict=True)]
    return torch.cat(parts).double().cpu()


def target_rows(model: LatentDiffusion, scheme: PromptScheme) -> Tensor:
    """Returns the features (s, D) of a concept's words, noun and end, alone and behind "photo of a"."""
    skip = len(model.cond_stage_model.content_ids(LEAD))
    return torch.cat([feature_rows(model, [scheme.concept]), feature_rows(model, [f"{LEAD} {scheme.concept}"], skip)])


def _without_doubles(c: Tensor, wanted: Mapping[str, Tensor], owners: Sequence[str]) -> list[int]:
    """Returns the rows to keep: of those that stand there twice and want the same, one.

    Raises:
        UserError: two rows are the same and want different things.
    """
    near = torch.cdist(c, c) < SAME * c.norm(dim=1).mean()                               # (s, s)
    kept: list[int] = []
    for row in range(len(c)):
        twin = next((other for other in kept if near[row, other]), None)
        if twin is None:
            kept.append(row)
        elif any(not torch.allclose(value[row], value[twin], rtol=1e-4, atol=1e-9) for value in wanted.values()):
            raise UserError(f"'{owners[row]}' and '{owners[twin]}' have the same words and learned different things; "
                            "they cannot be merged.")
    return kept


def _ratio(parts: Iterable[Tensor], wholes: Iterable[Tensor]) -> float:
    """Returns ||parts|| / ||wholes||, over all of them together; 0 where there is nothing."""
    return _share([value.square().sum() for value in parts], [value.square().sum() for value in wholes])


def _share(parts: Iterable[Tensor], wholes: Iterable[Tensor]) -> float:
    """Returns the root of what sums of squares are to others."""
    part, whole = sum(map(float, parts)), sum(map(float, wholes))
    return math.sqrt(part / whole) if whole else 0.0
