"""A folder of PNG and JPEG images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ebm_dist.data.decode import MAX_PIXELS, Layout
from ebm_dist.data.manifest import SplitName
from ebm_dist.data.original import Original, Samples
from ebm_dist.errors import UserError
from ebm_dist.types import EventSpec

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_TEST_FOLDERS = ("test", "val", "valid", "validation")


def load(source: Path | None, resize: int | None) -> Original:
    """SOURCE/CLASS/*.png|jpg, or SOURCE/{train,test}/CLASS/…, or images without subfolders.

    Without folders for the splits, every tenth image of each class, by name, is test.
    """
    if source is None or not source.is_dir():
        came = "none" if source is None else f"{source}, which is not a directory"
        raise UserError(f"imagefolder: needs --source, a directory of images; got {came}")
    if resize is not None and resize < 1:
        raise UserError(f"resize: must be at least 1 pixel, got {resize}")
    test_folder = next((source / name for name in _TEST_FOLDERS if (source / name).is_dir()), None)
    if (source / "train").is_dir() and test_folder is not None:
        classes = _folder_classes(source / "train")
        train = _folder_files(source / "train", classes)
        test = _folder_files(test_folder, classes)
    else:
        classes = _folder_classes(source)
        files = _folder_files(source, classes)
        train, test = [], []
        for label in dict.fromkeys(label for _, label in files):
            own = [file for file in files if file[1] == label]
            test += own[9::10]
            train += [file for index, file in enumerate(own) if index % 10 != 9]
    if not train:
        raise UserError(f"{source}: holds no .png or .jpg images; check --source")

    first = _read_photo(train[0][0], resize, colour=None)
    colour = len(first) == 3
    # A folder may mix grey and colour; one colour image among the first makes all colour.
    if not colour:
        colour = any(len(_read_photo(path, resize, colour=None)) == 3 for path, _ in train[:50])
    shape = (3 if colour else 1, *first.shape[1:])

    def split(files: list[tuple[Path, int | None]]) -> Samples:
        def get(index: int) -> tuple[np.ndarray, int | None]:
            path, label = files[index]
            x = _read_photo(path, resize, colour=colour)
            if x.shape != shape:
                raise UserError(
                    f"{path}: is {x.shape[2]} x {x.shape[1]} pixels, but {train[0][0]} is "
                    f"{shape[2]} x {shape[1]}; pass resize to bring all to one size"
                )
            return x, label

        return Samples(len(files), get)

    splits: dict[SplitName, Samples] = {"train": split(train)}
    if test:
        splits["test"] = split(test)
    spec = EventSpec(shape, "image", len(classes) or None)
    layout = Layout(spec, 256, labelled=bool(classes))
    return Original("imagefolder", f"images of {source.name}", layout, tuple(classes), splits)


def _folder_classes(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _folder_files(folder: Path, classes: list[str]) -> list[tuple[Path, int | None]]:
    def images(directory: Path) -> list[Path]:
        return sorted(
            path
            for path in directory.rglob("*")
            if path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()
        )

    if not classes:
        return [(path, None) for path in images(folder)]
    stray = [path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES]
    if stray:
        raise UserError(
            f"{stray[0]}: lies beside the class folders {', '.join(classes[:3])}; move it into one"
        )
    return [(path, k) for k, name in enumerate(classes) for path in images(folder / name)]


def _read_photo(path: Path, resize: int | None, *, colour: bool | None) -> np.ndarray:
    """(C, H, W) uint8; `colour` None keeps the file's own choice of 1 or 3 channels.

    `resize` cuts the middle square out and scales it (Lanczos) to resize x resize.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: more than {MAX_PIXELS} pixels; make it smaller")
            image = ImageOps.exif_transpose(image)
            grey = image.mode in ("1", "L", "LA") if colour is None else not colour
            image = image.convert("L" if grey else "RGB")
            if resize is not None:
                # Cut first: scaling a box of the whole image would blend in what lies around it.
                side = min(image.size)
                image = ImageOps.fit(image, (side, side))
                image = image.resize((resize, resize), Image.Resampling.LANCZOS)
            x = np.asarray(image)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not a readable PNG or JPEG ({error}); remove it") from None
    return x[None] if x.ndim == 2 else np.ascontiguousarray(x.transpose(2, 0, 1))
