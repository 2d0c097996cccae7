"""From prompts to token sets: where the concept is named, the auxiliary prompt, which tokens pass DBIM's masks."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    """A batch of prompts with the roles of their tokens; masks are bool over all text positions."""

    prompts: list[str]
    phrases: Tensor    # (B, K, T) the noun phrase of each concept: "V noun", or its auxiliary noun; empty if not there
    content: Tensor    # (B, T) every token of the prompt but start, end and padding

    @property
    def named(self) -> Tensor:
        """Tokens of any noun phrase, (B, T)."""
        return self.phrases.any(dim=1)

    @property
    def mentioned(self) -> Tensor:
        """The phrases that are there, in front, (B, M, T); M is the most that one of the prompts has."""
        there = self.phrases.any(dim=2)                                                     # (B, K)
        front = there.int().argsort(dim=1, descending=True, stable=True)                    # (B, K)
        sorted_phrases = self.phrases[torch.arange(len(front))[:, None], front]             # (B, K, T)
        return sorted_phrases[:, :int(there.sum(dim=1).max())]

    @property
    def others(self) -> Tensor:
        """Content tokens outside the noun phrases, (B, T): the paper's S^a, if these are auxiliary prompts."""
        return self.content & ~self.named


def stack(batches: Sequence[TokenSets]) -> TokenSets:
    """Puts batches of prompts one behind the other."""
    prompts: list[str] = []
    for sets in batches:
        prompts += sets.prompts
    phrases = torch.cat([sets.phrases for sets in batches])                                 # (B, K, T)
    return TokenSets(prompts, phrases, torch.cat([sets.content for sets in batches]))


@dataclass(frozen=True)
class Cut:
    """A prompt, cleaned as CLIP cleans it, cut at every mention of a concept.

    Attributes:
        pieces: the text before, between and behind n mentions, n + 1 strings.
        mentions: which concept stands between two pieces, n numbers.
    """

    pieces: tuple[str, ...]
    mentions: tuple[int, ...]

    @property
    def concepts(self) -> tuple[int, ...]:
        """The concepts that are mentioned, each once, in the order of their first mentions."""
        return tuple(dict.fromkeys(self.mentions))

    def fill(self, nouns: Mapping[int, str], articles: bool = True) -> list[str]:
        """Returns the alternation piece, noun, piece, ... with a noun for each concept; articles are made to fit."""
        alternation: list[str] = []
        for piece, concept in zip(self.pieces[:-1], self.mentions, strict=True):
            alternation += [fit_article(piece, nouns[concept]) if articles else piece, nouns[concept]]
        return [*alternation, self.pieces[-1]]


def find(prompt: str, concepts: Sequence[str]) -> Cut:
    """Cuts a prompt at every mention of one of the concepts, or nowhere; `{}` mentions the first.

    Spaces and letter case within the mention may differ.
    """
    spelled = [clean(concept) for concept in concepts]
    # The longest first: "<new1> cat" must not be found inside "<new1> cat house".
    ways = [re.escape(concept) for concept in sorted(spelled, key=len, reverse=True)]
    parts = re.split(rf"((?<!\w)(?:{'|'.join(ways)})(?!\w)|{re.escape(PLACEHOLDER)})", clean(prompt),
                     flags=re.IGNORECASE)
    mentions = []
    for mention in parts[1::2]:
        mentions.append(0 if mention == PLACEHOLDER else [one.lower() for one in spelled].index(mention.lower()))
    return Cut(tuple(parts[::2]), tuple(mentions))


def cut(prompt: str, concepts: Sequence[str]) -> Cut:
    """Cuts a prompt at every mention of one of the concepts; `{}` mentions the first.

    Raises:
        UserError: the prompt mentions none.
    """
    found = find(prompt, concepts)
    if not found.mentions:
        quoted = " or ".join([PLACEHOLDER, *(f"'{concept}'" for concept in concepts)])
        raise UserError(f"the prompt '{prompt}' does not mention the concept; write {quoted} where it stands.")
    return found


def split_at_concept(prompt: str, concept: str) -> list[str]:
    """Returns the n + 1 pieces of a prompt that mentions one concept n times.

    Raises:
        UserError: it does not mention it.
    """
    return list(cut(prompt, [concept]).pieces)


