# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and how to tell."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LLMD4RecError, StorageError, first_line


MANIFEST_NAME = "manifest.json"
_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
}
# What safetensors and torch make of an error of the system when they write.
_STORAGE_WORDS = (
    *("os error 28", "os error 30", "os error 122", "no space left", "disk quota"),
    *("file write failed", "iostream error", "inline_container.cc"),
)


def write_json(path: Path, content: dict) -> None:
    """As [`whole_file`]; a power cut too leaves the old content or the new one."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """
    A place beside `path` to write to. When the block ends well it becomes `path`, in one step: whoever reads finds the
    old content or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes and threads, on several machines, may write the same file.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place beside `folder` to write to. When the block ends well it becomes `folder`, in one step."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_facts(path: Path) -> dict:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def is_altered(path: Path, facts: dict) -> bool:
    """Whether a file is missing, or not the one of which `facts` were taken."""
    return not path.is_file() or path.stat().st_size != facts["bytes"] or file_facts(path) != facts


def write_manifest(folder: Path) -> None:
    """Put down what `folder` holds, after everything else is in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    write_json(
        folder / MANIFEST_NAME, {"files": {path.relative_to(folder).as_posix(): file_facts(path) for path in paths}}
    )


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that [`write_manifest`] closed, or `None`."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return f"{folder} is not complete: it has no {MANIFEST_NAME}"
    try:
        files = dict(json.loads(path.read_text(encoding="utf-8"))["files"])
        damaged = next((name for name, facts in files.items() if is_altered(folder / name, facts)), None)
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged ({type(error).__name__}: {error})"
    return None if damaged is None else f"{folder / damaged} is missing, torn or altered"


@contextmanager
def storage_errors_named(folder: Path, remedy: str) -> Iterator[None]:
    """
    A full disk, a read-only folder and their like, which come as many kinds of errors, become one.

    Raises:
        StorageError: in their place.
    """
    try:
        yield
    except LLMD4RecError:
        raise
    except Exception as error:
        if not _is_about_storage(error):
            raise
        raise StorageError(f"Cannot write to {folder} ({first_line(error)}). {remedy}") from error


def _is_about_storage(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _STORAGE_ERRORS
    return any(words in str(error).lower() for words in _STORAGE_WORDS)
