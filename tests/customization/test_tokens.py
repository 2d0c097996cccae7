"""Tests of prompts: where the concept is named, what the auxiliary prompt says, what contexts start from."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ldm.customization import tokens
from ldm.customization.ico import (
    PromptScheme,
    context_length,
    initial_contexts,
    initial_words,
    random_vectors,
)
from ldm.customization.tokens import TokenSets, stack
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import UserError

CLIP = "openai/clip-vit-large-patch14"
SIZES = {"tiny": dict(width=64, layers=2, heads=2), CLIP: dict(width=64, layers=1, heads=1)}
PLUSHY, CAT = "<new1> tortoise plushy", "<new1> cat"


@pytest.fixture(scope="module")
def embedders() -> dict[str, FrozenCLIPEmbedder]:
    """Both vocabularies with small transformers; <new1> is known to both."""
    torch.manual_seed(0)
    embedders = {version: FrozenCLIPEmbedder(version, **sizes) for version, sizes in SIZES.items()}
    for embedder in embedders.values():
        embedder.add_words({"<new1>": torch.full((64,), 0.01)})
    return embedders


@pytest.fixture(params=SIZES, ids=["tiny", "clip"])
def embedder(request: pytest.FixtureRequest,
             embedders: dict[str, FrozenCLIPEmbedder]) -> Iterator[FrozenCLIPEmbedder]:
    """An embedder that knows <new1>; words a test adds are forgotten after it."""
    embedder = embedders[request.param]
    yield embedder
    if embedder.words != ["<new1>"]:
        embedder.clear_words()
        embedder.add_words({"<new1>": torch.full((64,), 0.01)})


def of(concept: str, class_noun: str | None = None) -> list[PromptScheme]:
    """Returns the scheme of one concept: what is in brackets are its words."""
    parts = concept.split()
    new = [part for part in parts if part.startswith("<")]
    return [PromptScheme(tuple(new), " ".join(parts[len(new):]) if class_noun is None else class_noun)]


def concept_prompts(embedder: FrozenCLIPEmbedder, prompts: list[str], concept: str) -> TokenSets:
    return stack([tokens.concept_prompt(embedder, prompt, of(concept)) for prompt in prompts])


def auxiliary_prompts(embedder: FrozenCLIPEmbedder, prompts: list[str], concept: str, class_noun: str,
                      wanted: str | None = None) -> TokenSets:
    assert concept.endswith(class_noun)
    return stack([tokens.auxiliary_prompt(embedder, prompt, of(concept), wanted) for prompt in prompts])


def divided_prompts(embedder: FrozenCLIPEmbedder, prompts: list[str], concept: str) -> tuple[TokenSets, TokenSets]:
    pairs = [tokens.divided_prompt(embedder, prompt, of(concept)) for prompt in prompts]
    return stack([alone for alone, _ in pairs]), stack([rest for _, rest in pairs])


@pytest.fixture
def clip(embedders: dict[str, FrozenCLIPEmbedder]) -> FrozenCLIPEmbedder:
    return embedders[CLIP]


def pieces(embedder: FrozenCLIPEmbedder, sets: TokenSets, mask: Tensor, row: int = 0) -> list[str]:
    """Returns the byte-pair tokens at a mask's positions of what the encoder is really given."""
    ids = embedder.tokenize(sets.prompts)[row][mask[row]].tolist()
    return embedder.tokenizer.convert_ids_to_tokens(ids)


def words(embedder: FrozenCLIPEmbedder, sets: TokenSets, mask: Tensor, row: int = 0) -> list[str]:
    """Returns the words at a mask's positions, whatever tokens they fall into."""
    text = "".join(pieces(embedder, sets, mask, row))
    return text.replace("<new1>", "<new1> ").replace("</w>", " ").split()


def content_holds(embedder: FrozenCLIPEmbedder, sets: TokenSets) -> bool:
    """Says whether `content` is just what is neither start, end nor padding."""
    ids, tokenizer = embedder.tokenize(sets.prompts), embedder.tokenizer
    return torch.equal(sets.content, (ids != tokenizer.bos_token_id) & (ids != tokenizer.eos_token_id))


