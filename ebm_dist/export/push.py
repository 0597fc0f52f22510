"""Uploads an export to the Hugging Face Hub, in the layout of the hub's own custom models."""

from __future__ import annotations

import importlib
from pathlib import Path

from ebm_dist.core.errors import UserError
from ebm_dist.export.front_matter import front_matter, has_front_matter, with_license
from ebm_dist.export.hub import REPOSITORY, client, explained
from ebm_dist.export.layout import CARD, CHAINS, CONFIG, GRID, WEIGHTS
from ebm_dist.export.reader import Export, find_export, read_weights
from ebm_dist.files.safe_open import open_to_read


def push_to_hub(
    export: Export | str | Path,
    repo: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    message: str | None = None,
) -> str:
    """Upload `export` as the model `repo` of the Hugging Face Hub; creates the model if needed.

    `hf auth login` or the variable HF_TOKEN says who you are. `load_energy("hf://USER/NAME")` loads
    the model again.

    Args:
        export: the path of an export or of a run with one, the name of a pretrained model, or the
            result of `open_export`.
        repo: USER/NAME, or ORGANISATION/NAME.
        license: identifier of the model's licence, such as apache-2.0, written into the card.
        private: whether a new model is private; None leaves that to the account's settings.
        message: the first line of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: the export is damaged, `repo` is no such name, the hub refuses, or its client is
            not installed.
        RunFailed: the hub did not answer, or the upload broke off.
    """
    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"{repo}: expected USER/NAME, a model on the hub")
    address = f"hf://{repo}"
    api = client(address)
    folder = find_export(export.path if isinstance(export, Export) else export)
    config, _ = read_weights(folder)  # what is damaged is not published
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    if not has_front_matter(card):
        card = front_matter(repo.partition("/")[2], config, {}) + card
    if license is not None:
        card = with_license(card, license)
    card = card.replace('load_energy("PATH"', f'load_energy("{address}"')
    card = card.replace("ebm-dist sample PATH", f"ebm-dist sample {address}")
    add = importlib.import_module("huggingface_hub").CommitOperationAdd
    operations = [add(path_in_repo=CARD, path_or_fileobj=card.encode())]
    for name in (CONFIG, WEIGHTS, CHAINS, GRID):
        if (folder / name).exists():
            open_to_read(folder / name).close()  # a link could publish any file of the user
            operations.append(add(path_in_repo=name, path_or_fileobj=folder / name))
    with explained(address):
        api.create_repo(repo, private=private, exist_ok=True)
        message = message or f"Export of {config.get('lineage', {}).get('run', folder.name)}"
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
