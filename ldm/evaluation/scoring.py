"""All metrics of a set of images: one row of numbers per image, and numbers of the whole set."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import weights_hash
from ldm.customization.ico import PLACEHOLDER
from ldm.customization.tokens import join_pieces
from ldm.evaluation.features import LOADERS, Extractor, MissingWeights, WeightsNotGiven
from ldm.evaluation.judge import Judge, load_judge
from ldm.evaluation.metrics import KID_LEAST, diversity, image_alignment, kid, text_alignment
from ldm.evaluation.small_clip import embedded
from ldm.util import UserError
from ldm.words import NEW_WORD

METRICS = (*LOADERS, "judge", "kid")


def plain_text(prompt: str, class_noun: str) -> str:
    """Returns a prompt without the concept words "V": {} becomes the class noun (paper section 4.1)."""
    filled = "".join(join_pieces(prompt.split(PLACEHOLDER), class_noun))     # with an article that fits the noun
    return " ".join(NEW_WORD.sub(" ", filled).split())


@dataclass(frozen=True, eq=False)
class Scorer:
    """The metrics that could be loaded.

    Attributes:
        extractors: networks for alignment.
        judge: says what images show, or None.
        kid: whether sets are compared by KID.
        skipped: why each missing metric is missing.
    """

    extractors: tuple[Extractor, ...]
    judge: Judge | None
    kid: bool
    skipped: tuple[str, ...]

    @property
    def titles(self) -> dict[str, str]:
        """What each column of `rows` is, in words, in the order of tables."""
        titles: dict[str, str] = {}
        if self.judge:
            titles |= {"judge_edit": "prompt's scene, style, color right", "judge_scene": "scene right",
                       "judge_style": "style right", "judge_colour": "color right", "judge_noun": "class noun right"}
        for extractor in self.extractors:
            if extractor.encode_texts:
                titles[f"{extractor.name}_t"] = f"CLIP-T, {extractor.title}"
        for extractor in self.extractors:
            likeness = "CLIP-I" if extractor.encode_texts else "image similarity"
            titles[f"{extractor.name}_i"] = f"{likeness}, {extractor.title}"
        return titles

    @property
    def record(self) -> dict[str, Any]:
        """What measured, for files of results."""
        record: dict[str, Any] = {extractor.name: dict(extractor.record) for extractor in self.extractors}
        if self.judge:
            record["judge"] = {"weights": weights_hash(self.judge.classifier.state_dict()),
                               "phrases": {kind: dict(labels) for kind, labels in self.judge.phrases.items()},
                               "accuracy": dict(self.judge.accuracy), "held_out": self.judge.held_out}
        return record

    @property
    def editability(self) -> str | None:
        """The column that stands for prompt agreement in trade-offs: of the largest CLIP given, else the judge's.

        The judge and the small CLIP know the small world only; whoever gives the weights of another CLIP looks at more.
        """
        columns = [column for column in self.titles if column.endswith("_t")]
        for column in ("clip_l14_t", "clip_b32_t"):
            if column in columns:
                return column
        if self.judge:
            return "judge_edit"
        return columns[0] if columns else None

    @property
    def fidelity(self) -> str | None:
        """The column that stands for fidelity in trade-offs: of a network nobody here trained, where there is one."""
        columns = [column for column in self.titles if column.endswith("_i")]
        for column in ("dino_i", "efficientnet_i", "clip_l14_i", "clip_b32_i"):
            if column in columns:
                return column
        return columns[0] if columns else None

    def features(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Vectors (N, D) of images by extractor."""
        return {extractor.name: extractor.images(images) for extractor in self.extractors}

    def rows(self, images: Sequence[Image.Image], prompts: Sequence[str | None], class_noun: str,
             references: Mapping[str, Tensor] | None,
             features: Mapping[str, Tensor] | None = None) -> list[dict[str, Any]]:
        """Measures images one by one; what cannot be measured (no prompt, no references) is None.

        Args:
            prompts: with {} or concept words; the words are taken out.
            references: features of the reference images, as `features` gives them.
            features: the images' own, where they are known already.
        """
        features = features or self.features(images)
        # What CLIP and judge are asked; the words V mean nothing to them.
        texts = [None if prompt is None else plain_text(prompt, class_noun) for prompt in prompts]
        spoken = [index for index, text in enumerate(texts) if text is not None]     # images whose prompt is known
        unique: dict[str, int] = {}                         # each text is encoded once
        for index in spoken:
            unique.setdefault(texts[index], len(unique))
        rows: list[dict[str, Any]] = [{} for _ in images]
        for extractor in self.extractors:
            own = features[extractor.name]                                          # (N, D)
            if extractor.encode_texts:
                vectors = extractor.texts(list(unique)) if spoken else own[:0]     # (U, D), a row per text
                vectors = vectors[[unique[texts[index]] for index in spoken]]       # (S, D)
                _fill(rows, f"{extractor.name}_t", spoken, text_alignment(own[spoken], vectors))
            if references:
                # (N,), the mean cosine to the references.
                alignment = image_alignment(own, references[extractor.name])
                _fill(rows, f"{extractor.name}_i", range(len(rows)), alignment)
        if self.judge:
            judged = self.judge.rows(images, [text or "" for text in texts], class_noun)
            for row, scores in zip(rows, judged, strict=True):
                row |= scores
        empty = dict.fromkeys(self.titles)                  # every row has every column, in the order of tables
        return [{**empty, **row} for row in rows]

    def of_set(self, features: Mapping[str, Tensor], real: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """Measures a set of images by its features: diversity, and KID against real ones' where both are enough."""
        values: dict[str, Any] = {}
        for name, own in features.items():
            values[f"diversity_{name}"] = diversity(own)
            if self.kid and real and min(len(own), len(real[name])) >= KID_LEAST:
                values[f"kid_{name}"] = kid(own, real[name])     # Binkowski et al. 2018; of few images it is noise
        return values

    def why_no_kid(self, images: int, real: int) -> str | None:
        """Says why `of_set` gives no KID, or None where it does."""
        if not self.kid or min(images, real) >= KID_LEAST:
            return None
        return f"kid: needs {KID_LEAST} images on each side, here are {images} drawn and {real} to compare with"


def _fill(rows: list[dict[str, Any]], name: str, indices: Sequence[int], values: Tensor) -> None:
    """Writes one column."""
    for index, value in zip(indices, values.tolist(), strict=True):
        rows[index][name] = value


def load_scorer(names: Sequence[str] | None = None, files: Mapping[str, Path] | None = None,
                device: torch.device | str = "cpu") -> Scorer:
    """Loads metrics by name; None takes all there are, leaving out what has no weights here.

    Args:
        names: of METRICS.
        files: weights that do not ship, by metric.

    Raises:
        UserError: a name is unknown, a given file is bad, or a metric asked for by name has no weights.
    """
    files = dict(files or {})
    for name in (*(names or ()), *files):     # before anything is loaded
        if name not in METRICS:
            raise UserError(f"metric '{name}' is unknown; use some of {', '.join(METRICS)}.")
    if "kid" in files:
        raise UserError("metric 'kid' has no weights of its own; leave them out.")
    # What is asked for by name must be there.
    wanted, insist = tuple(names or METRICS), set(names or ()) | set(files)
    extractors, judge, skipped, not_given = [], None, [], []
    for name in METRICS:
        if name == "kid" or name not in {*wanted, *files}:
            continue
        try:
            if name == "judge":
                judge = _load_judge(files.get(name))
                judge.classifier.to(device)
            else:
                extractors.append(LOADERS[name](files.get(name), torch.device(device)))
        except WeightsNotGiven:
            if name in insist:
                raise
            not_given.append(name)
        except MissingWeights as error:
            if name in insist:
                raise
            skipped.append(f"{name}: {str(error).removesuffix('.')}")
    if not_given:
        skipped.append(f"{', '.join(not_given)}: their weights do not ship; give them with "
                       "--metric_weights METRIC=FILE")
    if not extractors and judge is None:
        raise UserError("no metric can be measured here: " + "; ".join(skipped or ["kid needs an image metric"]) + ".")
    return Scorer(tuple(extractors), judge, "kid" in wanted, tuple(skipped))


def read_weights(entries: Sequence[str]) -> dict[str, Path]:
    """Reads METRIC=FILE entries."""
    files = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals:
            raise UserError(f"--metric_weights '{name}' must be written METRIC=FILE, as in dino=dino.safetensors.")
        files[name] = Path(path)
    return files


def _load_judge(path: Path | None) -> Judge:
    """Reads the judge that ships, or another."""
    path = path or embedded("judge.safetensors")
    if not path.is_file():
        raise MissingWeights(f"the judge is not there ('{path}'); train it with scripts/pretrain/judge.py.")
    return load_judge(path)