def test_the_papers_example(embedder):
    prompts = ["A <new1> tortoise plushy in times square"]
    concept = concept_prompts(embedder, prompts, PLUSHY)
    auxiliary = auxiliary_prompts(embedder, prompts, PLUSHY, "tortoise plushy")
    assert concept.prompts == prompts and auxiliary.prompts == ["A cat in times square"]
    assert words(embedder, concept, concept.named) == ["<new1>", "tortoise", "plushy"]
    assert words(embedder, auxiliary, auxiliary.named) == ["cat"]
    assert words(embedder, auxiliary, auxiliary.others) == ["a", "in", "times", "square"]
    assert content_holds(embedder, concept) and content_holds(embedder, auxiliary)
    assert concept.named.shape == (1, 77) and concept.named.dtype == torch.bool


def test_the_papers_example_in_clips_tokens(clip):
    """Positions counted by hand: plushy is two tokens, every other word one."""
    prompts = ["A <new1> tortoise plushy in times square"]
    concept = concept_prompts(clip, prompts, PLUSHY)
    auxiliary = auxiliary_prompts(clip, prompts, PLUSHY, "tortoise plushy")
    assert pieces(clip, concept, concept.named) == ["<new1>", "tortoise</w>", "plu", "shy</w>"]
    assert concept.named[0].nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert auxiliary.others[0].nonzero().flatten().tolist() == [1, 3, 4, 5]
    assert concept.content[0].sum() == 8 and auxiliary.content[0].sum() == 5


def test_every_mention_counts(embedder):
    prompts = ["<new1> cat beside {} and a <new1> cat", "on the moon, a {}"]
    concept = concept_prompts(embedder, prompts, CAT)
    auxiliary = auxiliary_prompts(embedder, prompts, CAT, "cat")
    assert concept.prompts == ["<new1> cat beside <new1> cat and a <new1> cat", "on the moon, a <new1> cat"]
    assert auxiliary.prompts == ["dog beside dog and a dog", "on the moon, a dog"]
    assert words(embedder, concept, concept.named, 0) == ["<new1>", "cat"] * 3
    assert words(embedder, concept, concept.named, 1) == ["<new1>", "cat"]
    assert words(embedder, auxiliary, auxiliary.named, 0) == ["dog"] * 3
    assert words(embedder, auxiliary, auxiliary.others, 0) == ["beside", "and", "a"]
    assert "".join(words(embedder, auxiliary, auxiliary.others, 1)) == "onthemoon,a"
    assert content_holds(embedder, concept) and content_holds(embedder, auxiliary)


@pytest.mark.parametrize("mention", ["<new1> tortoise plushy", "<new1>  Tortoise\tPLUSHY", "<NEW1> tortoise plushy",
                                     "<new1>\ntortoise plushy", "{}"])
def test_case_and_spaces_within_a_mention_do_not_matter(embedder, mention):
    sets = concept_prompts(embedder, [f"a {mention} on grass"], "<new1> tortoise Plushy")
    assert sets.prompts == ["a <new1> tortoise Plushy on grass"]
    assert words(embedder, sets, sets.named) == ["<new1>", "tortoise", "plushy"]


@pytest.mark.parametrize("prompt, around", [
    ("(<new1> cat), on grass", "(),ongrass"), ("a photo of '<new1> cat'.", "aphotoof''."),
    ("<new1> cat's bowl", "'sbowl"), ("<new1> cat", ""), ("wow!<new1> cat!", "wow!!")])
def test_punctuation_may_touch_the_concept(embedder, prompt, around):
    sets = concept_prompts(embedder, [prompt], CAT)
    assert words(embedder, sets, sets.named) == ["<new1>", "cat"]
    assert "".join(words(embedder, sets, sets.others)) == around
    assert content_holds(embedder, sets)


