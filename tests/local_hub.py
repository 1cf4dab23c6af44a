"""A hub on this disk: a cache folder as `huggingface_hub` keeps it, with a repository of several revisions."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from conftest import byte_level_tokenizer, tiny_llama


def commit(revision: str) -> str:
    """The commit of a revision."""
    return hashlib.sha1(revision.encode()).hexdigest()


def put(cache: Path, name: str, revision: str, folder: Path) -> None:
    """Makes a folder a revision of the repository `name`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit(revision))
    shutil.copytree(folder, repository / "snapshots" / commit(revision))


def put_models(cache: Path, name: str, scratch: Path, revisions: tuple[str, ...]) -> dict[str, Path]:
    """Revisions of a model with other weights, another chat template and another configuration each; their folders."""
    folders = {}
    for seed, revision in enumerate(revisions):
        folder = folders[revision] = scratch / revision
        tiny_llama(seed, rms_norm_eps=10.0 ** -(seed + 3)).save_pretrained(folder)
        tokenizer = byte_level_tokenizer(chat=True)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", f"{revision}<|end|>")
        tokenizer.save_pretrained(folder)
        put(cache, name, revision, folder)
    return folders
