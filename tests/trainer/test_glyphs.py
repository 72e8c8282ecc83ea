"""The characters of typefaces: what is drawn, and what is said of fonts that are not there."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from adamix import glyphs
from adamix.errors import InputError
from adamix.images import pixel_digest

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def three_faces(monkeypatch):
    pytest.importorskip("PIL")
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf")
    known = [glyphs.Face("fonts-dejavu", name, name[:10].removesuffix(".")) for name in names]
    monkeypatch.setattr(glyphs, "faces", lambda: known)
    monkeypatch.setattr(glyphs, "_FONTS_FOLDER", str(FONTS))


@pytest.mark.usefixtures("three_faces")
def test_every_character_of_every_face():
    images, families = glyphs.glyph_images()
    assert len(images.y) == len(families) == 3 * 62
    assert images.class_names == tuple(glyphs.CHARACTERS) and len(set(images.class_names)) == 62
    assert families.tolist() == [0] * 124 + [1] * 62  # sans, in two weights, and serif
    np.testing.assert_array_equal(images.y, np.tile(np.arange(62), 3))
    drawn = [images.read(row) for row in range(len(images.y))]
    assert {(picture.size, picture.mode) for picture in drawn} == {((96, 96), "RGB")}
    assert len({pixel_digest(picture) for picture in drawn}) == len(drawn)
    for picture in drawn:
        pixels = np.asarray(picture)[:, :, 0]
        assert pixels.min() < 60 and pixels[:3].min() > 200 and pixels[:, :3].min() > 200  # ink, with room around it


@pytest.mark.usefixtures("three_faces")
def test_an_image_does_not_depend_on_what_was_read_before():
    images, _ = glyphs.glyph_images()
    alone = pixel_digest(images.read(70))
    again, _ = glyphs.glyph_images()
    for row in (3, 70):
        last = pixel_digest(again.read(row))
    assert last == alone and again.digest == images.digest


def test_missing_fonts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "_FONTS_FOLDER", str(tmp_path))
    with pytest.raises(
        InputError, match=r"glyphs: the files of \d+ font packages are not in .*Debian's fonts-.* fonts-"
    ):
        glyphs.glyph_images(tmp_path)


def test_a_damaged_font_is_named(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(glyphs, "faces", lambda: [glyphs.Face("fonts-none", "none.ttf", "None")])
    monkeypatch.setattr(glyphs, "_FONTS_FOLDER", str(tmp_path))
    (tmp_path / "none.ttf").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"glyphs: .*none.ttf cannot be read \(.*reinstall its package"):
        glyphs.glyph_images(tmp_path)


def test_the_list_of_faces():
    known = glyphs.faces()
    assert len(known) == 360 and len({face.path for face in known}) == 360
    counts = np.unique([face.family for face in known], return_counts=True)[1]
    assert len(counts) == 209 and counts.max() <= 2
    assert all(face.package.startswith("fonts-") for face in known)