@pytest.mark.parametrize("prompt", ["a cat on grass", "a <new1> dog", "<new1>", "<new1> cats", "x<new1> cat", ""])
def test_a_prompt_without_the_concept_is_refused(embedder, prompt):
    for make in (lambda: concept_prompts(embedder, ["a {}", prompt], CAT),
                 lambda: auxiliary_prompts(embedder, ["a {}", prompt], CAT, "cat"),
                 lambda: divided_prompts(embedder, ["a {} on grass", prompt], CAT)):
        with pytest.raises(UserError, match="does not mention the concept"):
            make()


@pytest.mark.parametrize("prompt", ["a {}s on grass", "{}ish things", "{}{}"])
def test_words_that_run_into_the_noun_are_refused(clip, prompt):
    """Joined to their neighbours, letters make other tokens, even if as many: "catcat" is cat + cat</w>."""
    with pytest.raises(UserError, match="run into"):
        auxiliary_prompts(clip, [prompt], "<new1> dog", "dog")


@pytest.mark.parametrize("before, noun, after", [
    ("a ", "apple", "an "), ("An ", "cat", "A "), ("A ", "elephant", "An "), ("of a ", "Umbrella", "of an "),
    ("AN ", "cat", "A "), ("the ", "apple", "the "), ("a big ", "apple", "a big "), ("banana ", "cat", "banana "),
    ("an  ", "cat", "a  "), ("", "apple", ""), ("a", "apple", "a")])
def test_articles_fit_the_noun(before, noun, after):
    assert tokens.fit_article(before, noun) == after


def test_only_the_article_before_the_noun_changes(embedder):
    prompts = ["An <new1> owl on an oak and a <new1> owl in a tree"]
    sets = auxiliary_prompts(embedder, prompts, "<new1> owl", "owl")
    assert sets.prompts == ["A cat on an oak and a cat in a tree"]
    sets = auxiliary_prompts(embedder, ["A <new1> cat in a tree"], CAT, "cat", wanted=" old owl ")
    assert sets.prompts == ["An old owl in a tree"] and words(embedder, sets, sets.named) == ["old", "owl"]


@pytest.mark.parametrize("class_noun, prompt, chosen", [
    ("tortoise plushy", "a {} in the snow", "cat"), ("cat", "a {} in the snow", "dog"),
    ("Persian Cat", "a {}", "dog"), ("teapot", "a CAT, a Dog and a {}", "man"),
    ("toy cat", "a dog, a man, a car and {}", "bag"), ("teapot", "{} among cattle", "cat")])
def test_the_auxiliary_noun_shares_no_word_with_prompt_or_noun(embedder, class_noun, prompt, chosen):
    sets = auxiliary_prompts(embedder, [prompt], f"<new1> {class_noun}", class_noun)
    assert words(embedder, sets, sets.named) == [chosen]


def test_each_prompt_has_its_own_auxiliary_noun(embedder):
    sets = auxiliary_prompts(embedder, ["a {}", "a {} and a cat"], "<new1> teapot", "teapot")
    assert sets.prompts == ["a cat", "a dog and a cat"]


def test_impossible_auxiliary_nouns_are_refused(embedder):
    everything = "a {} with a cat, dog, man, car, toy and bag"
    with pytest.raises(UserError, match="every preset auxiliary noun.*--replace_noun"):
        auxiliary_prompts(embedder, [everything], "<new1> teapot", "teapot")
    assert "a fish with" in auxiliary_prompts(embedder, [everything], "<new1> teapot", "teapot", "fish").prompts[0]
    with pytest.raises(UserError, match="class noun itself.*'dog'"):
        auxiliary_prompts(embedder, ["a {}"], CAT, "cat", " CAT ")
    with pytest.raises(UserError, match="is empty"):
        auxiliary_prompts(embedder, ["a {}"], CAT, "cat", "  ")


@pytest.mark.parametrize("before, between, named", [(10, 80, 2), (73, 80, 2), (10, 62, 3), (10, 61, 4)])
def test_masks_of_a_long_prompt_stay_inside(embedder, before, between, named):
    """75 positions hold content; a second mention behind them, or half of it, is cut as the encoder cuts it."""
    sets = concept_prompts(embedder, ["a " * before + "<new1> cat" + " a" * between + " {}" + " a" * 80], CAT)
    assert sets.named.sum() == named and sets.content.sum() == 75
    assert not sets.content[0, [0, 76]].any() and not (sets.named & ~sets.content).any()
    with pytest.warns(UserWarning, match="75 fit"):
        assert words(embedder, sets, sets.named) == (["<new1>", "cat"] * 2)[:named]
    with pytest.warns(UserWarning, match="75 fit"):
        assert content_holds(embedder, sets)


