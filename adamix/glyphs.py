"""Images of the 62 letters and digits in the typefaces of Debian's font packages: many classes, few rows of each."""

from __future__ import annotations

import hashlib
import string
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adamix.errors import InputError
from adamix.images import ImageSource
from adamix.storage import find_data_file, one_line, require

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_FONTS_FOLDER = "/usr/share/fonts"  # of Debian's fonts-* packages
_SIDE, _FONT_SIZE, _BASELINE = 96, 60, 68  # pixels
_SHIFT, _ROTATION = 4, 8.0  # at most so many pixels and degrees, either way


class Face(NamedTuple):
    """A font file; its family is what the faces of one design have in common."""

    package: str
    path: str
    family: str


def faces() -> list[Face]:
    """The faces of the set, at most two of a family, as `assets/glyph_faces.tsv` lists them."""
    text = (resources.files("adamix") / "assets" / "glyph_faces.tsv").read_text(encoding="utf-8")
    return [Face(*line.split("\t")) for line in text.splitlines()]


def glyph_images(cache_dir: str | Path | None = None) -> tuple[ImageSource, NDArray[np.int64]]:
    """Every character in every face, black on white, 96 x 96, shifted and turned a little; the family `[N]` of each.

    Row i is of face i // 62 and character i % 62. Shift and angle are drawn by the row, so the images do not depend on
    what is read first.

    Raises:
        InputError: a font file is missing (with the packages to install) or cannot be read, or pillow is absent.
    """
    known = faces()
    files = _files(known, cache_dir)
    font_type = require("PIL.ImageFont", "pillow", "glyphs")
    digest = hashlib.sha256(repr((CHARACTERS, _SIDE, _FONT_SIZE, _BASELINE, _SHIFT, _ROTATION)).encode())
    fonts = []
    for file in files:
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
            fonts.append(font_type.truetype(str(file), _FONT_SIZE))
        except Exception as error:  # the reader of fonts raises many types
            raise InputError(f"glyphs: {file} cannot be read ({one_line(error)}); reinstall its package") from error
    families = sorted({face.family for face in known})
    owner = np.array([families.index(face.family) for face in known], dtype=np.int64)
    y = np.tile(np.arange(len(CHARACTERS), dtype=np.int64), len(known))

    def read(row: int) -> Any:
        face, character = divmod(row, len(CHARACTERS))
        return _draw(fonts[face], CHARACTERS[character], np.random.default_rng(row))

    images = ImageSource("glyphs", y, tuple(CHARACTERS), digest.hexdigest(), _SIDE, True, read)
    return images, owner.repeat(len(CHARACTERS))


def _files(known: list[Face], cache_dir: str | Path | None) -> list[Path]:
    files, missing = [], set()
    for face in known:
        try:
            files.append(
                find_data_file(
                    face.path, what="glyphs", package=face.package, system_dir=_FONTS_FOLDER, cache_dir=cache_dir
                )
            )
        except InputError:
            missing.add(face.package)
    if missing:
        raise InputError(
            f"glyphs: the files of {len(missing)} font packages are not in {_FONTS_FOLDER}; install Debian's "
            + " ".join(sorted(missing))
        )
    return files


def _draw(font: Any, character: str, draw: np.random.Generator) -> Any:
    """One character, its middle and its baseline at the same place but for the shift."""
    image = require("PIL.Image", "pillow", "glyphs")
    left, _, right, _ = font.getbbox(character, anchor="ls")
    x, y = draw.integers(-_SHIFT, _SHIFT + 1, 2)
    picture = image.new("L", (_SIDE, _SIDE), 255)
    pen = require("PIL.ImageDraw", "pillow", "glyphs").Draw(picture)
    pen.text((_SIDE / 2 - (left + right) / 2 + x, _BASELINE + y), character, font=font, fill=0, anchor="ls")
    angle = draw.uniform(-_ROTATION, _ROTATION)
    return picture.rotate(angle, resample=image.Resampling.BICUBIC, fillcolor=255).convert("RGB")
