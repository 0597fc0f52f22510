"""The command that turns a checkpoint of another program into an export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ebm_dist.commands.options import Argument


def import_weights(
    program: Annotated[Literal["igebm", "jem"], typer.Argument(show_default=False)],
    file: Annotated[Path, Argument(help="The checkpoint, as torch.save wrote it.")],
    out_dir: Annotated[Path, Argument(help="The export to write.")],
) -> None:
    """Write a published checkpoint as an export; code in it is not run.

    igebm: the network of Du and Mordatch (2019), in its PyTorch port.

    jem: the joint energy-classifier of Grathwohl et al. (2020), without norms.
    """
    from ebm_dist.export.foreign.igebm import import_igebm
    from ebm_dist.export.foreign.jem import import_jem

    print({"igebm": import_igebm, "jem": import_jem}[program](file, out_dir))
