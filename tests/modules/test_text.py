"""Tests of prompts: CLIP's tokens exactly, new words beside a table that never moves, refusals in words."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from ldm.modules.encoders.extended_embedding import ExtendedEmbedding
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizer import build_vocabulary, clip_merges_path, make_tokenizer, read_merges
from ldm.util import UserError

TEXTS = [
    "a photo of a cat", "tortoise plushy", "Tortoise PLUSHY", "",
    "it's the dog's bone, isn't it? we'll, they've, I'm, he'd, you're", "  many   spaces\tand\nlines  ",
    "1234 56.78 3rd 2nd 2024", "naïve café Ångström",
    "e\u0301te\u0301 in two code points", "日本語の写真", "Привет мир",
    "🐱 cat 😀😃 👨\u200d👩\u200d👧", "!!! ??? ... --- ***", "#hashtag @name a_b-c/d\\e", "<new1> cat <|x|>",
    "x" * 60, "İstanbul ẞ ½ ² ①", "a\u00a0b\u200bc",
]
SPECIAL = "<|startoftext|> a cat <|endoftext|>"   # open_clip spells these two otherwise
NASTY = ["grandma’s ‘hat’", "fish &amp; chips", "fish &amp;amp; chips", "&lt;b&gt; &eacute;t&eacute; &#39;s",
         "cafÃ© âœ”", "ｆｕｌｌ ﬁne", "\ufeffa cat", "a\x00 \x1b[31mred\x1b[0m cat", "line\r\nbreak\u2028here\x85there",
         "ΟΔΟΣ ΣΑΣ", "&", "&&amp;", "Ⅷ ㎞ ²"]
CURLY = "don’t “quote” — dash…"     # older tokenizers straighten such quotes first where `ftfy` is installed


@pytest.fixture(scope="module")
def clip():
    return make_tokenizer()


@pytest.fixture(scope="module")
def vocabulary_files(tmp_path_factory) -> tuple[Path, Path]:
    """The vocabulary in the two files transformers reads."""
    folder, merges = tmp_path_factory.mktemp("clip"), read_merges(clip_merges_path())
    (folder / "vocab.json").write_text(json.dumps(build_vocabulary(merges)), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


def test_the_vocabulary_is_clips(clip):
    vocabulary = build_vocabulary(read_merges(clip_merges_path()))
    assert len(clip) == len(vocabulary) == 49408
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (49406, 49407, 49407)
    assert clip("tortoise plushy")["input_ids"] == [49406, 30178, 2052, 9682, 49407]
    assert clip("a photo of a cat", add_special_tokens=False)["input_ids"] == [320, 1125, 539, 320, 2368]


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="an independent class only in 4")
@pytest.mark.parametrize("name", ["CLIPTokenizer", "CLIPTokenizerFast"])
def test_tokens_equal_transformers(clip, vocabulary_files, name):
    theirs = getattr(transformers, name)(*map(str, vocabulary_files))
    for text in [*TEXTS, SPECIAL] if name == "CLIPTokenizer" else [*TEXTS, SPECIAL, CURLY]:
        assert clip(text)["input_ids"] == theirs(text)["input_ids"], text


def test_tokens_equal_open_clip(clip):
    """The tokenizer of CLIP's authors, in the copy that open_clip carries."""
    from open_clip.tokenizer import SimpleTokenizer
    theirs = SimpleTokenizer()
    for text in TEXTS:
        assert clip(text, add_special_tokens=False)["input_ids"] == theirs.encode(text), text


@pytest.fixture(scope="module")
def real() -> FrozenCLIPEmbedder:
    """A small encoder with CLIP's own tokenizer."""
    return FrozenCLIPEmbedder(width=32, layers=1, heads=1)


@pytest.mark.parametrize("text", [*TEXTS, CURLY, *NASTY])
def test_texts_are_cleaned_as_clips_authors_clean_them(real, text):
    from open_clip.tokenizer import SimpleTokenizer
    assert real.content_ids(text) == SimpleTokenizer().encode(text)


