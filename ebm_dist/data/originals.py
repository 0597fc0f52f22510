"""The originals of the built-in data sets: digits, Fashion-MNIST, CIFAR-10, image folders, toys."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebm_dist.data.decode import MAX_PIXELS, Layout
from ebm_dist.data.manifest import SplitName
from ebm_dist.data.restricted_pickle import read_plain_pickle
from ebm_dist.data.toys import TOYS, toy
from ebm_dist.errors import UserError
from ebm_dist.section import nearest
from ebm_dist.seeds import derive_seed
from ebm_dist.types import EventSpec

FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the IDX files."""

FASHION_CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
NAMES = ("digits", "fashion-mnist", "cifar10", "imagefolder", "toy:NAME")
"""What `prepare` takes."""

_STATIC = {
    "digits": Layout(EventSpec((1, 8, 8), "image", 10), 17, labelled=True),
    "fashion-mnist": Layout(EventSpec((1, 28, 28), "image", 10), 256, labelled=True),
    "cifar10": Layout(EventSpec((3, 32, 32), "image", 10), 256, labelled=True),
}


@dataclass(frozen=True, slots=True)
class Samples:
    """One split, drawn one at a time so that a folder of photographs need not fit in memory."""

    num: int
    get: Callable[[int], tuple[np.ndarray, int | None]]


@dataclass(frozen=True, slots=True)
class Original:
    """A data set before it is written as shards."""

    name: str
    law: str
    layout: Layout
    classes: tuple[str, ...]
    splits: dict[SplitName, Samples]
    shard_size: int = 2500
    """Samples a shard: Fashion-MNIST makes 24 shards, so that up to 24 ranks read their own."""


def static_layout(name: str) -> Layout | None:
    """The layout of a built-in source without reading it; None for a path."""
    if name.startswith("toy:"):
        spec = toy(name.removeprefix("toy:")).spec
        return Layout(spec, None, labelled=spec.num_classes is not None)
    return _STATIC.get(name)


def load_original(
    name: str, source: Path | None, *, resize: int | None = None, toy_samples: int = 8192
) -> Original:
    """Read the originals of `name`.

    Raises:
        UserError: for an unknown name, or originals that are missing or damaged.
    """
    if resize is not None and name != "imagefolder":
        raise UserError(f"resize: is for imagefolder, not for {name}; leave it out")
    if name == "digits" or name.startswith("toy:"):
        if source is not None:
            raise UserError(f"--source: {name} needs no originals, got {source}; leave it out")
        if name == "digits":
            return _digits()
        return _toy(name.removeprefix("toy:"), toy_samples)
    if name == "fashion-mnist":
        return _fashion_mnist(source or FASHION_DIR)
    if name == "cifar10":
        return _cifar10(source)
    if name == "imagefolder":
        return _image_folder(source, resize)
    known = [*NAMES[:-1], *(f"toy:{toy_name}" for toy_name in TOYS)]
    raise UserError(
        f"unknown data set {name!r}{nearest(name, known)}; known: {', '.join(NAMES)}, where the "
        f"toys are {', '.join(sorted(TOYS))}"
    )


def _of_arrays(x: np.ndarray, label: np.ndarray | None) -> Samples:
    if label is None:
        return Samples(len(x), lambda i: (x[i], None))
    return Samples(len(x), lambda i: (x[i], int(label[i])))


def _digits() -> Original:
    """scikit-learn's digits, 1,797 images of 8x8 with 17 grey levels.

    Within each class every fifth image is test: the file runs by writer, so both splits have
    all writers and all classes.
    """
    from sklearn.datasets import load_digits

    pixels, target = (np.asarray(part) for part in load_digits(return_X_y=True))
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    test = np.zeros(len(x), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(target == digit)[4::5]] = True
    return Original(
        "digits",
        "scikit-learn's digits (UCI optical recognition of handwritten digits, test part)",
        _STATIC["digits"],
        tuple(str(digit) for digit in range(10)),
        {"train": _of_arrays(x[~test], target[~test]), "test": _of_arrays(x[test], target[test])},
    )


