"""Pictures as clips: folders of images, and animated WebP and PNG; read with Pillow."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from emt.errors import EmtError
from emt.video.clip import FOLDER_FPS, MAX_PIXELS, ClipInfo, Fit, fitted
from emt.video.names import natural_key, show, unusable

IMAGE_SUFFIXES: frozenset[str] = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp"})
"""Suffixes of images that make up a folder of frames."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MOST_WORK = 1 << 32  # pixels of all frames of an animation, which are decoded in turn: about a minute
_LARGE = 1 << 24  # pixels; larger pictures are decoded one at a time, so that parallel readers hold one of them
_one_at_a_time = threading.Lock()

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Of large or slightly damaged pictures Pillow warns on stderr, in its own words; here they are read, or are an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image_name(name: str) -> bool:
    """Return whether a file's name is that of a frame in a folder of images."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_animation(path: Path) -> bool:
    """Return whether a file is a WebP or PNG picture with more than one frame; only its header is read."""
    try:
        with picture(path, ("PNG", "WEBP")) as image:
            return bool(getattr(image, "is_animated", False))
    except EmtError:
        return False


@contextmanager
def picture(path: Path, formats: tuple[str, ...] = _FORMATS) -> Iterator[Image.Image]:
    """Context manager: a picture that Pillow opened, in whose block every exception is Pillow's about this file.

    Raises:
        EmtError: It is missing, no picture, too large or damaged. (Pillow raises exceptions of at least ten kinds.)
    """
    try:
        if not path.is_file():
            raise OSError("it is no file (a broken link, a folder or a pipe)")
        with Image.open(path, formats=formats) as image:
            scalable = image.format in ("JPEG", "MPO")  # decoded at a fraction of its size
            if image.width * image.height > MAX_PIXELS * (2 if scalable else 1):
                raise ValueError(f"{image.width}x{image.height} is too large ({MAX_PIXELS:,} pixels are read)")
            yield image
    except EmtError:
        raise
    except Image.UnidentifiedImageError as error:
        raise EmtError(f"{show(path)} is no image, whatever its name says.", "Replace it, or remove it.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "Resize it, or remove it." if "too large" in reason else "Replace it, or remove it."
        raise EmtError(f"{show(path)} cannot be read as an image: {reason.rstrip('.')}.", hint) from error


@dataclass(frozen=True)
class Images:
    """A folder of images, one for each frame."""

    info: ClipInfo
    times: np.ndarray
    files: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> Images:
        """Open a folder: list its images in natural order, and read the size of the first.

        Raises:
            EmtError: There are none, or the first cannot be read.
        """
        try:
            names = [entry.name for entry in path.iterdir() if is_image_name(entry.name)]
        except OSError as error:
            raise unusable(path, error, "read") from error
        if not names:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise EmtError(
                f"The folder {show(path)} holds no images ({kinds}).", "Name such a folder, or a video file."
            )
        files = tuple(path / name for name in sorted(names, key=natural_key))
        with picture(files[0]) as image:
            width, height = _upright_size(image)
            try:
                fps = float(image.info["fps"])
            except (KeyError, TypeError, ValueError):
                fps = FOLDER_FPS
        fps = fps if 0.01 <= fps <= 1000 else FOLDER_FPS
        count = len(files)
        return cls(ClipInfo(path, width, height, fps, count, count / fps), np.arange(count) / fps, files)

    def read(self, picked: np.ndarray, out: np.ndarray, fit: Fit) -> tuple[str, ...]:
        """Read frames; see `Source.read`."""
        for i, frame in enumerate(out):
            if i and picked[i] == picked[i - 1]:
                frame[:] = out[i - 1]
                continue
            path = self.files[picked[i]]
            with picture(path) as image:
                size = _upright_size(image)
                if size != (self.info.width, self.info.height):
                    raise EmtError(
                        f"{show(path)} is {size[0]}x{size[1]}, but {show(Path(self.files[0].name))} in the same folder"
                        f" is {self.info.width}x{self.info.height}.",
                        "All images of a clip must have one size: resize them, or put other clips into other folders.",
                    )
                if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                    raise EmtError(
                        f"{show(path)} is an animation, but the images beside it are frames of one clip.",
                        "Move it into another folder.",
                    )
                with _one_at_a_time if image.width * image.height > _LARGE else nullcontext():
                    place(image, frame, fit)
        return ()

    def counted(self) -> Images:
        """Itself: every image is a frame."""
        return self


@dataclass(frozen=True)
class Animation:
    """An animated WebP or PNG file; a picture with one frame is one too.

    Attributes:
        first: Number, in the file, of the first frame: a PNG's picture for other viewers is none of the animation's.
    """

    info: ClipInfo
    times: np.ndarray
    first: int

    @classmethod
    def open(cls, path: Path) -> Animation:
        """Open a file, decoding all of it: only then does it say how long each frame is on show.

        As browsers do, a frame of at most 10 ms is shown for 100 ms.

        Raises:
            EmtError: It cannot be read.
        """
        with picture(path, ("PNG", "WEBP")) as image:
            size, count = _upright_size(image), int(getattr(image, "n_frames", 1))
            if count * image.width * image.height > _MOST_WORK:
                many = f"{count:,} frames of {size[0]}x{size[1]}"
                raise EmtError(f"{show(path)} has {many}, too many for an animation.", "Convert it to .mp4.")
            first = 1 if count > 1 and image.info.get("default_image") else 0
            lengths = []
            for number in range(first, count):
                _seek(image, number)
                shown = float(image.info.get("duration", 0))
                lengths.append(shown / 1000 if shown > 10 else 0.1)
        ends = np.cumsum(lengths)
        info = ClipInfo(path, *size, round(len(ends) / ends[-1], 9), len(ends), round(float(ends[-1]), 9))
        return cls(info, ends - lengths, first)

    def read(self, picked: np.ndarray, out: np.ndarray, fit: Fit) -> tuple[str, ...]:
        """Read frames; see `Source.read`."""
        with picture(self.info.path, ("PNG", "WEBP")) as image:
            number = -1
            for wanted, frame in zip(picked.tolist(), out):
                while number < wanted:
                    number += 1
                    _seek(image, number + self.first)
                place(image, frame, fit)
        return ()

    def counted(self) -> Animation:
        """Itself: all of it was decoded to open it."""
        return self


def _seek(image: Image.Image, number: int) -> None:
    if number or getattr(image, "is_animated", False):
        image.seek(number)
    image.load()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged notes about the picture; viewers show it as it is stored
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else (image.width, image.height)


def place(image: Image.Image, frame: np.ndarray, fit: Fit) -> None:
    """Bring a picture to a frame's size, upright, over white where it is transparent."""
    height, width = frame.shape[:2]
    orientation = _orientation(image)
    # In the stored orientation: only the small result is turned. Parts and bars are centred, so they turn along.
    target = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    image.draft("RGB", (2 * max(width, height),) * 2)  # JPEG: decode at a fraction of the size
    profile = image.info.get("icc_profile")
    if image.mode in ("CMYK", "L"):
        image = _in_srgb(image, profile)
    flat = _flat(image)
    box, size = fitted(*flat.size, target, fit)
    if size != flat.size or box != (0, 0, *flat.size):
        flat = flat.resize(size, Image.Resampling.BILINEAR, box)
    flat = _in_srgb(flat, profile)
    if flat.mode == "RGBA":
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat).convert("RGB")
    if orientation in _UPRIGHT:
        flat = flat.transpose(_UPRIGHT[orientation])
    x, y = (width - flat.width) // 2, (height - flat.height) // 2
    frame[:] = 0
    frame[y : y + flat.height, x : x + flat.width] = np.asarray(flat)


