"""Where the files of a model come from: a folder, or a revision of a repository on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from .errors import ConfigError


class Source(TypedDict, total=False):
    """Arguments of `from_pretrained` that say where files come from. A model, its configuration and its tokenizer take the same.

    Keys:
        revision: branch, tag or commit of a hub name; `main` by default.
        subfolder: where in the repository or folder the files are.
        code_revision: the same as `revision`, of code that comes with the model.
        trust_remote_code: whether that code is run.
        cache_dir, token, local_files_only, force_download, proxies: see `huggingface_hub.hf_hub_download`.
    """

    revision: str | None
    subfolder: str | None
    code_revision: str | None
    trust_remote_code: bool | None
    cache_dir: str | None
    token: str | bool | None
    local_files_only: bool | None
    force_download: bool | None
    proxies: dict[str, str] | None


#: The names of these arguments.
SOURCE = tuple(Source.__annotations__)

#: Those that belong to one repository. Another model, or an adapter, has its own.
OF_REPOSITORY = ("revision", "subfolder", "code_revision")

#: Those that say how files are fetched. Adapters take them, and no number depends on them.
FETCHING = ("cache_dir", "token", "local_files_only", "force_download", "proxies")

#: Files of which a repository has at least one.
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")


def source_of(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of the arguments that say where files come from, without those that are `None`."""
    return {name: value for name, value in (arguments or {}).items() if name in SOURCE and value is not None}


def check_source(path: str | Path, source: Mapping[str, Any]) -> None:
    """Raises a ConfigError where a folder is asked for a revision.

    `main` passes, because TRL's scripts give it with every model.
    """
    if source.get("revision") not in (None, "main") and os.path.isdir(path):
        raise ConfigError(
            f"{path} is a folder: revision = {source['revision']!r} must belong to a hub name; leave it out, or give the hub name"
        )


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """The name of an adapter or guide, and the revision that a hub name may end in: `user/adapter@v2`."""
    name = str(name)
    if "@" not in name or os.path.exists(name):
        return name, None
    name, _, revision = name.rpartition("@")
    return name, revision


def elsewhere(model: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Arguments of `align.load_model` for another model that is loaded as this one is.

    Args:
        model: arguments of `align.load_model`.
        path: folder or hub name of the other one, which may end in `@REVISION`.
    """
    name, revision = split_revision(path)
    kept = {key: value for key, value in model.items() if key not in OF_REPOSITORY}
    return {**kept, "path": name, **({} if revision is None else {"revision": revision})}


def loading_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `align.load_model` that a model's numbers depend on, without those that `model_identity` takes."""
    left_out = ("path", "revision", "subfolder", *FETCHING)
    return {name: value for name, value in model.items() if name not in left_out}


def commit_of(name: str, source: Mapping[str, Any]) -> str | None:
    """The commit that a revision of a hub name is now: as the hub or, offline, the cache has it; `None` if neither has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    asked = source_of(
        {key: source.get(key) for key in ("revision", "subfolder", "cache_dir", "token", "local_files_only")}
    )
    for file in _CONFIGS:
        try:
            parts = Path(hf_hub_download(name, file, **asked)).parts
        except EntryNotFoundError:
            continue
        except (OSError, ValueError):  # no such repository, no network, or not a name of one
            return None
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return None
