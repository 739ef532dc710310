"""Reading images: what damage does, what each mode becomes, how large a header may be."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import DAMAGED, LINKS, chunk, damage, encoded, photo, png_bomb
from PIL import Image, ImageOps

from ailab.datasets.files.image import BadFile, ImageSettings, image_settings, read_image

PIXELS = photo(1)
GREY = np.asarray(Image.fromarray(PIXELS).convert("L"))


def saved(folder: Path, picture: Any, kind: str, name: str = "x.bin", **settings: Any) -> Path:
    """A file whose name says nothing about its format."""
    path = folder / name
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, kind, **settings)
    return path


def array(path: Path, **settings: Any) -> np.ndarray:
    return read_image(path, **settings).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", [*DAMAGED, *LINKS])
@pytest.mark.parametrize("truncated", ["skip", "fill"])
def test_a_damaged_file_is_refused_with_its_kind(name: str, truncated: Any, tmp_path: Path) -> None:
    """Each kind of damage is a BadFile that says which and where; none is an image, a hang or another exception."""
    kind = damage(tmp_path / "x.jpg", name)
    with pytest.raises(BadFile) as caught:
        read_image(tmp_path / "x.jpg", truncated=truncated)
    assert (caught.value.kind, caught.value.path) == (kind, str(tmp_path / "x.jpg"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_cut_of_a_png_or_jpeg_is_a_picture(tmp_path: Path) -> None:
    """Cut anywhere, a file is bad: no prefix of it decodes to something black, grey or half."""
    for kind in ("PNG", "JPEG"):
        data = encoded(PIXELS, kind)
        for end in [*range(0, len(data) - 1, 37), len(data) - 1]:
            (tmp_path / "x").write_bytes(data[:end])
            with pytest.raises(BadFile) as caught:
                read_image(tmp_path / "x")
            assert caught.value.kind in ("empty", "not_an_image", "corrupt", "truncated")


def test_no_flipped_bit_of_a_png_changes_the_picture(tmp_path: Path) -> None:
    """A bit flipped anywhere in a PNG is found, or was in something that does not change a pixel."""
    data, whole = encoded(PIXELS, "PNG"), PIXELS
    rng = np.random.default_rng(0)
    for bit in rng.integers(0, 8 * len(data), 300):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / "x").write_bytes(flipped)
        try:
            assert (array(tmp_path / "x") == whole).all(), bit
        except BadFile as error:
            assert error.kind in ("corrupt", "truncated", "bomb", "not_an_image")


def test_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    """100 and 200 million pixels in small PNGs, and in a GIF, cost no memory to refuse; `max_pixels` is the border."""
    (tmp_path / "a").write_bytes(png_bomb(10_000, 10_000))
    (tmp_path / "b").write_bytes(png_bomb(20_000, 10_000))
    (tmp_path / "c").write_bytes(b"GIF89a" + (10_000).to_bytes(2, "little") * 2 + encoded(PIXELS, "GIF")[10:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in "abc":
        with pytest.raises(BadFile, match="pixels") as caught:
            read_image(tmp_path / name)
        assert caught.value.kind == "bomb"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    path = saved(tmp_path, PIXELS, "PNG")
    assert read_image(path, max_pixels=4800).shape == (3, 60, 80)
    with pytest.raises(BadFile):
        read_image(path, max_pixels=4799)


def test_every_interlaced_and_shallow_png_is_whole(tmp_path: Path) -> None:
    """The check of the number of rows knows interlacing and every depth: sizes 1..9, as libpng itself writes them."""
    for size in range(1, 10):
        for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"):
            grey = np.arange(size * 7, dtype="uint16").reshape(7, size)
            picture = Image.fromarray(grey) if mode == "I;16" else Image.fromarray(grey.astype("uint8")).convert(mode)
            assert read_image(saved(tmp_path, picture, "PNG")).shape == (3, 7, size)
            assert read_image(interlaced(tmp_path, size)).shape == (3, 7, size)


def interlaced(folder: Path, width: int) -> Path:
    """A PNG with Adam7, 8 bits of grey, made by hand: Pillow writes none."""
    pixels = np.arange(7 * width, dtype="uint8").reshape(7, width)
    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[top::down, left::right] for top, left, down, right in starts]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part if row.size)
    head = struct.pack(">IIBBBBB", width, 7, 8, 0, 0, 0, 1)
    path = folder / "i"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert (np.asarray(Image.open(path)) == pixels).all()
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_stand_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    """All 8 EXIF orientations come out as Pillow's exif_transpose has them, memory in the same order."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, PIXELS, kind, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (array(path) == wanted).all()
    assert read_image(path).stride() == (1, 3 * wanted.shape[1], 3)


