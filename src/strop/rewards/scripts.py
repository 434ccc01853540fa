"""Which script a character belongs to, from a table of our own: the same on every Python."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping

_RANGES: tuple[tuple[int, int, str], ...] = (
    (0x41, 0x5A, "Latin"), (0x61, 0x7A, "Latin"), (0xAA, 0xAA, "Latin"), (0xBA, 0xBA, "Latin"), (0xC0, 0xD6, "Latin"),
    (0xD8, 0xF6, "Latin"), (0xF8, 0x24F, "Latin"), (0x250, 0x2AF, "Latin"), (0x370, 0x373, "Greek"),
    (0x376, 0x37D, "Greek"), (0x37F, 0x3E1, "Greek"), (0x3F0, 0x3FF, "Greek"), (0x400, 0x482, "Cyrillic"),
    (0x48A, 0x52F, "Cyrillic"), (0x531, 0x556, "Armenian"), (0x561, 0x587, "Armenian"), (0x5D0, 0x5EA, "Hebrew"),
    (0x5EF, 0x5F2, "Hebrew"), (0x620, 0x64A, "Arabic"), (0x66E, 0x6D3, "Arabic"), (0x6EE, 0x6EF, "Arabic"),
    (0x6FA, 0x6FF, "Arabic"), (0x700, 0x74F, "Syriac"), (0x750, 0x77F, "Arabic"), (0x780, 0x7B1, "Thaana"),
    (0x8A0, 0x8C9, "Arabic"), (0x904, 0x939, "Devanagari"), (0x958, 0x961, "Devanagari"),
    (0x971, 0x97F, "Devanagari"), (0x985, 0x9B9, "Bengali"), (0x9DC, 0x9E1, "Bengali"), (0xA05, 0xA39, "Gurmukhi"),
    (0xA59, 0xA5E, "Gurmukhi"), (0xA85, 0xAB9, "Gujarati"), (0xB05, 0xB39, "Oriya"), (0xB83, 0xBB9, "Tamil"),
    (0xC05, 0xC39, "Telugu"), (0xC85, 0xCB9, "Kannada"), (0xD05, 0xD3A, "Malayalam"), (0xD85, 0xDC6, "Sinhala"),
    (0xE01, 0xE30, "Thai"), (0xE40, 0xE46, "Thai"), (0xE81, 0xEB0, "Lao"), (0xEC0, 0xEC6, "Lao"),
    (0xF40, 0xF6C, "Tibetan"), (0x1000, 0x102A, "Myanmar"), (0x1050, 0x1055, "Myanmar"), (0x10A0, 0x10FA, "Georgian"),
    (0x10FC, 0x10FF, "Georgian"), (0x1100, 0x11FF, "Hangul"), (0x1200, 0x135A, "Ethiopic"),
    (0x13A0, 0x13FD, "Cherokee"), (0x1780, 0x17B3, "Khmer"), (0x1820, 0x1878, "Mongolian"),
    (0x1C90, 0x1CBF, "Georgian"), (0x1D00, 0x1D25, "Latin"), (0x1E00, 0x1EFF, "Latin"), (0x1F00, 0x1FFC, "Greek"),
    (0x2C60, 0x2C7F, "Latin"), (0x2DE0, 0x2DFF, "Cyrillic"), (0x3005, 0x3007, "Han"), (0x3041, 0x3096, "Hiragana"),
    (0x309D, 0x309F, "Hiragana"), (0x30A1, 0x30FA, "Katakana"), (0x30FC, 0x30FF, "Katakana"),
    (0x3105, 0x312F, "Bopomofo"), (0x3131, 0x318E, "Hangul"), (0x31F0, 0x31FF, "Katakana"), (0x3400, 0x4DBF, "Han"),
    (0x4E00, 0x9FFF, "Han"), (0xA640, 0xA66E, "Cyrillic"), (0xA722, 0xA7FF, "Latin"), (0xA960, 0xA97C, "Hangul"),
    (0xAB30, 0xAB64, "Latin"), (0xAC00, 0xD7A3, "Hangul"), (0xD7B0, 0xD7FB, "Hangul"), (0xF900, 0xFAD9, "Han"),
    (0xFB00, 0xFB06, "Latin"), (0xFB1D, 0xFB4F, "Hebrew"), (0xFB50, 0xFDFB, "Arabic"), (0xFE70, 0xFEFC, "Arabic"),
    (0xFF21, 0xFF3A, "Latin"), (0xFF41, 0xFF5A, "Latin"), (0xFF66, 0xFF9D, "Katakana"), (0xFFA0, 0xFFDC, "Hangul"),
    (0x1B000, 0x1B122, "Hiragana"), (0x20000, 0x323AF, "Han"),
)  # fmt: skip
"""First and last code point of the letters of a script, in order. Letters of other scripts count as `other`."""

_STARTS = tuple(first for first, _, _ in _RANGES)

SCRIPTS: Mapping[str, frozenset[str]] = {name: frozenset({name}) for _, _, name in _RANGES} | {
    "Japanese": frozenset({"Han", "Hiragana", "Katakana"}),
    "Korean": frozenset({"Hangul", "Han"}),
    "Chinese": frozenset({"Han", "Bopomofo"}),
}
"""Names that can be asked for, and the scripts that they stand for."""

OTHER = "other"


def script_of(ch: str) -> str | None:
    """Return the script of a letter, `other` for one that the table lacks, None for what is no letter."""
    code = ord(ch)
    place = bisect_right(_STARTS, code) - 1
    if place >= 0 and code <= _RANGES[place][1]:
        return _RANGES[place][2]
    return OTHER if code > 0x2FF and ch.isalpha() else None


def share_of(text: str, names: Iterable[str]) -> float | None:
    """Return the share of the letters of a text that belong to the scripts asked for; None without a letter."""
    wanted = frozenset().union(*(SCRIPTS[name] for name in names))
    counts: dict[str, int] = {}
    for ch in text:
        counts[ch] = counts.get(ch, 0) + 1
    inside = letters = 0
    for ch, count in counts.items():
        script = script_of(ch)
        letters += count * (script is not None)
        inside += count * (script in wanted)
    return inside / letters if letters else None
