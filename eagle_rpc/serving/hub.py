"""Drafts on the Hugging Face hub: their files, downloaded and uploaded by huggingface_hub."""

from pathlib import Path
from typing import Any

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"


def local_copy(name: str | Path, **download: Any) -> Path:
    """The directory `name`, or the local copy of the files of the repository `name`, downloaded if it is absent.

    `download` are arguments of `huggingface_hub.snapshot_download`, whose errors it raises.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    return Path(snapshot_download(str(name), allow_patterns=files, **download))


def upload(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Add an EAGLE-3 draft",
    create_pr: bool = False,
) -> str:
    """Commits the files of a directory to `repo_id`, which is made if it is absent; returns the commit's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=directory,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    return commit.commit_url