@pytest.mark.parametrize("before", [74, 75, 90])
def test_a_concept_that_is_cut_off_is_refused(embedder, before):
    """Of 75 tokens the concept's two need the last two places; so does an auxiliary noun of two."""
    prompt = "a " * before + "{}"
    message = f"a <new1> cat' the concept '<new1> cat' is cut off: it ends at token {before + 2} and 75 fit"
    with pytest.raises(UserError, match=message):
        concept_prompts(embedder, ["a {}", prompt], CAT)
    with pytest.raises(UserError, match=f"the auxiliary noun 'old dog' is cut off: it ends at token {before + 2}"):
        auxiliary_prompts(embedder, ["a {}", prompt], CAT, "cat", "old dog")


def test_what_fits_just_so_is_not_refused(embedder):
    assert concept_prompts(embedder, ["a " * 73 + "{}"], CAT).named[0].nonzero().flatten().tolist() == [74, 75]
    assert auxiliary_prompts(embedder, ["a " * 74 + "{}"], CAT, "cat").named[0].nonzero().flatten().tolist() == [75]


@pytest.mark.parametrize("prompt, beside", [
    ("my cat {}", True), ("my CAT  <new1> cat on a mat", True), ("the {} cat", True), ("{} and my cat {}", True),
    ("a {} and a cat", False), ("my cat, a {}", False), ("a bobcat {}", False), ("a {} cattery", False),
    ("a {}", False)])
def test_a_class_noun_beside_the_concept_is_noticed(prompt, beside):
    assert tokens.noun_beside(prompt, of(CAT), 0) == beside
    assert not tokens.noun_beside(prompt, of("<new1>"), 0)


def test_the_concept_is_found_in_what_cleaning_makes_of_a_prompt(embedder):
    """A phone's quotes, HTML's entities and full-width letters, in prompts, in the class noun, in the wanted noun."""
    prompts = ["the man’s “{}” &amp; a &lt;new1&gt; Grandma’s hat", "ｌｏｗ {}"]
    concept = concept_prompts(embedder, prompts, "<new1> grandma’s hat")
    plain = concept_prompts(embedder, ["the man's \"{}\" & a {}", "low {}"], "<new1> grandma's hat")
    assert torch.equal(embedder.tokenize(concept.prompts), embedder.tokenize(plain.prompts))
    assert torch.equal(concept.named, plain.named) and torch.equal(concept.content, plain.content)
    auxiliary = auxiliary_prompts(embedder, prompts, "<new1> grandma’s hat", "grandma’s hat", "grandpa’s hat")
    assert words(embedder, auxiliary, auxiliary.named, 1) == ["grandpa", "'s", "hat"]


def test_new_words_survive_cleaning(embedder):
    """Also those that cleaning would change: full-width letters, curly quotes, capitals, entities."""
    odd = ["<Ａ’>", "<&amp;>", "<Ï1>"]
    embedder.add_words({word: torch.zeros(64) for word in odd})
    assert embedder.content_ids("a’ " + " ".join(odd))[-3:] == [embedder.base_size + index for index in (1, 2, 3)]


PAIR = [PromptScheme(("<new1>",), "cat"), PromptScheme(("<new2>",), "dog", index=1)]


@pytest.fixture
def two_words(embedder: FrozenCLIPEmbedder) -> FrozenCLIPEmbedder:
    """An embedder that knows the words of both concepts."""
    embedder.clear_words()
    embedder.add_words({"<new1>": torch.full((64,), 0.01), "<new2>": torch.full((64,), 0.02)})
    return embedder


