"""From prompts to token sets: where the concept is named, the auxiliary prompt, which tokens pass DBIM's masks."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.customization.ico import PLACEHOLDER, PromptScheme
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import clean
from ldm.util import UserError
from ldm.words import article

# Common nouns tried in this order; the paper presets such a list without printing it (section 5, "limitations").
AUXILIARY_NOUNS = ("cat", "dog", "man", "car", "toy", "bag")
# Among these the text encoder chooses where it is asked to; all are one token or two in both vocabularies.
CONTEXT_NOUNS = ("cat", "dog", "car", "backpack", "house", "fish", "penguin", "boat", "mug", "teapot", "robot",
                 "snowman", "umbrella", "guitar", "rocket", "rabbit")
AUTO = "auto"


@dataclass(frozen=True, eq=False)
class TokenSets:
    """A batch of prompts with the roles of their tokens; masks are (B, T) bool over all text positions."""

    prompts: list[str]
    named: Tensor      # the noun phrase that was looked for: "V noun", or the auxiliary noun
    content: Tensor    # every token of the prompt but start, end and padding

    @property
    def others(self) -> Tensor:
        """Content tokens outside the noun phrase: the paper's S^a, if these are auxiliary prompts."""
        return self.content & ~self.named


def stack(batches: Sequence[TokenSets]) -> TokenSets:
    """Puts batches of prompts one behind the other."""
    prompts: list[str] = []
    for sets in batches:
        prompts += sets.prompts
    named = torch.cat([sets.named for sets in batches])                                     # (B, T)
    return TokenSets(prompts, named, torch.cat([sets.content for sets in batches]))


def _cut(prompt: str, concept: str) -> list[str]:
    words = re.escape(clean(concept))
    return re.split(rf"(?<!\w)(?:{words})(?!\w)|{re.escape(PLACEHOLDER)}", clean(prompt), flags=re.IGNORECASE)


def _unnamed(prompt: str, concepts: Sequence[str]) -> UserError:
    spelled = " or ".join([PLACEHOLDER, *(f"'{concept}'" for concept in concepts)])
    return UserError(f"the prompt '{prompt}' does not mention the concept; write {spelled} where it stands.")


def split_at_concept(prompt: str, concept: str) -> list[str]:
    """Cuts a prompt, cleaned as CLIP cleans it, at every mention of the concept; n mentions give n + 1 pieces.

    `{}` counts as a mention. Spaces and letter case within the mention may differ.

    Raises:
        UserError: the prompt does not mention the concept.
    """
    pieces = _cut(prompt, concept)     # n mentions give n + 1 pieces
    if len(pieces) == 1:
        raise _unnamed(prompt, [concept])
    return pieces


def named_scheme(prompt: str, schemes: Sequence[PromptScheme]) -> PromptScheme:
    """Returns the first of a concept file's schemes that a prompt mentions; `{}` mentions the file's first.

    Raises:
        UserError: the prompt mentions none.
    """
    for scheme in schemes:
        if len(_cut(prompt, scheme.concept)) > 1:
            return scheme
    raise _unnamed(prompt, [scheme.concept for scheme in schemes])


def fit_article(before: str, noun: str) -> str:
    """Makes an "a" or "an" at the end of `before` agree with `noun`."""
    def fitting(match: re.Match[str]) -> str:
        word = article(noun)
        return (word.capitalize() if match[1][0].isupper() else word) + match[2]

    return re.sub(r"\b(an?)(\s+)$", fitting, before, flags=re.IGNORECASE)


def join_pieces(pieces: Sequence[str], noun: str, articles: bool = True) -> list[str]:
    """Puts `noun` between pieces and returns the alternation piece, noun, piece, ...; articles are made to fit."""
    alternation: list[str] = []
    for piece in pieces[:-1]:
        alternation += [fit_article(piece, noun) if articles else piece, noun]
    return [*alternation, pieces[-1]]


