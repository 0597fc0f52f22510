"""The commands of `ebm-dist data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebm_dist.commands.options import Argument, Option
from ebm_dist.core.errors import UserError, one_line

data_app = typer.Typer(help="Prepare data as shards.", no_args_is_help=True)


@data_app.command(
    "prepare",
    epilog="Example: ebm-dist data prepare digits data/digits\n\n"
    "Images: ebm-dist data prepare imagefolder data/photos --source PHOTOS --resize 64\n\n"
    "Your own: ebm-dist data prepare my_pkg.data:dataset data/mine params.size=32 holdout=0.1\n\n"
    "Then: ebm-dist train configs/digits.yaml data.source=data/digits",
)
def data_prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="digits, mnist, fashion-mnist, cifar10, imagefolder, toy:NAME, or the MODULE:NAME "
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
    resize: Annotated[
        int | None,
        typer.Option(help="For imagefolder: crop images to squares and resize to this side."),
    ] = None,
) -> None:
    """Write a data set as webdataset shards, and print the number of events per class."""
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
    prepare(what, out_dir, source=source, resize=resize, say=lambda line: print(one_line(line)))
