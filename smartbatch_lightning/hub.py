"""The Hugging Face Hub: loading from it if it can be reached, else from its cache; and pushing an exported model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError

from smartbatch_lightning.console import echo
from smartbatch_lightning.errors import UsageError, root_cause_message


@contextmanager
def hub_or_cache(name: str, repo_type: str = "model") -> Iterator[None]:
    """A context for loading from the Hub, in huggingface_hub's offline mode if the Hub cannot be reached.

    In online mode, huggingface_hub would try for half a minute to get each file that is not cached, even optional ones,
    and report a missing folder as an invalid name.

    Args:
        name: Name of a repository, or a folder.
        repo_type: `model` or `dataset`.

    Raises:
        OSError: There is no such folder; or the Hub cannot be reached, and something is not cached.
    """
    unreachable = None
    try:
        if not Path(name).exists():
            url = hf_hub_url(name, constants.REPOCARD_NAME, repo_type=repo_type)
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HFValidationError:
        if repo_type == "model":  # data sets may have other names, such as those of buckets
            raise FileNotFoundError("there is no such folder") from None
    except OSError:  # the Hub has answered with an error, or huggingface_hub is in offline mode
        pass
    except Exception as error:  # raised by the HTTP library, which depends on the version of huggingface_hub
        unreachable, constants.HF_HUB_OFFLINE = error, True
    try:
        yield
    except OSError:
        if unreachable is not None:
            raise ConnectionError(str(unreachable)) from unreachable
        raise
    finally:
        if unreachable is not None:
            constants.HF_HUB_OFFLINE = False


def create_repository(repo_id: str, private: bool | None) -> str:
    """Creates a model repository unless it exists, and thereby checks that a folder can be pushed to it.

    Args:
        repo_id: Its name, with or without the owner.
        private: Whether to make it private if it is created; None for the owner's setting.

    Returns:
        Its name, with the owner.

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
    except Exception as error:  # about the Hub, the network or the name
        raise UsageError(
            f"push_to_hub is {repo_id!r}, but the repository cannot be created or written: {root_cause_message(error)} "
            "Check its name, the token and the network, or leave out push_to_hub."
        ) from error


def push_folder(folder: Path, repo_id: str, commit_message: str | None) -> None:
    """Uploads all files of a folder to a repository.

    Raises:
        ValueError: The upload fails.
    """
    try:
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message or "Upload model")
    except Exception as error:  # about the Hub or the network
        raise UsageError(
            f"the model is in {folder}, but was not pushed to {repo_id}: {root_cause_message(error)} Push it with "
            f"`hf upload {repo_id} {folder}`."
        ) from error
    echo(f"Pushed the model to {constants.ENDPOINT}/{repo_id}")
