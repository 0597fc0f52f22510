"""The commands about the models that come with the package."""

from __future__ import annotations

import typer

pretrained_app = typer.Typer(help="The models that come with the package.", no_args_is_help=True)


@pretrained_app.callback()
def _group() -> None:
    """So that `list` is a command of its own."""


@pretrained_app.command("list", epilog="Example: ebm-dist pretrained list")
def list_models() -> None:
    """Name, energy, events and size of each; the name stands for the path of an export."""
    from rich.console import Console
    from rich.table import Table

    from ebm_dist.export.pretrained import FOLDER, list_pretrained
    from ebm_dist.export.reader import open_export

    table = Table("name", "energy", "events", "classes", "parameters", "KiB", box=None)
    for name in list_pretrained():
        export, folder = open_export(FOLDER / name), FOLDER / name
        size = sum(path.stat().st_size for path in folder.iterdir()) >> 10
        table.add_row(
            name,
            export.config["energy"]["name"],
            f"{export.spec.kind} {'x'.join(map(str, export.spec.shape))}",
            str(export.config["energy"].get("num_classes") or "-"),
            f"{sum(p.numel() for p in export.energy.parameters()):,}",
            str(size),
        )
    Console().print(table)
    print(f"cards: {FOLDER}/NAME/README.md")