def cut_at_schemes(prompt: str, schemes: Sequence[PromptScheme]) -> Cut:
    """Cuts a prompt at the concepts of a file; `{}` mentions the file's first.

    Raises:
        UserError: the prompt mentions none.
    """
    return cut(prompt, [scheme.concept for scheme in schemes])


def named_schemes(prompt: str, schemes: Sequence[PromptScheme]) -> list[PromptScheme]:
    """Returns those of a file's concepts that a prompt mentions, in the order of their first mentions.

    Raises:
        UserError: the prompt mentions none.
    """
    return [schemes[index] for index in cut_at_schemes(prompt, schemes).concepts]


def fit_article(before: str, noun: str) -> str:
    """Makes an "a" or "an" at the end of `before` agree with `noun`."""
    def fitting(match: re.Match[str]) -> str:
        word = article(noun)
        return (word.capitalize() if match[1][0].isupper() else word) + match[2]

    return re.sub(r"\b(an?)(\s+)$", fitting, before, flags=re.IGNORECASE)


def join_pieces(pieces: Sequence[str], noun: str) -> list[str]:
    """Puts `noun` between pieces and returns the alternation piece, noun, piece, ...; articles are made to fit."""
    return Cut(tuple(pieces), (0,) * (len(pieces) - 1)).fill({0: noun})


