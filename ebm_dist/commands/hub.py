"""The command that uploads an export to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from ebm_dist.commands.options import ExportDir, License


def push(
    checkpoint: ExportDir,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", show_default=False)],
    license_id: License = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new model private; else as your account says.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
) -> None:
    """Upload an export to the Hugging Face Hub, as whom `hf auth login` or HF_TOKEN says."""
    from ebm_dist.export.push import push_to_hub

    print(
        push_to_hub(checkpoint, repo, license=license_id, private=private or None, message=message)
    )
