"""CLIP's byte-pair tokenizer from a local merges file, and how CLIP cleans a text before it; no hub, no download."""
from __future__ import annotations

import gzip
import html
import importlib.util
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ldm.util import UserError
from ldm.words import LONGEST, NEW_WORD, is_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # how many merges of the published file CLIP uses

# How CLIP cuts a text into pieces before any merge: contractions, runs of letters, single digits, runs of the rest.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Cleans a text as CLIP's own tokenizer does, but for letter case: a phone's ’ becomes the ' CLIP was trained on.

    Broken encodings, typographic quotes and the like are repaired, HTML's entities are resolved twice, white space is
    collapsed. New words stay as they are.

    Raises:
        UserError: the text is absurdly long, or holds bytes that are no Unicode text.
    """
    if len(text) > LONGEST:
        raise UserError(f"the text '{text[:40]} ...' has {len(text):,} letters; give at most {LONGEST:,}, of which 77 "
                        "tokens are read.")
    if not is_unicode(text):
        raise UserError(f"'{text[:80]}' is not Unicode text; type it again, in UTF-8.")
    return " ".join(_outside_new_words(_repair, text).split())


def _repair(text: str) -> str:
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy  # takes a fifth of a second, and few prompts need it
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def lower(text: str) -> str:
    """Returns a text in lower case, new words as they are."""
    return _outside_new_words(str.lower, text)


def _outside_new_words(change: Callable[[str], str], text: str) -> str:
    parts = re.split(f"({NEW_WORD.pattern})", text)      # texts and new words take turns
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def clip_merges_path() -> Path:
    """Finds the CLIP merges file inside the installed open_clip package, without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("open_clip")
    if spec and spec.origin:
        path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
        if path.exists():
            return path
    raise UserError("CLIP's vocabulary was not found: it comes with open_clip_torch; install requirements.txt.")


def byte_symbols() -> dict[int, str]:
    """Maps each byte to the character that stands for it in byte-pair files (GPT-2's convention), printable ones first.

    The order is that of CLIP's first token numbers.
    """
    symbols = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    beyond = 256
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(beyond)
            beyond += 1
    return symbols


@lru_cache(maxsize=4)
def read_merges(path: Path) -> tuple[tuple[str, str], ...]:
    """Reads the merges of a (gzipped) byte-pair file: a heading line, then one pair a line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary '{path}' cannot be read ({error}).") from error
    merges = []
    for line in lines[:CLIP_MERGES]:
        if line:
            first, second = line.split()
            merges.append((first, second))
    return tuple(merges)


def build_vocabulary(merges: tuple[tuple[str, str], ...]) -> dict[str, int]:
    """Numbers the tokens as CLIP does: bytes, bytes that end a word, merged pairs, start, end."""
    tokens = list(byte_symbols().values())
    tokens += [f"{symbol}</w>" for symbol in tokens]
    tokens += [first + second for first, second in merges]
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}


def make_tokenizer(merges_path: Path | str | None = None, max_length: int = 77):
    """Builds the tokenizer as a transformers `PreTrainedTokenizerFast`, so foreign scripts can call it as usual.

    Args:
        merges_path: a byte-pair file; None is CLIP's, from open_clip.
        max_length: number of positions, start and end included.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = read_merges(Path(merges_path) if merges_path else clip_merges_path())
    vocabulary = build_vocabulary(merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix="</w>",
                                     unk_token=END, continuing_subword_prefix="", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])])
    start, end = (AddedToken(text, normalized=False, special=True) for text in (START, END))
    # CLIP pads with its end token and has none for what is unknown: every text is made of bytes.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, bos_token=start,
                                   eos_token=end, unk_token=end, pad_token=end)
