"""A folder for the Hugging Face Hub, and its upload."""

from typing import Any

import torchvision
from torchvision.models import list_models

from exports.formats import arguments_of
from inference.trained import Trained
from settings.errors import ConfigError, RunError, first_line


def config_of(trained: Trained) -> dict[str, Any]:
    """Build config.json: what a program needs to build the model, and what the Hub shows."""
    return {
        "architecture": trained.config.model,
        "library": "torchvision" if is_of_torchvision(trained) else "learning.models of this project, on torchvision",
        "arguments": arguments_of(trained),
        "num_classes": len(trained.classes),
        "id2label": {str(number): name for number, name in enumerate(trained.classes)},
        "label2id": {name: number for number, name in enumerate(trained.classes)},
        "image_size": trained.image_size,
        "temperature": trained.temperature,
        "torch_dtype": "float32",
    }


def is_of_torchvision(trained: Trained) -> bool:
    """Check whether torchvision alone builds the model."""
    return trained.config.model in list_models(module=torchvision.models)


def check_login() -> None:
    """Raise ConfigError unless the Hub knows who uploads; asked before the work, which takes minutes."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # of several libraries: no token, a wrong one, no network
        raise ConfigError(
            f"--upload: not logged in at {api.endpoint} ({first_line(error)}); `hf auth login`, or HF_TOKEN in the "
            "environment"
        ) from error


def upload(folder: str, files: list[str], repository: str) -> str:
    """Upload files of a folder; make the repository, private, if it is not there; return its address.

    Raises:
        RunError: that failed; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files, commit_message="Export")
    except Exception as error:
        raise RunError(
            f"upload to {repository} failed ({type(error).__name__}: {first_line(error)}); the files are in {folder}, "
            f"`hf upload {repository} {folder}` tries again"
        ) from error
    return f"{api.endpoint}/{repository}"