def test_several_concepts_have_token_sets_and_nouns_of_their_own(two_words):
    prompt = "a <new2> dog beside {} and the <NEW2>  Dog"
    concept = tokens.concept_prompt(two_words, prompt, PAIR)
    auxiliary = tokens.auxiliary_prompt(two_words, prompt, PAIR)
    assert concept.prompts == ["a <new2> dog beside <new1> cat and the <new2> dog"]
    assert auxiliary.prompts == ["a man beside car and the man"]      # neither cat nor dog, and no two the same
    assert concept.phrases.shape == auxiliary.phrases.shape == (1, 2, two_words.max_length)
    for sets, first, second in ((concept, "<new1> cat", "<new2> dog <new2> dog"), (auxiliary, "car", "man man")):
        found = [two_words.tokenizer.decode(two_words.tokenize(sets.prompts)[0][mask]) for mask in sets.phrases[0]]
        assert ["".join(text.split()) for text in found] == ["".join(first.split()), "".join(second.split())]
    assert "".join(words(two_words, auxiliary, auxiliary.others)) == "abesideandthe"


def test_a_prompt_that_names_one_of_two_concepts_has_an_empty_set_for_the_other(two_words):
    sets = tokens.concept_prompt(two_words, "a <new2> dog on grass", PAIR)
    assert not sets.phrases[0, 0].any() and int(sets.phrases[0, 1].sum()) == len(two_words.content_ids("<new2> dog"))
    assert tokens.auxiliary_prompt(two_words, "a <new2> dog on grass", PAIR).prompts == ["a cat on grass"]
    assert torch.equal(sets.mentioned, sets.phrases[:, 1:])           # what is not there costs nothing
    both = stack([sets, tokens.concept_prompt(two_words, "a {} beside a <new2> dog", PAIR)])
    assert both.mentioned.any(dim=2).tolist() == [[True, False], [True, True]]
    assert torch.equal(both.mentioned[0, 0], sets.phrases[0, 1]) and torch.equal(both.mentioned[1], both.phrases[1])
    assert tokens.named_schemes("a <new2> dog on grass", PAIR) == [PAIR[1]]


@pytest.mark.parametrize(("wanted", "prompt"), [("toy,bag", "a toy beside a bag"), ("toy", "a toy beside a man"),
                                                (" old toy , bag", "an old toy beside a bag")])
def test_nouns_are_wanted_in_the_order_of_mentions(two_words, wanted, prompt):
    assert tokens.auxiliary_prompt(two_words, "a {} beside a <new2> dog", PAIR, wanted).prompts == [prompt]


def test_bad_nouns_for_several_concepts_are_refused(two_words):
    for wanted, message in (("toy,bag,car", "'toy,bag,car' are 3 auxiliary nouns for 2 concepts"),
                            ("toy,dog", "the auxiliary noun 'dog' is the class noun itself"),
                            ("dog,toy", "'dog' stands for another concept of the prompt"),
                            ("toy,Toy", "'Toy' stands for another concept of the prompt"),
                            ("toy,", "the auxiliary noun is empty")):
        with pytest.raises(UserError, match=message):
            tokens.auxiliary_prompt(two_words, "a {} beside a <new2> dog", PAIR, wanted)
    with pytest.raises(UserError, match="mentions 2 concepts, and this ablation divides one from the rest"):
        tokens.divided_prompt(two_words, "a {} beside a <new2> dog", PAIR)


def test_of_two_concepts_the_longer_mention_counts(two_words):
    nested = [PromptScheme(("<new1>",), "cat"), PromptScheme(("<new1>",), "cat house", index=1)]
    assert tokens.cut_at_schemes("a <new1> cat house by a <new1> cat", nested).mentions == (1, 0)


def test_divided_prompts_share_no_word(embedder):
    prompts = ["A <new1> tortoise plushy in times square", "snow on the {}, an {}!"]
    concept, rest = divided_prompts(embedder, prompts, PLUSHY)
    assert concept.prompts == [PLUSHY] * 2 and rest.prompts == ["in times square", "snow on , !"]
    assert torch.equal(concept.named, concept.content)
    assert not rest.named.any() and torch.equal(rest.others, rest.content)
    assert words(embedder, rest, rest.others) == ["in", "times", "square"]