def read_picture(path: Path, size: tuple[int, int], fit: Fit = "crop") -> np.ndarray:
    """Read one picture in a size.

    Args:
        path: Of the file.
        size: (width, height) in pixels.
        fit: How to reach it.

    Returns:
        RGB, uint8, (height, width, 3).

    Raises:
        EmtError: It is missing, no picture, too large or damaged.
    """
    frame = np.empty((size[1], size[0], 3), np.uint8)
    with picture(path) as image:
        place(image, frame, fit)
    return frame


def _flat(image: Image.Image) -> Image.Image:
    """RGB, or RGBA if anything is transparent."""
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """A picture in sRGB, from what its ICC profile says; as it is without one, or with one that is of no use."""
    if not isinstance(profile, bytes) or (transform := _transform(profile, image.mode)) is None:
        return image
    return ImageCms.applyTransform(image, transform) or image


@lru_cache(4)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform of a picture to sRGB; None if it is there, or if the profile is damaged or of other pictures."""
    target = "RGBA" if mode == "RGBA" else "RGB"
    try:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        made = ImageCms.ImageCmsTransform(ImageCms.ImageCmsProfile(io.BytesIO(profile)), srgb, mode, target)
        ramp = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)]).convert(mode)
        shown = np.asarray(made.apply(ramp).convert("RGB"), np.int16)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return None if np.abs(shown - np.asarray(ramp.convert("RGB"), np.int16)).max() <= 2 else made