def test_any_text_is_cleaned_as_clips_authors_clean_it(real):
    """Drawn from what cleaning acts on; unassigned letters are left out, as libraries know different Unicodes."""
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from open_clip.tokenizer import SimpleTokenizer
    theirs = SimpleTokenizer()
    bits = st.sampled_from(["’", "“", "&amp;", "&", "lt;", "#39;", "Ã©", "â€™", "é", "e\u0301", "ﬁ", "Ａ", "Σ", "ΟΔΟΣ",
                            " ", "\r\n", "\t", "\u00a0", "\x1b[0m", "\u200b", "\ufeff", "…", "🐱", "'s", "CAT", "7",
                            "{}", "|"])
    letters = st.characters(max_codepoint=0x24ff, exclude_categories=["Cn", "Cs", "Mn"], exclude_characters="<>")

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(st.one_of(bits, letters), max_size=12).map("".join))
    def check(text: str) -> None:
        assert real.content_ids(text) == theirs.encode(text), text

    check()


def test_decoding_gives_the_words_back(clip):
    for text in ("a photo of a cat", "naïve café", "日本語の写真 🐱"):
        ids = clip(text, add_special_tokens=False)["input_ids"]
        assert clip.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("text", ["a photo of a cat", "word " * 100], ids=["short", "long"])
def test_the_tokenizer_is_called_as_foreign_scripts_call_it(clip, text):
    batch = clip([text, ""], truncation=True, max_length=77, return_length=True, return_overflowing_tokens=False,
                 padding="max_length", return_tensors="pt")
    ids = clip(text, add_special_tokens=False)["input_ids"][:75]
    expected = [49406, *ids, 49407]
    assert batch["input_ids"].tolist()[0] == expected + [49407] * (77 - len(expected))
    assert batch["input_ids"].tolist()[1] == [49406] + [49407] * 76


# --- the embedding ------------------------------------------------------------------------------------------------

def test_the_table_alone_is_an_embedding_to_the_bit():
    torch.manual_seed(0)
    ours, plain = ExtendedEmbedding(20, 6), nn.Embedding(20, 6)
    plain.load_state_dict(ours.state_dict())                           # the same keys: weight, and nothing else
    ids = torch.randint(0, 20, (3, 7))
    assert torch.equal(ours(ids), plain(ids))
    ours.add_rows(torch.ones(2, 6))
    assert torch.equal(ours(ids), plain(ids))                          # and old ids stay what they were
    assert list(ours.state_dict()) == ["weight", "extra.0"]
    ours.clear_rows()
    assert list(ours.state_dict()) == ["weight"] and torch.equal(ours(ids), plain(ids))


def test_new_ids_are_rows_in_the_order_of_their_blocks():
    table = ExtendedEmbedding(4, 2)
    first = table.add_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    second = table.add_rows(torch.tensor([[5.0, 6.0]]))
    assert table(torch.tensor([[6, 4, 5]])).tolist() == [[[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]]]
    assert isinstance(first, nn.Parameter) and first.shape == (2, 2) and second.shape == (1, 2)


@pytest.fixture
def embedder() -> FrozenCLIPEmbedder:
    """A small text encoder with random weights and the embedded model's tokenizer."""
    torch.manual_seed(0)
    return FrozenCLIPEmbedder(version="tiny", width=32, layers=2, heads=2)


def context_words(embedder: FrozenCLIPEmbedder, text: str) -> dict[str, Tensor]:
    """New words that start as the words of `text`."""
    return {f"<ctx-0-{k}>": vector for k, vector in enumerate(embedder.vectors_of(text))}


def test_new_words_with_the_vectors_of_known_words_encode_as_those(embedder):
    """Bit for bit, so the position vectors are added once, after the words stand in their places."""
    plain = embedder("photo of a cat")
    words = context_words(embedder, "photo of a")
    assert len(words) == 3
    embedder.add_words(words)
    assert torch.equal(embedder("<ctx-0-0> <ctx-0-1> <ctx-0-2> cat"), plain)
    assert torch.equal(embedder("photo of a cat"), plain)
    assert not torch.equal(embedder("<ctx-0-1> <ctx-0-0> <ctx-0-2> cat"), plain)


def test_words_of_two_blocks_keep_their_own_vectors(embedder):
    block = embedder.add_words({"<new1>": torch.full((32,), 1.0)})
    embedder.add_words({"<ctx-0-0>": torch.full((32,), 2.0), "<new2>": torch.full((32,), 3.0)})
    assert embedder.words == ["<new1>", "<ctx-0-0>", "<new2>"]
    assert {word: float(vector[0]) for word, vector in embedder.word_vectors().items()} == {
        "<new1>": 1.0, "<ctx-0-0>": 2.0, "<new2>": 3.0}
    assert embedder.vectors_of("<new2> <new1>")[:, 0].tolist() == [3.0, 1.0]
    assert embedder.vectors_of("<new2>cat")[0, 0] == 3.0               # a word may touch its neighbour
    with torch.no_grad():
        block.fill_(7.0)
    assert embedder.vectors_of("<new1>")[0, 0] == 7.0


