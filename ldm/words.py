"""What words are: new words in angle brackets, articles, one line of text, Unicode."""
from __future__ import annotations

import re

LONGEST = 10_000                        # letters of a text that is believed; prompts end at 77 tokens
_HALF = re.compile("[\ud800-\udfff]")     # of a letter: what Python makes of bytes that are no text
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")     # what terminals obey and files cannot hold
# "an" goes by the first sound: vowels but those that begin with a "y" or "w" (unicorn, user, European, one-eyed), the
# silent h (hour, heir, honest), and letters that are spelled (x-ray).
_TAKES_AN = re.compile(r"(?!uni(?![nm])|u[kst][aeiou]|ufo|u\b|eu|ewe|one(?:sies?)?\b|once)[aeiou]|hour|heir"
                       r"|hon(?:est|ou?r)|[fhlmnrsx](?=-|\b)", re.IGNORECASE)
NEW_WORD = re.compile(r"<[^<>\s|]+>")   # how a new word is written: <new1>, <ctx-0-2>


def article(noun: str) -> str:
    """Returns "an" or "a", as the first sound of `noun` wants it; that of new words is unknown, and they take "a"."""
    return "an" if _TAKES_AN.match(noun) else "a"


def is_unicode(text: str) -> bool:
    """Says whether a text can be written as UTF-8: names of files and command lines may hold any bytes."""
    return _HALF.search(text) is None


def is_line(text: str) -> bool:
    """Says whether a text is one line of bounded length without control characters."""
    return len(text) <= LONGEST and not _CONTROL.search(text)
