"""ICO, image-specific contexts around a concept (paper section 3.2): fine-tuning prompts, initial values, rates.

A fixed template gives way to learnable contexts, one set per reference image (Eq 2). The words "V" and the contexts
are rows of the text encoder's vocabulary, so a caption alone says which of them a training step sees.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.config import MethodConfig
from ldm.modules.encoders.tokenizer import clean
from ldm.util import UserError
from ldm.words import NEW_WORD, is_line

RANDOM = "random"     # in place of words: contexts and words that start nowhere in particular
PLACEHOLDER = "{}"  # stands for the concept in templates and prompts


class TextEncoder(Protocol):
    """What ICO asks of a text encoder: SD v1's `FrozenCLIPEmbedder`."""

    tokenizer: Any
    embedding: nn.Module

    def content_ids(self, text: str) -> list[int]:
        """Returns a text's token numbers, without start and end."""
        ...

    def vectors_of(self, text: str) -> Tensor:
        """Returns the vectors (n, D) of a text's tokens."""
        ...


@dataclass(frozen=True)
class PromptScheme:
    """How the prompts of one concept are put together.

    P_i = [I]_i,1..p [T]_1..n [E] [I]_i,p+1..p+s: image-specific contexts around "V" and the class noun.

    Attributes:
        words: the concept contexts "V", n new words such as <new1>; none in a delta that changes the class alone.
        class_noun: E, frozen; may have several tokens. Empty for a concept without one (a style).
        prefix, suffix: p and s, how many contexts stand before and after.
        template: fixed words around the concept in captions; "{}" alone for ICO, "photo of a {}" as a baseline.
        index: number of the concept in a joint run, so that contexts of two concepts never share a name.
    """

    words: tuple[str, ...]
    class_noun: str
    prefix: int = 0
    suffix: int = 0
    template: str = PLACEHOLDER
    index: int = 0

    def __post_init__(self) -> None:
        for text in (*self.words, self.class_noun, self.template):
            if not is_line(text):
                raise UserError(f"'{text[:80]}' is too long or holds control characters, as no word, class noun or "
                                "template does; write it in plain text.")
        for word in self.words:
            if not NEW_WORD.fullmatch(word):
                raise UserError(f"concept word '{word}' must be in angle brackets without spaces, like <new1>.")
        # A word twice would be one row in two places.
        if len(set(self.words)) != len(self.words) or not self.concept:
            raise UserError(f"concept words {list(self.words)} must be at least one and all different.")
        if self.template.count(PLACEHOLDER) != 1:
            raise UserError(f"the caption template '{self.template}' must contain {{}} once, where the concept stands.")

    @property
    def concept(self) -> str:
        """ "V noun", as it stands in prompts: "<new1> <new2> cat"."""
        return " ".join([*self.words, self.class_noun]).strip()

    def context_words(self, image: int) -> list[str]:
        """Names of the image's contexts, prefix first: <ctx-concept-image-position>."""
        return [f"<ctx-{self.index}-{image}-{position}>" for position in range(self.prefix + self.suffix)]

    def caption(self, image: int) -> str:
        """The fine-tuning prompt P_i of a reference image (Eq 2)."""
        contexts = self.context_words(image)
        middle = self.template.replace(PLACEHOLDER, self.concept)     # the manual baseline's "photo of a V noun"
        return " ".join([*contexts[: self.prefix], middle, *contexts[self.prefix:]])


def make_scheme(embedder: TextEncoder, method: MethodConfig, class_noun: str, words: Sequence[str],
                index: int = 0) -> PromptScheme:
    """Builds a concept's prompt scheme: p and s follow from the method's words and lengths.

    Raises:
        UserError: there are no words, or the method contradicts itself about p or s.
    """
    if not words:
        raise UserError("a concept has no words to learn; give at least one with --modifier_token.")
    prefix = context_length(embedder, method.prefix, method.prefix_length, "prefix")
    suffix = context_length(embedder, method.suffix, method.suffix_length, "suffix")
    return PromptScheme(tuple(words), class_noun.strip(), prefix, suffix, method.template, index)


