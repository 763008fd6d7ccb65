"""The values in a line of a STAR file."""

from __future__ import annotations

import re

_CLOSING = {"'": re.compile(r"'(?=[ \t]|$)"), '"': re.compile(r'"(?=[ \t]|$)')}
_BARE = re.compile(r"[^ \t]+")
_SPACE = re.compile(r"[ \t]+")


def marked(text: str) -> bool:
    """Whether a line may have quotes or a comment."""
    return '"' in text or "'" in text or "#" in text


def tokens(line: str) -> list[str]:
    """The values of a line: quotes taken off, a comment left out (# begins one only at the start of a word)."""
    if not marked(line):
        return _SPACE.split(line)
    words = []
    at, open_ended = 0, set()
    while word := _BARE.search(line, at):
        start, quote = word.start(), word[0][0]
        if quote == "#":
            break
        end = _CLOSING[quote].search(line, start + 1) if quote in _CLOSING and quote not in open_ended else None
        if end is None:
            open_ended.add(quote)  # nor will a later one be closed: looking again and again would take for ever
            words.append(word[0])
            at = word.end()
        else:
            words.append(line[start + 1 : end.start()])
            at = end.end()
    return words
