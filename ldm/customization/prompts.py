"""Reads prompts with a concept in mind: what each branch is told, which tokens take part, what must be refused."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.config import DCIConfig
from ldm.customization import tokens
from ldm.customization.ico import PromptScheme
from ldm.customization.tokens import TokenSets
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import UserError

DIVIDED = "no_full_prompt"      # the ablation in which each branch is told its part of the prompt alone


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Reads prompts for a text encoder and its concepts, none or several; DCI is for all that a prompt mentions."""

    embedder: FrozenCLIPEmbedder
    schemes: tuple[PromptScheme, ...] = ()

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Puts the first concept where a prompt says {}; with concepts loaded, every prompt must mention one."""
        if not self.schemes:
            if any("{}" in prompt for prompt in prompts):
                raise UserError("a prompt has {} but no concept is loaded; give one with --delta_ckpt.")
            return list(prompts)
        texts = []
        names = {index: scheme.concept for index, scheme in enumerate(self.schemes)}
        for prompt in prompts:
            texts.append("".join(tokens.cut_at_schemes(prompt, self.schemes).fill(names, articles=False)))
        return texts

    def check(self, prompts: Sequence[str], dci: DCIConfig) -> None:
        """Refuses prompts that cannot be drawn, and warns of one that says its class twice.

        Raises:
            UserError: a prompt has an unknown word, does not mention the concept, or so late that it is cut off.
        """
        texts = self.texts(prompts)     # refuses a prompt without the concept
        if self.schemes:
            for prompt in prompts:
                self._check_concept(prompt)
        self.embedder.tokenize(texts)     # refuses unknown words
        if self.schemes and dci.use:
            for prompt in prompts:
                self.token_sets([prompt], dci)

    def _check_concept(self, prompt: str) -> None:
        tokens.concept_prompt(self.embedder, prompt, self.schemes)
        for index in tokens.cut_at_schemes(prompt, self.schemes).concepts:
            scheme = self.schemes[index]
            if not tokens.noun_beside(prompt, self.schemes, index):
                continue
            warnings.warn(f"the prompt '{prompt}' says '{scheme.class_noun}' beside the concept, which is a "
                          f"'{scheme.concept}' already, so the concept is easily lost; leave the word out",
                          stacklevel=2)

    def token_sets(self, prompts: Sequence[str], dci: DCIConfig) -> tuple[TokenSets, TokenSets]:
        """Returns the prompts of the concept and of the auxiliary branch with their token sets S^c and S^a (Eq 3)."""
        if not self.schemes:
            raise UserError("DCI needs a concept; give one with --delta_ckpt.")
        made: dict[str, tuple[TokenSets, TokenSets]] = {}
        for prompt in prompts:
            if prompt not in made:      # one for many images
                made[prompt] = self._token_sets(prompt, dci)
        concept, auxiliary = zip(*(made[prompt] for prompt in prompts), strict=True)     # one pair a prompt
        return tokens.stack(concept), tokens.stack(auxiliary)

    def _token_sets(self, prompt: str, dci: DCIConfig) -> tuple[TokenSets, TokenSets]:
        if dci.ablation == DIVIDED:
            return tokens.divided_prompt(self.embedder, prompt, self.schemes)
        return (tokens.concept_prompt(self.embedder, prompt, self.schemes),
                tokens.auxiliary_prompt(self.embedder, prompt, self.schemes, dci.replace_noun))

    def auxiliary_noun(self, prompt: str, dci: DCIConfig) -> str | None:
        """Returns the nouns that stand for concepts in a prompt's second branch; None where none does."""
        if dci.ablation == DIVIDED:     # the second branch has no noun then
            return None
        found = tokens.cut_at_schemes(prompt, self.schemes)
        return ", ".join(tokens.auxiliary_nouns(self.embedder, found, self.schemes, dci.replace_noun).values())

    def describe(self, prompts: Sequence[str], dci: DCIConfig) -> str:
        """Returns a table of the tokens of both branches' prompts: position, id, text, role."""
        concept, auxiliary = self.token_sets(prompts, dci)
        return "\n".join([tokens.describe_tokens(self.embedder, concept, ("S^c: concept", "-")),
                          tokens.describe_tokens(self.embedder, auxiliary, ("auxiliary noun", "S^a: context"))])

    def captions(self, prompts: Sequence[str], dci: DCIConfig | None) -> dict[str, tuple[str, str]]:
        """Returns, by prompt, its text and a note of the noun in its second branch, if it has one, for sheets."""
        captions = {}
        for prompt, text in zip(prompts, self.texts(prompts), strict=True):
            noun = self.auxiliary_noun(prompt, dci) if dci else None
            note = f", auxiliary noun: {noun}" if noun else ""
            captions[prompt] = (text, note)
        return captions

    def told(self, prompts: Sequence[str], dci: DCIConfig | None) -> list[dict[str, str]]:
        """Returns what each branch is told of each prompt, for the images' settings; one branch where `dci` is None."""
        if dci is None:
            return [{"text": text} for text in self.texts(prompts)]
        told = []
        concept, auxiliary = self.token_sets(prompts, dci)
        for text, other in zip(concept.prompts, auxiliary.prompts, strict=True):
            told.append({"text": text, "auxiliary_text": other})
        return told
