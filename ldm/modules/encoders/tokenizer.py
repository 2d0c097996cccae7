"""CLIP's byte-pair tokenizer from a local merges file, and how CLIP cleans a text before it; no hub, no download."""
from __future__ import annotations

import gzip
import html
import importlib.util
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ldm.text import LONGEST, NEW_WORD, is_unicode
from ldm.util import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # how many merges of the published file CLIP uses

# How CLIP cuts a text into pieces before any merge: contractions, runs of letters, single digits, runs of the rest.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Cleans a text as CLIP's own tokenizer does, but for letter case, so that a phone's ’ is the ' CLIP was taught.

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
    parts = re.split(f"({NEW_WORD.pattern})", text)
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def clip_merges_path() -> Path:
    """Finds the CLIP merges file inside the installed open_clip package, without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("open_clip")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
    if path is None or not path.exists():
        raise UserError("CLIP's vocabulary was not found: it comes with open_clip_torch; install requirements.txt.")
    return path


def byte_symbols() -> dict[int, str]:
    """Maps each byte to the printable character that stands for it in byte-pair files (GPT-2's convention)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@lru_cache(maxsize=4)
def read_merges(path: Path) -> tuple[tuple[str, str], ...]:
    """Reads the merges of a (gzipped) byte-pair file: a heading line, then one pair a line."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary '{path}' cannot be read ({error}).") from error
    return tuple((first, second) for first, second in (line.split() for line in lines[:CLIP_MERGES] if line))


def build_vocabulary(merges: tuple[tuple[str, str], ...]) -> dict[str, int]:
    """Numbers the tokens as CLIP does: bytes, bytes that end a word, merged pairs, start, end."""
    symbols = byte_symbols()
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_in_order = [symbols[b] for b in order] + [symbols[b] for b in range(256) if b not in order]
    tokens = bytes_in_order + [symbol + "</w>" for symbol in bytes_in_order]
    tokens += [first + second for first, second in merges] + [START, END]
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
    special = {name: AddedToken(text, normalized=False, special=True)
               for name, text in (("bos_token", START), ("eos_token", END), ("unk_token", END), ("pad_token", END))}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **special)