def test_gradients_reach_the_new_words_alone(embedder):
    """Nor does an optimizer with weight decay, given the block, move the table or rows of absent words."""
    torch.manual_seed(1)
    block = embedder.add_words({"<new1>": torch.randn(32), "<new2>": torch.randn(32)})
    table, rows = embedder.embedding.weight.clone(), block.detach().clone()
    features = embedder("a <new1> cat")
    (features * torch.randn_like(features)).sum().backward()
    with_gradient = [name for name, parameter in embedder.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["transformer.text_model.embeddings.token_embedding.extra.0"]
    assert block.grad[0].abs().sum() > 0 and not block.grad[1].any()
    torch.optim.AdamW([block], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(embedder.embedding.weight, table)
    assert not torch.equal(block[0], rows[0])


def test_forgetting_the_words_restores_the_encoder(embedder):
    keys, plain = list(embedder.state_dict()), embedder("a cat")
    embedder.add_words({"<new1>": torch.ones(32)})
    embedder.clear_words()
    assert embedder.words == [] and list(embedder.state_dict()) == keys and torch.equal(embedder("a cat"), plain)
    with pytest.raises(UserError, match="known new words: none"):
        embedder("a <new1> cat")


def test_unknown_and_impossible_words_are_refused(embedder):
    embedder.add_words({"<new1>": torch.ones(32), "<new2>": torch.ones(32)})
    with pytest.raises(UserError, match=r"unknown word <New1>; known new words: <new1>, <new2>\."):
        embedder(["a <new1> cat", "a <New1> cat"])
    with pytest.raises(UserError, match="'new3' must be written in angle brackets"):
        embedder.add_words({"new3": torch.ones(32)})
    with pytest.raises(UserError, match="'<new2>' exists already"):
        embedder.add_words({"<new3>": torch.ones(32), "<new2>": torch.ones(32)})
    assert embedder.words == ["<new1>", "<new2>"]                      # a refusal adds nothing
    with pytest.raises(UserError, match="version 'other' is unknown"):
        FrozenCLIPEmbedder(version="other")


def test_what_does_not_fit_is_cut_aloud_or_refused(embedder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    fits, long = "cat " * 75, "cat " * 75 + "dog house"
    assert len(embedder.content_ids(fits)) == 75
    assert embedder.tokenize([fits], strict=True).shape == (1, 77)
    with pytest.warns(UserWarning, match=r"has 77 tokens and 75 fit; cut: 'dog house'"):
        ids = embedder.tokenize([long])
    assert torch.equal(ids, embedder.tokenize([fits]))
    with pytest.raises(UserError, match="cut: 'dog house'; shorten"):
        embedder([long], strict=True)
    assert len(embedder.content_ids("cat " * 100)) == 100
    assert not caplog.records      # transformers would speak of "indexing errors", of which there are none


def test_prompts_are_padded_with_the_end(embedder):
    start, end = embedder.tokenizer.bos_token_id, embedder.tokenizer.eos_token_id
    ids = embedder.tokenize(["a cat", ""])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == [start, *embedder.content_ids("a cat"), *[end] * 74]
    assert ids[1].tolist() == [start, *[end] * 76]


def test_one_prompt_or_several(embedder):
    features = embedder.encode(["a cat", "a dog"])
    assert features.shape == (2, 77, 32)
    assert torch.allclose(embedder("a cat"), features[:1], atol=1e-6)
    assert torch.equal(embedder(("a cat", "a dog")), features)


@pytest.mark.parametrize(("text", "message"), [
    ("a cat " * 5000, "has 30,000 letters; give at most 10,000"), ("caf\udce9", "is not Unicode text")])
def test_what_is_no_prompt_is_refused(embedder, text, message):
    for read in (embedder.tokenize, embedder.content_ids):
        with pytest.raises(UserError, match=message):
            read([text] if read == embedder.tokenize else text)


def test_no_words_have_no_vectors(embedder):
    assert embedder.vectors_of(" ").shape == (0, 32)
