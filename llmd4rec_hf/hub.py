# SPDX-License-Identifier: Apache-2.0
"""A finished run on the Hub: both models, each with its card."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import HfApi

from .errors import RunStateError
from .training.model_card import run_card


def push_run(
    output_dir: str | os.PathLike,
    hub_model_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    **metadata,
) -> list[str]:
    """
    Push the two models of a finished run, each with vocabulary and card; an LLM with an adapter without base weights.

    Args:
        output_dir (`str`): where [`MutualDistillation`] ran.
        hub_model_id (`str`): `USER/NAME`; the repositories are `USER/NAME-crm` and `USER/NAME-llm`.
        private (`bool`, *optional*): whether repositories that are made now are private.
        token (`str`, *optional*): the one that `hf auth login` stored by default.
        metadata: further fields of the cards' headers: `license`, `language`, `tags`, `datasets`, ...

    Returns:
        `list[str]`: the ids of both repositories.

    Raises:
        RunStateError: there is no finished run.
    """
    path = Path(output_dir, "results.json")
    if not path.is_file():
        raise RunStateError(f"{output_dir} holds no results.json: let the run end before it is pushed.")
    results, api = json.loads(path.read_text()), HfApi(token=token)
    repositories = []
    for side in ("crm", "llm"):
        folder = Path(output_dir, side)
        repository = api.create_repo(f"{hub_model_id}-{side}", private=private, exist_ok=True).repo_id
        (folder / "README.md").write_text(run_card(results, folder, side, repository, **metadata), encoding="utf-8")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="End of mutual distillation")
        repositories.append(repository)
    return repositories