def learning_rate_groups(weights: Sequence[nn.Parameter], words: Sequence[nn.Parameter],
                         contexts: Sequence[nn.Parameter], rate: float, weight_factor: float,
                         context_factor: float, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the optimizer's groups, the empty ones left out.

    The words "V" learn at `rate`; K/V weights `weight_factor` times as fast, 1 in the release; the contexts
    `context_factor` times, 10 in the paper, so that they take up what is particular to an image before the words do.
    Weights alone decay, as in the release.
    """
    groups = [{"params": list(weights), "lr": rate * weight_factor, "weight_decay": weight_decay},
              {"params": list(words), "lr": rate, "weight_decay": 0.0},
              {"params": list(contexts), "lr": rate * context_factor, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def caption_template(caption: str, scheme: PromptScheme) -> str:
    """Turns a reference image's caption into a template: {} where it names the concept or, failing that, its class.

    Raises:
        UserError: it names neither.
    """
    caption = clean(caption)
    if PLACEHOLDER in caption:
        return caption
    # The concept itself first: "a <new1> cat" has both.
    for name in filter(None, (scheme.concept, scheme.class_noun)):
        pattern = re.compile(rf"(?<!\w){re.escape(clean(name))}(?!\w)", re.IGNORECASE)
        template, found = pattern.subn(PLACEHOLDER, caption, count=1)
        if found:
            return template
    raise UserError(f"the caption '{caption}' mentions neither {{}} nor '{scheme.class_noun}', so the concept has no "
                    "place in it; name the class there, or set data.captions to false.")


def context_length(embedder: TextEncoder, words: str, length: int | None, name: str) -> int:
    """Returns how many contexts `words` start: one per byte-pair token, or `length` random ones.

    Raises:
        UserError: random ones are wanted without their number, or words and length contradict each other.
    """
    if words == RANDOM:
        if length is None:
            raise UserError(f"method.{name} is 'random', but method.{name}_length does not say how many; set it.")
        return length
    tokens = len(embedder.content_ids(words))     # a word of two byte pairs starts two contexts
    if length is not None and length != tokens:
        raise UserError(f"method.{name}_length is {length} but method.{name} '{words}' has {tokens} tokens; give one "
                        "of the two, or write 'random' for the words.")
    return tokens


def initial_contexts(embedder: TextEncoder, prefix_words: str, suffix_words: str, scheme: PromptScheme,
                     generator: torch.Generator) -> Tensor:
    """Returns the first vectors (p+s, D) of one image's contexts, from words or at random."""
    prefix = _vectors(embedder, prefix_words, scheme.prefix, generator)     # (p, D) and (s, D)
    suffix = _vectors(embedder, suffix_words, scheme.suffix, generator)
    return torch.cat([prefix, suffix])


def _vectors(embedder: TextEncoder, words: str, count: int, generator: torch.Generator) -> Tensor:
    if words in ("", RANDOM):
        return random_vectors(embedder, count, generator)
    return embedder.vectors_of(words).cpu()


def initial_words(embedder: TextEncoder, count: int, sources: Sequence[str],
                  generator: torch.Generator) -> Tensor:
    """Returns the first vectors (n, D) of the concept words "V".

    Word k starts from `sources[k]`: a token as the vocabulary spells it (rare ones are best; in CLIP's, "dog</w>" is
    the word and "dog" only the beginning of others), a word of one token, or "random"; words past the end of
    `sources` start at random.

    Raises:
        UserError: a source is more than one token.
    """
    vectors = []
    for index in range(count):
        source = sources[index] if index < len(sources) else RANDOM
        if source == RANDOM:
            vectors.append(random_vectors(embedder, 1, generator))
            continue
        token = embedder.tokenizer.get_vocab().get(source)     # as the vocabulary spells it, </w> and all
        ids = [token] if token is not None else embedder.content_ids(source)
        if len(ids) != 1:
            raise UserError(f"method.initial_words: '{source}' is {len(ids)} tokens and must be one; choose another.")
        vectors.append(embedder.embedding.weight[ids].detach().cpu())
    return torch.cat(vectors)


def random_vectors(embedder: TextEncoder, count: int, generator: torch.Generator) -> Tensor:
    """Returns (count, D) normal vectors as large as the vocabulary's on average."""
    table = embedder.embedding.weight.detach()     # the base's tokens alone
    return float(table.std()) * torch.randn(count, table.shape[1], generator=generator)
