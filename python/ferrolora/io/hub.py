"""Adapter directories on the Hugging Face Hub. huggingface_hub is imported only when a repository is named."""

from os import PathLike
from pathlib import Path
from typing import Any

from ferrolora.errors import FormatError
from ferrolora.io.adapter import CARD_NAME, CONFIG_NAME, PICKLED_WEIGHTS_NAME, WEIGHTS_NAME

_ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME, PICKLED_WEIGHTS_NAME, CARD_NAME)


def local_directory(
    name: str | PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The directory that holds an adapter: `name` itself, or the downloaded snapshot of the repository `name`.

    Args:
        name: a directory, or `owner/repository`.
        subfolder: folder inside it; default none.
        revision: branch, tag or commit of a repository; default the main branch.
        token: access token, or True for the stored one.
        cache_dir: where snapshots are kept; default huggingface_hub's.

    Raises:
        FormatError: `name` is neither a directory nor the name of a repository.
    """
    directory = Path(name)
    if directory.is_dir():
        return directory / subfolder if subfolder else directory
    if str(name).count("/") != 1 or str(name).startswith(("/", ".", "~")):
        raise FormatError(f"{str(name)!r} is neither a directory nor a repository owner/name on the Hub")
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{file}" if subfolder else file for file in _ADAPTER_FILES]
    snapshot = snapshot_download(str(name), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=wanted)
    return Path(snapshot) / subfolder if subfolder else Path(snapshot)


def upload_directory(directory: Path, repo_id: str, **options: Any) -> str:
    """Creates the repository `repo_id` if need be, uploads `directory` as one commit, returns the commit's URL.

    Args:
        directory: what to upload.
        repo_id: `owner/name`, or `name` for one's own account.
        **options: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    created = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
    commit = api.upload_folder(folder_path=directory, repo_id=created.repo_id, **options)
    return str(commit.commit_url)
