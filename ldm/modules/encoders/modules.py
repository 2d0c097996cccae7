"""FrozenCLIPEmbedder: prompts to text features, with room for new words."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip_text import CLIPTextModel
from ldm.modules.encoders.tokenizer import clean, lower, make_tokenizer
from ldm.util import UserError
from ldm.words import NEW_WORD


class AbstractEncoder(nn.Module):
    """What a conditioning stage offers."""

    def encode(self, *args, **kwargs):
        raise NotImplementedError


class FrozenCLIPEmbedder(AbstractEncoder):
    """CLIP's text transformer and tokenizer; its weights come with the checkpoint, never from a hub.

    Args:
        version: names the tokenizer: "openai/clip-vit-large-patch14" (CLIP's own) or "tiny" (the embedded model's).
        device: where to put the module; None leaves it where it is built, as modules usually do.
        max_length: number of text positions.
        width, layers, heads: sizes of the transformer; the defaults are SD v1's.
    """

    def __init__(self, version: str = "openai/clip-vit-large-patch14", device: str | None = None,
                 max_length: int = 77, width: int = 768, layers: int = 12, heads: int = 12):
        super().__init__()
        self.version, self.max_length = version, max_length
        self.tokenizer = make_tokenizer(self._merges_path(version), max_length)
        self.base_size = len(self.tokenizer)
        self.words: list[str] = []      # the new words, in the order of their rows
        self.transformer = CLIPTextModel(self.base_size, width, layers, heads, max_length)
        self.freeze()
        if device is not None and not self.embedding.weight.is_meta:    # weights from a file bring their own place
            self.to(device)

    @staticmethod
    def _merges_path(version: str) -> Path | None:
        if version == "openai/clip-vit-large-patch14":
            return None
        if version == "tiny":
            return Path(str(resources.files("ldm.tiny") / "vocabulary.txt"))
        raise UserError(f"text encoder version '{version}' is unknown; use 'openai/clip-vit-large-patch14' or 'tiny'.")

    @property
    def embedding(self) -> nn.Module:
        """The token table, `ExtendedEmbedding`."""
        return self.transformer.text_model.embeddings.token_embedding

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def freeze(self) -> None:
        """Stops all gradients to the transformer."""
        self.transformer.eval().requires_grad_(False)

    def add_words(self, words: Mapping[str, Tensor]) -> nn.Parameter:
        """Adds words `<name>` with their vectors (D,) as one trainable block (n, D), and returns the block.

        Raises:
            UserError: a word is not of the form <name>, or is there already.
        """
        for word in words:
            if not NEW_WORD.fullmatch(word):
                raise UserError(f"new word '{word}' must be written in angle brackets without spaces, like <new1>.")
            if word in self.words:
                raise UserError(f"new word '{word}' exists already; choose another name.")
        block = self.embedding.add_rows(torch.stack(list(words.values())))     # (n, D)
        self.tokenizer.add_tokens(list(words), special_tokens=True)     # special: never cut into byte pairs
        self.words += words
        return block

    def clear_words(self) -> None:
        """Forgets all new words."""
        self.tokenizer = make_tokenizer(self._merges_path(self.version), self.max_length)
        self.words = []
        self.embedding.clear_rows()

    def word_vectors(self) -> dict[str, Tensor]:
        """Returns the new words' vectors (D,), detached, on the CPU."""
        rows = [row for block in self.embedding.extra for row in block.detach().cpu()]
        return dict(zip(self.words, rows, strict=True))

    def vectors_of(self, text: str) -> Tensor:
        """Returns the token vectors (n, D) of a text: one per byte-pair token."""
        ids = torch.tensor([self.content_ids(text)], dtype=torch.long, device=self.device)     # (1, n); n may be 0
        return self.embedding(ids)[0].detach()

    def content_ids(self, text: str) -> list[int]:
        """Tokenizes a text, cleaned as CLIP cleans it, without start, end and padding."""
        return self.piece_ids(clean(text))

    def piece_ids(self, piece: str) -> list[int]:
        """Tokenizes a piece of a text that has been cleaned; a piece by itself might be cleaned otherwise."""
        return self.tokenizer(lower(piece), add_special_tokens=False, verbose=False)["input_ids"]

    def tokenize(self, texts: Sequence[str], strict: bool = False) -> Tensor:
        """Returns ids (B, max_length).

        Raises:
            UserError: a text has a `<word>` that is unknown, or (`strict`) does not fit the positions.
        """
        return torch.tensor([self._ids(text, strict) for text in texts], device=self.device)

    def _ids(self, text: str, strict: bool) -> list[int]:
        text = clean(text)
        unknown = [word for word in NEW_WORD.findall(text) if word not in self.words]
        if unknown:
            known = ", ".join(self.words) or "none"
            raise UserError(f"the prompt '{text}' has the unknown word {unknown[0]}; known new words: {known}.")
        ids, room = self.piece_ids(text), self.max_length - 2     # without start and end
        if len(ids) > room:
            cut = self.tokenizer.decode(ids[room:]).strip()
            message = f"the text '{text}' has {len(ids)} tokens and {room} fit; cut: '{cut}'"
            if strict:
                raise UserError(f"{message}; shorten the caption, the prefix or the suffix.")
            warnings.warn(message, stacklevel=4)
        tokenizer = self.tokenizer
        ids = [tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id]
        # The network sees the padding; SD was trained so.
        return ids + [tokenizer.pad_token_id] * (self.max_length - len(ids))

    def forward(self, text: str | Sequence[str], strict: bool = False) -> Tensor:
        """Encodes prompts into features (B, max_length, width)."""
        return self.transformer(self.tokenize([text] if isinstance(text, str) else text, strict)).last_hidden_state

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Same as calling the module (CompVis's name)."""
        return self(text)