def modes() -> dict[str, tuple[Any, str, np.ndarray]]:
    """name -> (image, format, what the RGB has to be)."""
    picture = Image.fromarray(PIXELS)
    grey = np.repeat(GREY[..., None], 3, -1)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(GREY))
    palette = picture.quantize(64)
    see_through = np.asarray(palette.convert("RGB"))
    ramp = GREY.astype("float32") * 1000 - 5
    stretched = np.repeat(((ramp - ramp.min()) / np.ptp(ramp) * 255).round().astype("uint8")[..., None], 3, -1)
    return {
        "L": (picture.convert("L"), "PNG", grey),
        "LA": (picture.convert("LA"), "PNG", grey),
        "RGB": (picture, "BMP", PIXELS),
        "RGBA": (clear, "PNG", PIXELS),
        "RGBA TIFF": (clear, "TIFF", PIXELS),
        "1": (picture.convert("1"), "PNG", np.asarray(picture.convert("1").convert("RGB"))),
        "P": (palette, "PNG", see_through),
        "P GIF": (palette, "GIF", see_through),
        "CMYK": (picture.convert("CMYK"), "TIFF", PIXELS),
        "16 bit": (Image.fromarray(GREY.astype("uint16") * 257), "PNG", grey),
        "16 bit TIFF": (Image.fromarray(GREY.astype("uint16") * 257), "TIFF", grey),
        "32 bit": (Image.fromarray(GREY.astype("int32") * 257), "TIFF", grey),
        "float": (Image.fromarray(GREY.astype("float32") / 255), "TIFF", grey),
        "float of any range": (Image.fromarray(ramp), "TIFF", stretched),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_has_one_meaning(name: str, tmp_path: Path) -> None:
    """Images of each mode become the same 8 bits, deep ones scaled and never cut off; alpha only where it is asked for."""
    picture, kind, wanted = modes()[name]
    path = saved(tmp_path, picture, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (array(path) == wanted).all()
        alpha = array(path, mode="RGBA")
    assert (alpha[..., :3] == wanted).all()
    assert (alpha[..., 3] == (GREY if name.startswith("RGBA") else 255)).all()
    assert read_image(path, mode="L").shape == (1, 60, 80)


def test_a_transparent_palette_and_an_animation(tmp_path: Path) -> None:
    """A palette with alpha in bytes gives its colours and its alpha without a warning; of an animation comes the first frame."""
    palette = Image.fromarray(PIXELS).quantize(8)
    path = saved(tmp_path, palette, "PNG", transparency=bytes([0, 128, *[255] * 6]))
    alpha = array(path, mode="RGBA")
    assert (alpha[..., :3] == np.asarray(palette.convert("RGB"))).all()
    assert set(np.unique(alpha[..., 3])) == {0, 128, 255}
    frames = [Image.fromarray(np.full((9, 9, 3), v, "uint8")) for v in (10, 200)]
    for kind in ("GIF", "WEBP", "PNG"):
        path = saved(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:])
        assert (abs(array(path).astype(int) - 10) < 3).all()


@pytest.mark.parametrize("operator", [True, False])
def test_jpegs_are_decoded_as_by_pillow(operator: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colour, grey, progressive, CMYK and subsampled JPEGs give Pillow's pixels, with torchvision's operator and without it."""
    if not operator:
        monkeypatch.setattr("ailab.datasets.files.image._jpeg_operator", lambda: None)
    picture = Image.fromarray(PIXELS)
    for settings in ({}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}):
        path = saved(tmp_path, picture, "JPEG", **settings)
        assert (array(path) == np.asarray(Image.open(path))).all()
    path = saved(tmp_path, GREY, "JPEG")
    assert (array(path) == np.asarray(Image.open(path).convert("RGB"))).all()
    assert (array(path, mode="L")[..., 0] == np.asarray(Image.open(path))).all()
    path = saved(tmp_path, picture.convert("CMYK"), "JPEG")
    assert (array(path) == np.asarray(Image.open(path).convert("RGB"))).all()


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path: Path) -> None:
    """The result has at least twice the hint, turned or not, and looks as the whole image does when that is shrunk."""
    large = photo(2, (600, 800), grain=0)
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, large, "JPEG", quality=95, exif=exif)
        upright = (600, 800) if orientation == 1 else (800, 600)
        for hint, factor in (((60, 40), 4), ((30, 40), 8), ((150, 200), 2), ((160, 200), 1), ((600, 800), 1)):
            hint = hint if orientation == 1 else hint[::-1]
            assert read_image(path, size_hint=hint).shape[1:] == tuple(side // factor for side in upright)
        small = read_image(path, resize=(60, 60)).float()
        whole = torch.nn.functional.interpolate(read_image(path)[None].float(), (60, 60), mode="bilinear", antialias=True)[0]
        assert (small - whole).abs().mean() < 2.5
    assert read_image(path, resize=60).shape == (3, 80, 60)
    assert read_image(path, resize=60, mode="L").shape == (1, 80, 60)


def test_a_truncated_jpeg_keeps_its_rows_and_says_so(tmp_path: Path) -> None:
    """With fill the rows that were in the file are bitwise those of the whole one, and the rest has their mean colour."""
    data = encoded(photo(3, (320, 240)), "JPEG", quality=90)
    (tmp_path / "whole").write_bytes(data)
    whole = read_image(tmp_path / "whole")
    path = tmp_path / "cut"
    kept = 0
    for share in (0.3, 0.6, 0.7, 0.8, 0.9, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with image_settings(ImageSettings(truncated="fill")) as how:
            try:
                picture = read_image(path)
            except BadFile as error:
                assert error.kind == "truncated"
                assert share < 0.65
                continue
        ((place, text),) = how.notes
        rows = int(text.split()[3])
        assert place == str(path)
        assert 160 <= rows <= 320 * share + 32
        assert torch.equal(picture[:, :rows], whole[:, :rows])
        mean = whole[:, :rows].float().mean((1, 2)).round().to(torch.uint8)
        assert (picture[:, rows:] == mean[:, None, None]).all()
        kept += 1
    assert kept >= 3
    path.write_bytes(data[:-2])
    assert torch.equal(read_image(path, truncated="fill"), whole)


def test_no_global_switch_is_touched(tmp_path: Path) -> None:
    """Pillow's own settings are as they were, with `fill` too."""
    from PIL import ImageFile

    data = encoded(photo(3, (320, 240)), "JPEG")
    (tmp_path / "x").write_bytes(data[: len(data) * 8 // 10])
    with image_settings(ImageSettings(truncated="fill")):
        read_image(tmp_path / "x")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == 89478485


def test_a_mode_without_meaning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of a mode that has no defined conversion is bad, and so is one with NaN pixels."""
    values = GREY.astype("float32")
    values[3, 3] = np.nan
    with pytest.raises(BadFile, match="NaN") as caught:
        read_image(saved(tmp_path, values, "TIFF"))
    assert caught.value.kind == "corrupt"
    strange = Image.fromarray(PIXELS)
    strange._mode = "BGR;15"
    monkeypatch.setattr(Image, "open", lambda *_, **__: strange)
    (tmp_path / "y").write_bytes(io.BytesIO(b"anything").getvalue())
    with pytest.raises(BadFile) as caught:
        read_image(tmp_path / "y")
    assert caught.value.kind == "unsupported_mode"
