"""Hugging Face's Hub: loading from it where it can be reached, and pushing an exported model to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from smartbatch_lightning.console import echo
from smartbatch_lightning.errors import UsageError, root_cause_message


def connection_error(name: str, repo_type: str = "model") -> Exception | None:
    """Why the Hub cannot be asked for a repository; None where it answers, and in huggingface_hub's offline mode."""
    try:
        url = hf_hub_url(name, constants.REPOCARD_NAME, repo_type=repo_type)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, ValueError):  # the answer, the mode, or a name that there cannot be
        return None
    except Exception as error:  # of the library for HTTP, which is another one for each version of huggingface_hub
        return error
    return None


def hub_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` by which it reads the cache alone where the Hub cannot be reached.

    By itself huggingface_hub tries for half a minute to get each file that is not cached, also those that a model need
    not have.

    Args:
        name: Of a model on the Hub, or a folder.
        options: That are given.

    Raises:
        ValueError: There is no such folder, and it cannot be a name on the Hub; or nothing of it is cached, and the Hub
            cannot be reached.
    """
    if Path(name).exists():
        return dict(options)
    remedy = "Give the path of a folder written by save_pretrained, or a name on the Hub and a network."
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"there is no folder {name!r}. {remedy}") from error
    unreachable = None if options.get("local_files_only") else connection_error(name)
    if unreachable is None:
        return dict(options)
    cache = Path(options.get("cache_dir") or constants.HF_HUB_CACHE)
    if not (cache / repo_folder_name(repo_id=name, repo_type="model")).exists():
        raise UsageError(
            f"{name!r} is neither a folder nor cached, and the Hub cannot be reached: "
            f"{root_cause_message(unreachable)} {remedy}"
        ) from unreachable
    return {**options, "local_files_only": True}


def create_repository(repo_id: str, private: bool | None = None) -> str:
    """Creates a model repository unless it is there, which shows that a folder can be pushed to it.

    Args:
        repo_id: Its name, with or without its owner.
        private: Whether it is private if it is created; None for the owner's default.

    Returns:
        Its name, with its owner.

    Raises:
        ValueError: There is no token, or the Hub refuses.
    """
    if get_token() is None:
        raise UsageError(
            f"push_to_hub is {repo_id!r}, but there is no token for the Hub. "
            "Log in with `hf auth login`, or set HF_TOKEN."
        )
    try:
        return HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # of the Hub, the network or the name
        raise UsageError(
            f"push_to_hub is {repo_id!r}, but the repository cannot be created or written: {root_cause_message(error)} "
            "Check its name, the token and the network, or leave out push_to_hub."
        ) from error


def push_folder(folder: Path, repo_id: str, commit_message: str | None = None) -> None:
    """Uploads all files of a folder to a repository.

    Raises:
        ValueError: That fails.
    """
    try:
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload model")
    except Exception as error:  # of the Hub or the network
        raise UsageError(
            f"the model is in {folder}, but was not pushed to {repo_id}: {root_cause_message(error)} Push it by "
            f"`hf upload {repo_id} {folder}`."
        ) from error
    echo(f"Pushed the model to {constants.ENDPOINT}/{repo_id}")
