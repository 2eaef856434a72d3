"""A folder becomes a model on the Hub."""

import logging
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)


def check_can_publish(name: str, token: str | bool | None = None) -> None:
    """
    Long work asks before it begins.

    Raises:
        ValueError: if `name` can be no model's on the Hub.
        PermissionError: if nobody is logged in there.
        OSError: if it cannot be reached.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"`push_to_hub` is {name!r}, which can be no name on the Hub: {error}") from error
    try:
        HfApi().whoami(token=token)
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise PermissionError(
            "`push_to_hub` needs to know who you are: `hf auth login`, or pass a `token` that may write."
        ) from error
    except Exception as error:  # its HTTP client has errors of its own
        raise OSError(f"`push_to_hub`: the Hub cannot be reached ({error}).") from error


def publish(directory: Path, name: str, token: str | bool | None = None) -> str:
    """
    Upload a folder, to a repository that is created unless it exists.

    Returns:
        Its address.

    Raises:
        OSError: if the Hub refuses it, or cannot be reached. The folder stays, and the message says how to go on.
    """
    api = HfApi(token=token)
    try:
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=directory, repo_id=name, commit_message="Upload sparse groups")
    except Exception as error:  # refused, lost on the way, a card with errors: of many kinds
        raise OSError(
            f"{directory} is written, but not on the Hub: {error}. `hf upload {name} {directory}` tries again."
        ) from error
    logger.info("Uploaded to %s", url)
    return str(url)
