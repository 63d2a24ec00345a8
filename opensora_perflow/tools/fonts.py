"""Labels that can be drawn: a font that has the script, or a number where no font has it."""

import functools
import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

logger = logging.getLogger("opensora_perflow")

LONGEST = 34
"""Characters of a label; the demo's captions have up to 30."""


class Label(NamedTuple):
    """A text and the font families that hold all its characters, the usual ones first."""

    text: str
    families: list[str]

    @property
    def style(self) -> dict[str, object]:
        """What matplotlib's texts take: a dollar sign is a dollar sign, not the begin of a formula."""
        return {"family": self.families, "parse_math": False}


def labels(captions: Sequence[str]) -> list[Label]:
    """Captions as labels, in one line and shortened; "caption 3" for the third where no font has its characters.

    Those are named once, in a warning.
    """
    found, without = [], []
    for number, caption in enumerate(captions, 1):
        text = shortened(caption)
        families = families_for(text)
        if families is None:
            without.append(f"caption {number} is {caption!r}")
            text, families = f"caption {number}", usual_families()
        found.append(Label(text, families))
    if without:
        logger.warning("no font of this system has all characters of these captions; install one: %s", "; ".join(without))
    return found


def as_label(caption: str | Label) -> Label:
    """A text as it is, in the usual font."""
    return caption if isinstance(caption, Label) else Label(caption, usual_families())


def shortened(caption: str) -> str:
    """One line of at most `LONGEST` characters, accents composed."""
    text = unicodedata.normalize("NFC", re.sub(r"\s+", " ", caption)).strip()
    return text if len(text) <= LONGEST else text[: LONGEST - 3].rstrip() + "..."


def families_for(text: str) -> list[str] | None:
    """Font families that together hold every character of a text; None where the system has none for one of them."""
    families = usual_families()
    needed = {ord(letter) for letter in text} - characters_of(
        font_manager.findfont(font_manager.FontProperties(family=families))
    )
    if not needed:
        return families
    for path, family in _system_fonts():
        if held := needed & characters_of(path):
            families, needed = [*families, family], needed - held
        if not needed:
            return families
    return None


def usual_families() -> list[str]:
    """Families of labels in the scripts that matplotlib's own font has."""
    return list(matplotlib.rcParams["font.family"])


@functools.cache
def characters_of(path: str) -> frozenset[int]:
    """Code points that a font file has glyphs for; none where it cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, UnicodeError):
        return frozenset()


@functools.lru_cache(maxsize=1)
def _system_fonts() -> list[tuple[str, str]]:
    """(file, family) of upright fonts, usual weights first; fonts that show boxes for every character are no help."""
    entries = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
    entries = [font for font in entries if not re.search("last ?resort|blank", font.name, re.IGNORECASE)]
    entries.sort(key=lambda font: (str(font.weight) not in ("400", "normal", "regular"), font.fname))
    return [(font.fname, font.name) for font in entries]