def token_sets(embedder: FrozenCLIPEmbedder, parts: Sequence[str], mentions: Sequence[int] = (0,),
               count: int = 1) -> TokenSets:
    """Marks the tokens of one prompt, given as piece, noun, piece, ..., the pieces cut from a cleaned prompt.

    Args:
        mentions: which of `count` concepts each noun stands for.

    Raises:
        UserError: a noun's tokens run into their neighbours, so that their place is not defined.
    """
    phrases = torch.zeros(count, embedder.max_length, dtype=torch.bool)
    content = torch.zeros(embedder.max_length, dtype=torch.bool)
    prompt, ids = "".join(parts), []
    position, room = 1, embedder.max_length - 1     # position 0 is the start token, the last one the end token
    for index, part in enumerate(parts):
        is_noun = index % 2 == 1
        part_ids = embedder.content_ids(part) if is_noun else embedder.piece_ids(part)
        ids += part_ids
        stop = position + len(part_ids)
        if is_noun:
            phrases[mentions[index // 2], position:min(stop, room)] = True
        content[position:min(stop, room)] = True
        position = stop
    if ids != embedder.content_ids(prompt):
        # Merges across the seam would move every later token.
        raise UserError(f"the words of '{prompt}' run into the concept; put spaces around it.")
    return TokenSets([prompt], phrases[None], content[None])


def check_fits(embedder: FrozenCLIPEmbedder, alternation: Sequence[str], mentions: Sequence[int], what: str) -> None:
    """Refuses a prompt, given as piece, noun, piece, ..., in which a concept's first mention is cut off.

    Raises:
        UserError: not all of its tokens fit the text positions; `what` is what a mention is called.
    """
    room, last = embedder.max_length - 2, 0
    for place, concept in enumerate(mentions):
        before, noun = alternation[2 * place:2 * place + 2]
        last += len(embedder.piece_ids(before)) + len(embedder.content_ids(noun))
        if last > room and concept not in mentions[:place]:
            raise UserError(f"in the prompt '{''.join(alternation)}' {what} '{noun}' is cut off: it ends at token "
                            f"{last} and {room} fit; name it earlier, or shorten the prompt.")


def noun_beside(prompt: str, schemes: Sequence[PromptScheme], concept: int) -> bool:
    """Says whether a prompt says the class noun once more beside a concept, as in "my cat {}"."""
    found, noun = cut_at_schemes(prompt, schemes), re.escape(clean(schemes[concept].class_noun))
    if not noun:
        return False
    before = re.compile(rf"(?<!\w){noun}\s*$", re.IGNORECASE)
    after = re.compile(rf"\s*{noun}(?!\w)", re.IGNORECASE)
    places = [place for place, mention in enumerate(found.mentions) if mention == concept]
    return any(before.search(found.pieces[place]) or after.match(found.pieces[place + 1]) for place in places)


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


def chosen_noun(embedder: FrozenCLIPEmbedder, class_noun: str, pieces: Sequence[str], wanted: str | None,
                others: Sequence[str] = ()) -> str:
    """Returns the auxiliary noun of a prompt cut at the concept: by its context where `wanted` is "auto".

    Args:
        others: nouns that stand for other concepts of the prompt, there or in its second branch.

    Raises:
        UserError: the wanted noun is one of these, or as `auxiliary_noun`.
    """
    taken = " ".join([class_noun, *others])
    if wanted == AUTO:
        return noun_for_context(embedder, taken, pieces)
    if wanted is None:
        return choose_auxiliary_noun(taken, pieces)
    noun = auxiliary_noun(class_noun, pieces, wanted)
    if noun.lower() in [other.lower() for other in others]:
        raise UserError(f"the auxiliary noun '{noun}' stands for another concept of the prompt; give each concept one "
                        "of its own.")
    return noun


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


def concept_prompt(embedder: FrozenCLIPEmbedder, prompt: str, schemes: Sequence[PromptScheme]) -> TokenSets:
    """Marks S^c of each concept, every token of every mention of its "V noun" (Eq 3).

    Raises:
        UserError: the prompt mentions no concept, or so late that it is cut off.
    """
    found = cut_at_schemes(prompt, schemes)
    nouns = {index: scheme.concept for index, scheme in enumerate(schemes)}
    return _marked(embedder, found, found.fill(nouns, articles=False), len(schemes), "the concept")


def auxiliary_prompt(embedder: FrozenCLIPEmbedder, prompt: str, schemes: Sequence[PromptScheme],
                     wanted: str | None = None) -> TokenSets:
    """Makes the auxiliary prompt, every "V noun" replaced; `others` of the result is S^a (Eq 3)."""
    found = cut_at_schemes(prompt, schemes)
    alternation = found.fill(auxiliary_nouns(embedder, found, schemes, wanted))
    return _marked(embedder, found, alternation, len(schemes), "the auxiliary noun")


def _marked(embedder: FrozenCLIPEmbedder, found: Cut, alternation: Sequence[str], count: int, what: str) -> TokenSets:
    check_fits(embedder, alternation, found.mentions, what)
    return token_sets(embedder, alternation, found.mentions, count)


def auxiliary_nouns(embedder: FrozenCLIPEmbedder, found: Cut, schemes: Sequence[PromptScheme],
                    wanted: str | None = None) -> dict[int, str]:
    """Returns the noun that stands for each concept a prompt mentions; no two are the same.

    Args:
        wanted: of one concept its noun; of several their nouns with commas between, in the order of first mentions.

    Raises:
        UserError: there are more nouns than concepts, or one is a class noun, another's noun, or empty.
    """
    given = _nouns_given(wanted, len(found.concepts))
    nouns: dict[int, str] = {}
    for concept, noun in zip(found.concepts, given, strict=True):
        others = [schemes[other].class_noun for other in found.concepts if other != concept]
        others += nouns.values()
        nouns[concept] = chosen_noun(embedder, schemes[concept].class_noun, found.pieces, noun, others)
    return nouns


def _nouns_given(wanted: str | None, count: int) -> list[str | None]:
    """Returns what is wanted for each of `count` concepts; None where nothing is."""
    if count == 1 or wanted in (None, AUTO):
        return [wanted] * count
    nouns = wanted.split(",")
    if len(nouns) > count:
        raise UserError(f"'{wanted}' are {len(nouns)} auxiliary nouns for {count} concepts of a prompt; give one for "
                        "each with --replace_noun, commas between.")
    return nouns + [None] * (count - len(nouns))


def divided_prompt(embedder: FrozenCLIPEmbedder, prompt: str,
                   schemes: Sequence[PromptScheme]) -> tuple[TokenSets, TokenSets]:
    """The paper's ablation without entire prompts: "V noun" alone in one branch, the rest alone in the other.

    Raises:
        UserError: nothing is left of a prompt without the concept, so that the second branch would have no token; or
            it mentions several.
    """
    found = cut_at_schemes(prompt, schemes)
    if len(found.concepts) > 1:
        raise UserError(f"the prompt '{prompt}' mentions {len(found.concepts)} concepts, and this ablation divides one "
                        "from the rest; name one, or leave the ablation out.")
    concept = schemes[found.concepts[0]].concept
    alone = token_sets(embedder, ["", concept, ""], found.concepts, len(schemes))
    return alone, token_sets(embedder, [rest_of_prompt(prompt, concept)], (), len(schemes))


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
