"""Publish a finished export on the Hugging Face hub, with the hub's own client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pat_serve.errors import HubError, UsageError, first_line

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def check_hub(repo_id: str) -> None:
    """Check before the export's work that the name is legal, and that the hub answers and knows the user.

    The endpoint and the token are the client's: HF_ENDPOINT, HF_TOKEN or `hf auth login`.

    Raises:
        UsageError: the hub does not take the name.
        HubError: the hub is offline, or the token is not valid.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            "--push-to-hub", expected="a repository such as name/model", found=repo_id, fix=first_line(error)
        ) from error
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"--push-to-hub {repo_id}",
            expected="a token of the hub",
            found="none",
            fix="Set HF_TOKEN or run hf auth login.",
        ) from error
    except HfHubHTTPError as error:
        raise HubError(
            f"--push-to-hub {repo_id}",
            expected=f"{constants.ENDPOINT} to accept the token",
            found=_refusal(error),
            fix="Set HF_TOKEN to a token that may write, or run hf auth login.",
        ) from error
    except (OfflineModeIsEnabled, OSError) as error:
        raise _unreachable(repo_id, error) from error
    except Exception as error:
        if not _is_transport_error(error):
            raise
        raise _unreachable(repo_id, error) from error


def push_to_hub(folder: Path, repo_id: str, *, private: bool) -> str:
    """Create the repository if need be and upload a finished export as one commit.

    Args:
        folder: the export; it stays as it is, whatever happens here.
        repo_id: name/model.
        private: create a private repository; an existing repository stays as it is.

    Returns:
        the commit's address.

    Raises:
        HubError: the hub refused or was not reached; the message says how to try again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        # A model that was pushed before may have had other shards. Loaders could take them by name.
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload a pruned model",
            ignore_patterns=[".*"],
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.gguf"],
        )
    except HfHubHTTPError as error:
        raise _failed(folder, repo_id, _refusal(error)) from error
    except Exception as error:
        if not (isinstance(error, OSError) or _is_transport_error(error)):
            raise
        raise _failed(folder, repo_id, first_line(error)) from error
    return str(commit.commit_url)


def _refusal(error: HfHubHTTPError) -> str:
    """Take the status and the hub's own words from the client's message, where they stand far apart."""
    return f"{first_line(error)} {error.server_message or ''}".strip()


def _is_transport_error(error: Exception) -> bool:
    """The connection failed: an error of the HTTP library, which is httpx or httpx2 by the client's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError.__bases__[0])


def _unreachable(repo_id: str, error: Exception) -> HubError:
    from huggingface_hub import constants

    return HubError(
        f"--push-to-hub {repo_id}",
        expected=f"{constants.ENDPOINT} within reach",
        found="offline mode (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else first_line(error),
        fix="Leave --push-to-hub out, and push the finished folder later with hf upload.",
    )


def _failed(folder: Path, repo_id: str, reason: str) -> HubError:
    return HubError(
        f"--push-to-hub {repo_id}",
        expected="the hub to take the files",
        found=reason,
        fix=f"The export itself is complete; try again with: hf upload {repo_id} {folder} .",
    )