def _toy(name: str, num_train: int) -> Original:
    law = toy(name)

    def split(split_name: str, num: int) -> Samples:
        rng = np.random.default_rng(derive_seed(0, "data", "toy", name, split_name))
        x, label = law.draw(num, rng)
        return _of_arrays(x.astype(np.uint8 if law.spec.discrete else np.float32), label)

    num_classes = law.spec.num_classes
    return Original(
        f"toy:{name}",
        law.law,
        Layout(law.spec, None, labelled=num_classes is not None),
        tuple(f"component {k}" for k in range(num_classes or 0)),
        {"train": split("train", num_train), "test": split("test", max(1, num_train // 4))},
        shard_size=max(2500, num_train),
    )


# -- Fashion-MNIST


def _fashion_mnist(directory: Path) -> Original:
    def split(stem: str) -> Samples:
        images = _read_idx(directory, f"{stem}-images-idx3-ubyte", num_dims=3)
        labels = _read_idx(directory, f"{stem}-labels-idx1-ubyte", num_dims=1)
        if len(images) != len(labels) or images.shape[1:] != (28, 28) or labels.max() > 9:
            raise UserError(
                f"{directory}: {stem} has images {images.shape} and labels {labels.shape} up to "
                f"{labels.max()}; expected N images of 28x28 and N labels 0 to 9; fetch them again"
            )
        return _of_arrays(images[:, None], labels)

    return Original(
        "fashion-mnist",
        "Fashion-MNIST (Xiao, Rasul & Vollgraf 2017), its own train and test parts",
        _STATIC["fashion-mnist"],
        FASHION_CLASSES,
        {"train": split("train"), "test": split("t10k")},
    )


def _read_idx(directory: Path, stem: str, *, num_dims: int) -> np.ndarray:
    """A uint8 IDX file, gzipped or plain: 0, 0, 8, dimensions, big-endian sizes, bytes."""
    candidates = [directory / f"{stem}.gz", directory / stem]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise UserError(
            f"{candidates[0]}: is missing; install the Debian package (`apt-get install "
            "dataset-fashion-mnist`) or point --source at the directory of the IDX files"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * num_dims)
            if len(header) < 4 + 4 * num_dims or header[:4] != bytes([0, 0, 8, num_dims]):
                raise ValueError(f"its header is {header[:4].hex()}, not 000008{num_dims:02x}")
            shape = struct.unpack(f">{num_dims}I", header[4:])
            size = int(np.prod([int(n) for n in shape], dtype=object))
            if not 0 < size <= 2**30:
                raise ValueError(f"it claims {size} bytes")
            # One byte more than claimed, so that a longer file shows and a bomb does not unfold.
            data = stream.read(size + 1)
            if len(data) != size:
                raise ValueError(f"it claims {size} bytes and holds {min(len(data), size + 1)}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path}: not a whole IDX file ({error}); fetch it again") from None
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


# -- CIFAR-10

_CIFAR_MAX_FILE = 64 * 2**20
_CIFAR_TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))


def _cifar10(source: Path | None) -> Original:
    if source is None:
        raise UserError(
            "cifar10: needs --source, the file cifar-10-python.tar.gz or cifar-10-binary.tar.gz "
            "(https://www.cs.toronto.edu/~kriz/cifar.html) or the directory unpacked from it"
        )
    files = _cifar_files(source)

    def split(stems: tuple[str, ...]) -> Samples:
        parts = []
        for stem in stems:
            if stem in files:
                parts.append(_cifar_python(files[stem], f"{source}: {stem}"))
            elif f"{stem}.bin" in files:
                parts.append(_cifar_binary(files[f"{stem}.bin"], f"{source}: {stem}.bin"))
            else:
                raise UserError(f"{source}: has no {stem} or {stem}.bin; fetch the archive again")
        x, label = (np.concatenate(arrays) for arrays in zip(*parts))
        return _of_arrays(x, label)

    return Original(
        "cifar10",
        "CIFAR-10 (Krizhevsky 2009), its own train and test parts",
        _STATIC["cifar10"],
        CIFAR10_CLASSES,
        {"train": split(_CIFAR_TRAIN), "test": split(("test_batch",))},
    )


def _cifar_files(source: Path) -> dict[str, bytes]:
    """The batch files by base name, from the archive or the directory."""
    stems = (*_CIFAR_TRAIN, "test_batch")
    wanted = {*stems, *(f"{stem}.bin" for stem in stems)}
    files: dict[str, bytes] = {}

    def keep(name: str, size: int, read: Callable[[], bytes]) -> None:
        if size > _CIFAR_MAX_FILE:
            raise UserError(f"{source}: {name} has {size} bytes; a batch has about 30 million")
        files[name] = read()

    try:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.name in wanted and path.is_file():
                    keep(path.name, path.stat().st_size, path.read_bytes)
        elif source.is_file():
            with tarfile.open(source) as archive:
                for info in archive:
                    name = Path(info.name).name
                    member = archive.extractfile(info) if name in wanted and info.isreg() else None
                    if member is not None:
                        keep(name, info.size, member.read)
        else:
            raise UserError(f"{source}: is missing; --source takes CIFAR-10's archive or directory")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{source}: not a whole archive ({error}); fetch it again") from None
    return files


def _cifar_binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + 3 * 32 * 32
    if not data or len(data) % record:
        raise UserError(f"{where}: {len(data)} bytes, not a multiple of {record}; fetch it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    return _cifar_checked(records[:, 1:], records[:, 0], where)


def _cifar_python(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = read_plain_pickle(data, where=where)
    x = batch.get("data") if isinstance(batch, dict) else None
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if not (
        isinstance(x, np.ndarray)
        and isinstance(labels, list)
        and x.shape == (len(labels), 3 * 32 * 32)
        and all(type(label) is int and 0 <= label <= 255 for label in labels)
    ):
        raise UserError(
            f"{where}: expected 'data' (N, 3072) and N integer 'labels'; this is not a batch of "
            "CIFAR-10's python archive"
        )
    return _cifar_checked(x, np.array(labels, dtype=np.uint8), where)


def _cifar_checked(x: np.ndarray, label: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(label) == 0 or label.max() > 9:
        raise UserError(
            f"{where}: {len(label)} labels, of which some are not 0 to 9; is it CIFAR-10?"
        )
    return x.reshape(-1, 3, 32, 32), label


# -- a folder of images

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_TEST_FOLDERS = ("test", "val", "valid", "validation")


def _image_folder(source: Path | None, resize: int | None) -> Original:
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