@pytest.mark.parametrize("prompt", ["{}", "a <new1> tortoise plushy"])
def test_a_prompt_that_is_the_concept_alone_cannot_be_divided(embedder, prompt):
    """The second branch would have no token to attend to."""
    with pytest.raises(UserError, match="nothing but the concept"):
        divided_prompts(embedder, [prompt], PLUSHY)


def test_the_table_of_tokens(clip):
    """Ids of CLIP's published vocabulary; new words follow its 49,408."""
    sets = concept_prompts(clip, ["a photo of a <new1> dog ."], "<new1> dog")
    table = tokens.describe_tokens(clip, sets, ("concept", "other")).splitlines()
    assert table[0] == "'a photo of a <new1> dog .'"
    assert [line.split() for line in table[1:]] == [
        ["1", "320", "a", "other"], ["2", "1125", "photo", "other"], ["3", "539", "of", "other"],
        ["4", "320", "a", "other"], ["5", "49408", "<new1>", "concept"], ["6", "1929", "dog", "concept"],
        ["7", "269", ".", "other"]]


def test_captions_have_the_papers_layout():
    """Eq 2 as the paper draws it: p = 3, n = 2, s = 1."""
    scheme = PromptScheme(("<new1>", "<new2>"), "dog", prefix=3, suffix=1)
    assert scheme.caption(5) == "<ctx-0-5-0> <ctx-0-5-1> <ctx-0-5-2> <new1> <new2> dog <ctx-0-5-3>"
    assert scheme.context_words(5) == ["<ctx-0-5-0>", "<ctx-0-5-1>", "<ctx-0-5-2>", "<ctx-0-5-3>"]
    assert scheme.concept == "<new1> <new2> dog"
    second = PromptScheme(("<new3>",), "cat", prefix=3, suffix=1, index=1)
    named = [scheme.context_words(0), scheme.context_words(1), second.context_words(0)]
    assert len({name for names in named for name in names}) == 12
    assert PromptScheme(("<new1>",), "cat", template="photo of a {}").caption(2) == "photo of a <new1> cat"
    assert PromptScheme(("<new1>",), "", template="painting in the style of {}").concept == "<new1>"


@pytest.mark.parametrize("arguments, message", [
    ((("new1",), "cat"), "angle brackets"), ((("<new 1>",), "cat"), "angle brackets"),
    ((("<new1>", "<new1>"), "cat"), "all different"), (((), ""), "at least one"),
    ((("<new1>",), "cat", 0, 0, "a photo"), "once"), ((("<new1>",), "cat", 0, 0, "{} and {}"), "once")])
def test_impossible_schemes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        PromptScheme(*arguments)


@torch.no_grad()
def test_contexts_that_start_from_words_encode_as_those_words(embedder):
    """Bit for bit: vectors take their places first and positions are added once, the suffix's true ones too."""
    scheme = PromptScheme(("<new7>", "<new8>"), "cat", prefix=3, suffix=1)
    rng = torch.Generator().manual_seed(1)
    sources = ["red</w>", "dog</w>"]
    embedder.add_words(dict(zip(scheme.words, initial_words(embedder, 2, sources, rng), strict=True)))
    vectors = initial_contexts(embedder, "photo of a", ".", scheme, rng)
    embedder.add_words(dict(zip(scheme.context_words(4), vectors, strict=True)))
    assert torch.equal(embedder([scheme.caption(4)]), embedder(["photo of a red dog cat ."]))
    assert not torch.equal(embedder([scheme.caption(4)]), embedder(["photo of a dog red cat ."]))