def token_sets(embedder: FrozenCLIPEmbedder, alternations: Sequence[Sequence[str]]) -> TokenSets:
    """Marks the tokens of each prompt, given as piece, noun, piece, ..., the pieces cut from a cleaned prompt.

    Raises:
        UserError: the noun's tokens run into their neighbours, so that their place is not defined.
    """
    named = torch.zeros(len(alternations), embedder.max_length, dtype=torch.bool)
    content = torch.zeros_like(named)
    prompts = []
    for row, parts in enumerate(alternations):
        prompt, ids = "".join(parts), []
        position, room = 1, embedder.max_length - 1     # position 0 is the start token, the last one the end token
        for index, part in enumerate(parts):
            is_noun = index % 2 == 1
            part_ids = embedder.content_ids(part) if is_noun else embedder.piece_ids(part)
            ids += part_ids
            stop = position + len(part_ids)
            named[row, position:min(stop, room)] = is_noun
            content[row, position:min(stop, room)] = True
            position = stop
        if ids != embedder.content_ids(prompt):
            # Merges across the seam would move every later token.
            raise UserError(f"the words of '{prompt}' run into the concept; put spaces around it.")
        prompts.append(prompt)
    return TokenSets(prompts, named, content)


def check_fits(embedder: FrozenCLIPEmbedder, alternation: Sequence[str], what: str) -> None:
    """Refuses a prompt, given as piece, noun, piece, ..., whose first noun phrase, called `what`, is cut off.

    Raises:
        UserError: not all of its tokens fit the text positions.
    """
    room, (before, noun) = embedder.max_length - 2, alternation[:2]
    last = len(embedder.piece_ids(before)) + len(embedder.content_ids(noun))
    if last > room:
        raise UserError(f"in the prompt '{''.join(alternation)}' {what} '{noun}' is cut off: it ends at token {last} "
                        f"and {room} fit; name it earlier, or shorten the prompt.")


def noun_beside(prompt: str, concept: str, class_noun: str) -> bool:
    """Says whether a prompt says the class noun once more beside the concept, as in "my cat {}"."""
    pieces = split_at_concept(prompt, concept)
    noun = re.escape(clean(class_noun))
    if not noun:
        return False
    before = re.compile(rf"(?<!\w){noun}\s*$", re.IGNORECASE)
    after = re.compile(rf"\s*{noun}(?!\w)", re.IGNORECASE)
    return any(map(before.search, pieces[:-1])) or any(map(after.match, pieces[1:]))


def choose_auxiliary_noun(class_noun: str, pieces: Sequence[str]) -> str:
    """Returns the first preset noun that shares no word with the class noun or the rest of the prompt."""
    taken = set(re.findall(r"\w+", f"{class_noun} {' '.join(pieces)}".lower()))
    for noun in AUXILIARY_NOUNS:
        if not taken & set(noun.split()):     # a noun that is in the prompt already would be S^c and S^a at once
            return noun
    raise UserError(f"every preset auxiliary noun ({', '.join(AUXILIARY_NOUNS)}) is in the prompt; give one with "
                    "--replace_noun.")


def auxiliary_noun(class_noun: str, pieces: Sequence[str], wanted: str | None) -> str:
    """Returns the noun that takes the place of "V noun", wanted or chosen.

    Raises:
        UserError: the wanted noun is the class noun, or empty.
    """
    if wanted is None:
        return choose_auxiliary_noun(class_noun, pieces)
    if not wanted.strip():
        raise UserError("the auxiliary noun is empty; give a noun with --replace_noun, or leave the option out.")
    if wanted.lower().split() == class_noun.lower().split():
        raise UserError(f"the auxiliary noun '{wanted}' is the class noun itself; DCI needs another noun "
                        f"(for example '{choose_auxiliary_noun(class_noun, pieces)}').")
    return wanted.strip()


def chosen_noun(embedder: FrozenCLIPEmbedder, class_noun: str, pieces: Sequence[str], wanted: str | None) -> str:
    """Returns the auxiliary noun of a prompt cut at the concept: by its context where `wanted` is "auto"."""
    if wanted == AUTO:
        return noun_for_context(embedder, class_noun, pieces)
    return auxiliary_noun(class_noun, pieces, wanted)


