"""Dictionaries on the hub, and in SAELens' registry of those that are published."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError
from train.interop.formats import Found, of_sae_lens
from train.interop.tensors import Taken

FILES = ("*.json", "*.safetensors", "*.pt")


def fetched(name: str) -> Path:
    """The folder of a copy of ORG/NAME, or of ORG/NAME/FOLDER below it. Raises CheckpointError where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, below = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    patterns = [f"{below}/{one}" if below else one for one in FILES]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns)) / below
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError("nothing of this name on the hub", name, f"Check it, or the network ({reason})") from None
    if not folder.exists():
        raise CheckpointError("no such folder in this repository", name, "Name one that it has")
    return folder


def upload(folder: Path, name: str, private: bool | None, token: str | None, message: str | None) -> str:
    """Put the files of a folder into the repository ORG/NAME, which is made where there is none.

    Returns the address of the commit. Raises CheckpointError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub = HfApi(token=token)
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        done = hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message or "Add a dictionary")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError("the hub does not take it", name, f"Check the name and the token ({reason})") from None
    return str(done.commit_url)


def of_registry(release: str, sae_id: str, names: Sequence[str] | None = None) -> Found:
    """A published SAE by its names in SAELens' registry, for which sae-lens has to be installed.

    Raises CheckpointError where it is not, or has no such SAE.
    """
    try:
        from sae_lens import SAE
    except ImportError:
        raise CheckpointError("its registry comes with SAELens", release, "pip install sae-lens") from None
    try:
        found: Any = SAE.from_pretrained(release, sae_id)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError("no such SAE in SAELens' registry", f"{release}, {sae_id}", reason) from None
    return of_sae_lens(Taken(found.state_dict(), Path(release) / sae_id), found.cfg.to_dict(), names)
