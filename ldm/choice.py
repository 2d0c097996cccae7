"""Lambda chosen by the program: of an image's strengths, the weakest one that follows the prompt."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ldm.config import ChoiceConfig
from ldm.evaluation.features import LOADERS, Extractor
from ldm.evaluation.metrics import image_alignment, text_alignment
from ldm.evaluation.scoring import plain_text
from ldm.pipeline import Sample

PLAIN = "plain"     # the image without DCI, among the scores of an image


@dataclass(frozen=True)
class Score:
    """What a CLIP says of an image: its cosine to the prompt, and its mean cosine to the references."""

    agreement: float
    likeness: float


def choose(plain: Score, candidates: Mapping[float, Score], margin: float, tolerance: float) -> float:
    """Returns the weakest strength that follows the prompt about as well as the best, and stays like the references.

    Those stay whose likeness is at most `margin` below the plain image's; where none does, the most alike wins. Of
    them the weakest is taken whose agreement is at most `tolerance` below the best one's: what more injection adds is
    little prompt for much concept.
    """
    close = {strength: score for strength, score in candidates.items() if score.likeness >= plain.likeness - margin}
    if not close:
        return max(candidates, key=lambda strength: candidates[strength].likeness)
    best = max(score.agreement for score in close.values())
    return min(strength for strength, score in close.items() if score.agreement >= best - tolerance)


class Chooser:
    """Keeps one DCI image for each prompt and seed.

    Args:
        extractor: a CLIP.
        references: images of the concept.
        margin, tolerance: of likeness and of agreement, as `choose` takes them.
    """

    def __init__(self, extractor: Extractor, references: Sequence[Image.Image], margin: float, tolerance: float):
        self.extractor, self.margin, self.tolerance = extractor, margin, tolerance
        self._references = extractor.images(references)                                # (M, D)

    def score(self, images: Sequence[Image.Image], text: str) -> list[Score]:
        """Measures images of one prompt, whose text is without the words V: they mean nothing to a CLIP."""
        vectors = self.extractor.images(images)                                        # (N, D)
        wanted = self.extractor.texts([text]).expand(len(images), -1)                  # (N, D)
        agreement = text_alignment(vectors, wanted)                                    # (N,)
        likeness = image_alignment(vectors, self._references)                          # (N,)
        pairs = torch.stack([agreement, likeness], dim=1).tolist()
        return [Score(*pair) for pair in pairs]

    def best(self, plain: Sample, candidates: Sequence[Sample]) -> Sample:
        """Returns one of an image's strengths; its settings say what all of them scored."""
        text = plain_text(plain.settings["text"], plain.settings["concept"]["class_noun"])
        first, *scores = self.score([sample.image for sample in (plain, *candidates)], text)
        by_strength = {sample.request.strength: score for sample, score in zip(candidates, scores, strict=True)}
        chosen = choose(first, by_strength, self.margin, self.tolerance)
        told = {PLAIN: asdict(first)}
        for strength, score in by_strength.items():
            told[f"{strength:g}"] = asdict(score)
        record = {"metric": self.extractor.name, "margin": self.margin, "tolerance": self.tolerance, "scores": told}
        winner = next(sample for sample in candidates if sample.request.strength == chosen)
        return replace(winner, settings={**winner.settings, "choice": record})

    def keep(self, samples: Iterable[Sample], strengths: int, plain: bool) -> Iterator[Sample]:
        """Passes on the chosen images, and the plain ones where `plain`.

        Args:
            samples: the plain image of a prompt and seed before its DCI images, as a generator yields them.
            strengths: how many of the latter there are.
        """
        plains: dict[tuple[str, int], Sample] = {}
        found: dict[tuple[str, int], list[Sample]] = {}
        for sample in samples:
            key = sample.request.prompt, sample.request.seed
            if sample.request.strength is None:
                plains[key] = sample
                if plain:
                    yield sample
                continue
            found.setdefault(key, []).append(sample)
            if len(found[key]) == strengths:
                yield self.best(plains.pop(key), found.pop(key))


def load_chooser(settings: ChoiceConfig, references: Sequence[Image.Image], device: torch.device) -> Chooser:
    """Loads the CLIP that chooses.

    Raises:
        UserError: its weights are missing or bad.
    """
    weights = Path(settings.weights) if settings.weights else None
    return Chooser(LOADERS[settings.metric](weights, device), references, settings.margin, settings.tolerance)