def test_context_lengths(embedder):
    several = len(embedder.content_ids("photo of a plushy"))
    assert several > 4                                               # tokens, not words
    assert context_length(embedder, "photo of a plushy", None, "prefix") == several
    assert context_length(embedder, "photo of a", 3, "prefix") == 3
    assert context_length(embedder, "random", 4, "prefix") == 4
    assert context_length(embedder, "", None, "prefix") == context_length(embedder, "", 0, "suffix") == 0
    assert context_length(embedder, "random", 0, "prefix") == 0
    with pytest.raises(UserError, match="method.suffix_length is 2 but method.suffix 'photo of a' has 3 tokens"):
        context_length(embedder, "photo of a", 2, "suffix")
    with pytest.raises(UserError, match="method.prefix_length is 3 but method.prefix '' has 0 tokens"):
        context_length(embedder, "", 3, "prefix")
    with pytest.raises(UserError, match="method.suffix is 'random', but method.suffix_length does not say how many"):
        context_length(embedder, "random", None, "suffix")


def test_contexts_may_start_at_random(embedder):
    scheme = PromptScheme(("<new1>",), "cat", prefix=2, suffix=1)
    one, same, other = (initial_contexts(embedder, "random", ".", scheme, torch.Generator().manual_seed(seed))
                        for seed in (1, 1, 2))
    assert one.shape == (3, 64) and torch.equal(one, same) and not torch.equal(one[:2], other[:2])
    assert torch.equal(one[2:], embedder.vectors_of(".")) and torch.equal(one[2], other[2])


def test_concept_words_start_from_tokens_or_at_random(embedder):
    table = embedder.embedding.weight
    vectors = initial_words(embedder, 4, ["dog</w>", "random"], torch.Generator().manual_seed(1))
    assert vectors.shape == (4, 64) and torch.equal(vectors[:1], embedder.vectors_of("dog"))
    assert not (vectors[1:, None] == table).all(dim=-1).any() and len(vectors.unique(dim=0)) == 4
    first_only = initial_words(embedder, 1, ["dog</w>", "cat</w>"], torch.Generator())
    assert torch.equal(first_only, vectors[:1])
    many = random_vectors(embedder, 500, torch.Generator().manual_seed(2))
    assert float(many.std() / table.std()) == pytest.approx(1.0, abs=0.02) and abs(float(many.mean())) < 1e-3


def test_the_release_starts_from_these_rare_tokens(clip):
    vectors = initial_words(clip, 4, ["ucd</w>", "pll", "ktn", "pll</w>"], torch.Generator())
    assert torch.equal(vectors, clip.embedding.weight[[43514, 47629, 42170, 25266]])
    assert clip.content_ids("pll") == [25266]       # the word; the release's token is the beginning of others


@pytest.mark.parametrize("source", ["tortoise plushy", "red dog", ""])
def test_a_source_of_several_tokens_is_refused(embedder, source):
    with pytest.raises(UserError, match=r"method\.initial_words.*must be one"):
        initial_words(embedder, 1, [source], torch.Generator())


def test_captions_that_do_not_fit_are_refused(embedder):
    for prefix, fits in ((73, True), (74, False)):
        scheme = PromptScheme(("<new1>",), "cat", prefix=prefix)
        embedder.clear_words()
        embedder.add_words({name: torch.zeros(64) for name in ("<new1>", *scheme.context_words(0))})
        if fits:
            assert embedder.tokenize([scheme.caption(0)], strict=True).shape == (1, 77)
        else:
            with pytest.raises(UserError, match="76 tokens and 75 fit; cut: 'cat'.*shorten"):
                embedder.tokenize([scheme.caption(0)], strict=True)


def test_new_words_are_numbered_behind_the_vocabulary_in_order(embedder):
    embedder.add_words({"<z>": torch.zeros(64), "<a>": torch.ones(64)})
    embedder.add_words({"<m>": torch.full((64,), 2.0)})
    assert embedder.words == ["<new1>", "<z>", "<a>", "<m>"] == list(embedder.word_vectors())
    assert embedder.content_ids("<new1> <z> <a> <m>") == [embedder.base_size + index for index in range(4)]
    assert embedder.vectors_of("<z> <a> <m>")[:, 0].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(UserError, match="'<a>' exists already"):
        embedder.add_words({"<a>": torch.zeros(64)})
    assert len(embedder.words) == 4


def test_a_word_nobody_taught_is_refused(embedder):
    with pytest.raises(UserError, match="unknown word <new2>; known new words: <new1>"):
        embedder(["a <new1> and a <new2>"])
