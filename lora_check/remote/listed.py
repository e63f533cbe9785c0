"""Stores that fsspec can list: buckets, repositories of the hub, servers of files."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.asyn import sync

from lora_check.remote.store import ASKING, READING, ChangedError, Stat

VALIDATORS = (
    *("ETag", "etag", "generation", "blob_id", "md5Hash", "checksum"),
    *("LastModified", "last_modified", "mtime", "modified", "updated", "created"),
)
"""What the libraries call what tells one version of a file from another; the first that is there is taken."""

TYPES = {"dataset": "datasets/", "space": "spaces/"}


class Listed:
    """Files of one fsspec file system.

    commit   that its paths are of, if so: then nothing under them ever changes
    """

    def __init__(self, files: Any, commit: str = "") -> None:
        self._files, self._commit = files, commit

    def stat(self, path: str) -> Stat:
        """As the store says now; what the library remembers is forgotten."""
        self._forget(path)
        info = self._ask("info", ASKING, path)
        told = {"commit": self._commit, **info}
        stamp = next(((key, str(told[key])) for key in ("commit", *VALIDATORS) if told.get(key)), None)
        return Stat(size=info.get("size") or 0, stamp=(stamp,) if stamp else (), folder=info["type"] == "directory")

    def names(self, path: str) -> tuple[str, ...]:
        """The files of a folder."""
        self._forget(path)
        found = self._ask("ls", ASKING, path, detail=True)
        return tuple(sorted(one["name"].rpartition("/")[2] for one in found if one["type"] == "file"))

    def read(self, path: str, start: int, into: memoryview, seen: Stat) -> None:
        """The bytes, and then whether the file is still the same: they came from the version that was there between."""
        more = {} if self._files.async_impl else {"cache_type": "none"}
        body = self._ask("cat_file", READING, path, start=start, end=start + len(into), **more)
        if not self._commit and self.stat(path).contradicts(seen):
            raise ChangedError(path)
        if len(body) != len(into):
            raise OSError(f"the body has {len(body)} of {len(into)} bytes")
        into[:] = body

    def _forget(self, path: str) -> None:
        if not self._commit:
            self._files.invalidate_cache(path)

    def _ask(self, method: str, seconds: float, *asked: Any, **more: Any) -> Any:
        """Call a method; where the library can be interrupted, no longer than this."""
        if self._files.async_impl:
            return sync(self._files.loop, getattr(self._files, f"_{method}"), *asked, timeout=seconds, **more)
        return getattr(self._files, method)(*asked, **more)


def opened(url: str) -> tuple[Listed, str]:
    """The file system that a URL leads to, and the path there; a revision of the hub is pinned to its commit."""
    files, path = fsspec.core.url_to_fs(url)
    found: Any = files.resolve_path(path) if url.startswith("hf://") else None
    if not hasattr(found, "repo_id"):
        return Listed(files), path
    from huggingface_hub import HfApi

    api = HfApi(endpoint=files.endpoint, token=files.token)
    commit = api.repo_info(found.repo_id, revision=found.revision, repo_type=found.repo_type).sha
    prefix = TYPES.get(found.repo_type, "")
    return Listed(files, commit), f"{prefix}{found.repo_id}@{commit}/{found.path_in_repo}".rstrip("/")
