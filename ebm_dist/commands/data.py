"""The commands of `ebm-dist data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebm_dist.commands.options import Argument, Option
from ebm_dist.core.errors import UserError, one_line

data_app = typer.Typer(help="Write data as shards, and check shards.", no_args_is_help=True)


@data_app.command(
    "prepare",
    epilog="Example: ebm-dist data prepare digits data/digits\n\n"
    "Images: ebm-dist data prepare imagefolder data/faces --source FACES --crop 140 --resize 64\n\n"
    "Labels: ebm-dist data prepare imagefolder data/birds --source BIRDS --labels birds.csv\n\n"
    "Arrays: ebm-dist data prepare arrays data/blood --source bloodmnist.npz\n\n"
    "EMNIST: ebm-dist data prepare idx data/letters --source gzip/emnist-letters\n\n"
    "Your own: ebm-dist data prepare my_pkg.data:dataset data/mine params.size=32 holdout=0.1\n\n"
    "Then: ebm-dist train configs/digits.yaml data.source=data/digits",
)
def data_prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="digits, mnist, fashion-mnist, idx (EMNIST and other sets in MNIST's format), "
            "cifar10, cifar100, imagefolder, arrays (.npz or .npy), toy:NAME, or the MODULE:NAME "
            "of a dataset of your own, which is imported.",
            show_default=False,
        ),
    ],
    out_dir: Annotated[Path, Argument(help="The directory to write.")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Keys of the data section for MODULE:NAME, e.g. params.size=32."),
    ] = None,
    source: Annotated[Path | None, Option(help="The original files.")] = None,
    labels: Annotated[
        Path | None,
        Option(help="A JSON, CSV or TSV of labels: of images by name, of arrays in their order."),
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Cut a square of this side out of the middle of each image.")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Scale images to this side; without --crop their largest square is cut out first."
        ),
    ] = None,
) -> None:
    """Write a data set as shards and a picture of some samples, and count those of each class."""
    from ebm_dist.config.text import apply_override, validate
    from ebm_dist.core.plugins import import_plugins
    from ebm_dist.data import DataConfig, prepare
    from ebm_dist.data.sources.originals import is_target

    what: str | DataConfig = name
    if is_target(name):
        section = {"source": "module", "target": name}
        for key in keys or []:
            section = apply_override(section, key, DataConfig)
        what = validate(DataConfig, section)
        import_plugins([])  # so that the working directory is searched
    elif keys:
        raise UserError(f"{keys[0]}: keys are for a dataset of your own, MODULE:NAME; leave it out")
    prepare(
        what,
        out_dir,
        source,
        labels=labels,
        crop=crop,
        resize=resize,
        say=lambda line: print(one_line(line)),
    )
    print(one_line(_draw(out_dir)))


_MAX_ROWS = 16
"""Classes up to this number have a row each in the picture."""


def _draw(directory: Path) -> Path:
    """The picture of some training samples, written beside the shards."""
    import torch

    from ebm_dist.data import DataConfig, describe, load_split
    from ebm_dist.report.grid import save_grid

    config = DataConfig(source=str(directory.absolute()))
    spec = describe(config)
    batch = load_split(config, "train", 1024)
    num_columns, rows = None, torch.arange(min(64, len(batch.x)))
    num_classes = spec.num_classes or 0
    if batch.label is not None and spec.kind == "image" and 2 <= num_classes <= _MAX_ROWS:
        of_class = [(batch.label == k).nonzero()[:, 0] for k in range(num_classes)]
        num_columns = min(8, *(len(some) for some in of_class)) or None
        if num_columns is not None:  # else a class is too rare to have a row
            rows = torch.cat([some[:num_columns] for some in of_class])
    return save_grid(batch.x[rows], directory / "samples.png", spec, num_columns=num_columns)


_MAX_FAULTS = 100
"""Faults that `data check` names; the others are counted."""


@data_app.command(
    "check",
    epilog="Example: ebm-dist data check data/digits\n\n"
    "Plain shards: ebm-dist data check 'shards/*.tar' --member jpg --num-classes 10\n\n"
    "Exit codes: 0 all of it can be read, 2 some of it cannot.",
)
def data_check(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="A directory, tars, a brace pattern or a glob, as in data.source.",
            show_default=False,
        ),
    ],
    member: Annotated[
        str | None, typer.Option(help="data.member, for plain shards.", show_default=False)
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="data.kind, for plain shards.", show_default=False)
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="data.num_classes, for plain shards.", show_default=False)
    ] = None,
) -> None:
    """Read every sample of SHARDS, count them by class and name those that are bad."""
    from ebm_dist.config.text import validate
    from ebm_dist.data import DataConfig
    from ebm_dist.data.examine import examine
    from ebm_dist.data.sources.prepare import counted

    where = {"source": shards[0]} if len(shards) == 1 else {"shards": shards}
    keys = {"member": member, "kind": kind, "num_classes": num_classes}
    config = validate(DataConfig, where | {k: v for k, v in keys.items() if v is not None})
    num_said = 0

    def say(line: str) -> None:
        nonlocal num_said
        num_said += 1
        if num_said <= _MAX_FAULTS:
            print(f"bad: {one_line(line)}", flush=True)

    found = examine(config, say)
    if num_said > _MAX_FAULTS:
        print(f"bad: {num_said - _MAX_FAULTS} more")
    names = tuple(str(label) for label in range(max(found.by_class, default=-1) + 1))
    whole = counted(found.num_samples, found.by_class, names)
    print(f"{found.num_shards} shards: {whole}")
    if num_said:
        raise UserError(
            f"{config.location}: {found.num_bad_samples} bad samples and {found.num_bad_shards} "
            f"bad shards of {found.num_shards}; write them again, or leave bad samples out of a "
            "run by data.on_bad_sample=skip"
        )