@torch.no_grad()
def noun_for_context(embedder: FrozenCLIPEmbedder, class_noun: str, pieces: Sequence[str]) -> str:
    """Returns the noun of CONTEXT_NOUNS whose caption is nearest to what the prompt says after the concept.

    Nearness is the cosine of the text encoder's states at the end token. The paper chooses by hand a noun that is
    likely in the context (section 4.5).
    """
    taken = set(re.findall(r"\w+", f"{class_noun} {' '.join(pieces)}".lower()))
    nouns = [noun for noun in CONTEXT_NOUNS if noun not in taken]
    context = " ".join(" ".join(pieces[1:]).split()) or pieces[0].strip()
    if not context:
        return choose_auxiliary_noun(class_noun, pieces)
    if embedder.device.type == "meta":      # no weights yet: any noun does to see whether a prompt will do
        return nouns[0]
    texts = [f"a photo of a {noun}" for noun in nouns]
    ids = embedder.tokenize([context, *texts])                                              # (1 + N, T)
    ends = (ids == embedder.tokenizer.eos_token_id).int().argmax(dim=1)                     # (1 + N,)
    states = embedder.transformer(ids).last_hidden_state[torch.arange(len(ids)), ends]      # (1 + N, D)
    return nouns[int(torch.cosine_similarity(states[:1], states[1:]).argmax())]


def concept_prompts(embedder: FrozenCLIPEmbedder, prompts: Sequence[str], concept: str) -> TokenSets:
    """Marks S^c, every token of every mention of "V noun" (Eq 3).

    Raises:
        UserError: a prompt does not mention the concept, or so late that it is cut off.
    """
    alternations = [join_pieces(split_at_concept(prompt, concept), concept, articles=False) for prompt in prompts]
    for alternation in alternations:
        check_fits(embedder, alternation, "the concept")
    return token_sets(embedder, alternations)


def auxiliary_prompts(embedder: FrozenCLIPEmbedder, prompts: Sequence[str], concept: str, class_noun: str,
                      wanted: str | None = None) -> TokenSets:
    """Makes the auxiliary prompts, "V noun" replaced throughout; `others` of the result is S^a (Eq 3)."""
    alternations = []
    for prompt in prompts:
        row = split_at_concept(prompt, concept)
        alternations.append(join_pieces(row, chosen_noun(embedder, class_noun, row, wanted)))
        check_fits(embedder, alternations[-1], "the auxiliary noun")
    return token_sets(embedder, alternations)


def divided_prompts(embedder: FrozenCLIPEmbedder, prompts: Sequence[str],
                    concept: str) -> tuple[TokenSets, TokenSets]:
    """The paper's ablation without entire prompts: "V noun" alone in one branch, the rest alone in the other.

    Raises:
        UserError: nothing is left of a prompt without the concept, so that the second branch would have no token.
    """
    alone = token_sets(embedder, [["", concept, ""]] * len(prompts))
    for prompt in prompts:
        split_at_concept(prompt, concept)       # a prompt without the concept is the first thing to tell
    return alone, token_sets(embedder, [[rest_of_prompt(prompt, concept)] for prompt in prompts])


def rest_of_prompt(prompt: str, concept: str) -> str:
    """Returns a prompt without the concept and its articles.

    Raises:
        UserError: nothing is left.
    """
    article_at_end = re.compile(r"\b(?:an?|the)\s+$", re.IGNORECASE)
    pieces = [article_at_end.sub("", piece) for piece in split_at_concept(prompt, concept)]
    rest = " ".join(" ".join(pieces).split())
    if not rest:
        raise UserError(f"the prompt '{prompt}' says nothing but the concept and cannot be divided; say more in "
                        "it, or leave this ablation out.")
    return rest


def describe_tokens(embedder: FrozenCLIPEmbedder, sets: TokenSets, roles: tuple[str, str]) -> str:
    """Returns a table of each prompt's tokens: position, id, text, role; `roles` name noun phrase and the rest."""
    lines = []
    for row, prompt in enumerate(sets.prompts):
        lines.append(f"'{prompt}'")
        for position, token in enumerate(embedder.content_ids(prompt)[:embedder.max_length - 2], 1):
            text = embedder.tokenizer.convert_ids_to_tokens(token).removesuffix("</w>")
            lines.append(f"  {position:3d}  {token:6d}  {text:<16} {roles[0 if sets.named[row, position] else 1]}")
    return "\n".join(lines)
