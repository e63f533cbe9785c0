"""A URL -> a place that answers what this package asks of a Path: names, sizes, heads and small files.

    hf://org/name[@revision][/path]   s3://bucket/path   gs://bucket/path   https://host/path   ... as fsspec knows them

Credentials come from the environment, as the library for each kind of store takes them; no message shows any.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from threading import Event
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from lora_check.errors import InputError, NotFoundError, UsageError
from lora_check.remote.store import Stat, Store, all_of, no_access, patiently, said

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.+", re.DOTALL)
CHAIN = re.compile(r"::[A-Za-z][\w+.-]*(?:://|$)")
LOCAL = re.compile(r"(?:file|local)://(?P<path>.+)", re.DOTALL)
WEB = ("http", "https")
SPELLING = "check the spelling, and that you have access"
INSTALL = "pip install 'lora_check[remote]'"

FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".gguf", ".npz", ".zip", ".gz")
INDEX = ".index.json"
KNOWN = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_model.pt",
    "adapters.safetensors",
    "adapters.npz",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Asked for, one by one, where a folder cannot be listed: every name that can decide what is read, or the verdict."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A file or a folder of a store.

    path    as the store names it
    shown   as a message names it, without credentials
    """

    path: str
    shown: str
    store: Store = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.shown

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.path.rstrip('/')}/{name}", f"{self.shown.rstrip('/')}/{name}", self.store)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """What follows its last dot, with the dot."""
        stem, dot, ending = self.name.rpartition(".")
        return dot + ending if stem else ""

    @property
    def parent(self) -> Place:
        """The folder that it lies in."""
        return Place(self.path.rpartition("/")[0], self.shown.rpartition("/")[0], self.store)

    def is_dir(self) -> bool:
        """Whether it is a folder; where folders cannot be listed, its name tells."""
        if self.store.name in WEB:
            return not self.name.endswith(FILE_SUFFIXES)
        found = self._stat()
        return found is not None and found.folder

    def is_file(self) -> bool:
        """Whether a file lies there."""
        siblings = self.store.names(self.parent.path, self.parent.shown)
        if siblings is not None:
            return self.name in siblings
        found = self._stat()
        return found is not None and not found.folder

    def iterdir(self) -> Iterator[Place]:
        """Its files, in the order of their names."""
        names = self.store.names(self.path, self.shown)
        yield from (self / name for name in (self._asked_for() if names is None else names))

    def glob(self, pattern: str) -> Iterator[Place]:
        """Those of its files whose names fit a pattern."""
        yield from (one for one in self.iterdir() if fnmatchcase(one.name, pattern))

    def stat(self) -> SimpleNamespace:
        """Size and version, as os.stat tells them: the time is a digest of what the store tells of the version.

        A file of which it tells none is never the same when it is opened again.
        """
        found = self._demanded()
        digest = hashlib.sha256(json.dumps(found.stamp or self.store.opening).encode()).digest()
        return SimpleNamespace(st_size=found.size, st_mtime_ns=int.from_bytes(digest[:8], "big"), st_ino=-1, st_dev=-1)

    def samefile(self, other: Any) -> bool:
        """Whether two places are one."""
        same = isinstance(other, Place) and other.store.name == self.store.name
        return same and other.path == self.path

    def read(self, start: int, into: memoryview, what: str = "", given_up: Event | None = None) -> None:
        """Fill a buffer with the bytes from `start` on; as `Store.read`."""
        self.store.read(self.path, self.shown, start, into, what, given_up)

    def read_bytes(self) -> bytes:
        """The whole of a small file."""
        return self.head(self._demanded().size)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole of a small file, as text."""
        return self.read_bytes().decode(encoding)

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[_Head]:
        """The file, of which a head is to be read."""
        assert mode == "rb", mode
        yield _Head(self)

    def head(self, count: int) -> bytes:
        """The first bytes."""
        body = bytearray(min(count, self._demanded().size))
        self.read(0, memoryview(body))
        return bytes(body)

    def _stat(self) -> Stat | None:
        return self.store.stat(self.path, self.shown)

    def _demanded(self) -> Stat:
        found = self._stat()
        if found is None:
            raise NotFoundError(f"nothing lies at {self.shown}", hint=SPELLING)
        return found

    def _asked_for(self) -> tuple[str, ...]:
        """The known names that are there, and what their indexes name."""
        if (self / f"absent-{os.urandom(8).hex()}").is_file():
            message = f"{self.shown} answers for files that are not there, so nothing can be told of what it holds"
            raise InputError(message, hint="give the address of the file itself, or download the folder")
        found = self._there(KNOWN)
        if not found:
            raise NotFoundError(f"nothing that is looked for lies at {self.shown}", hint=SPELLING)
        named = {name for index in found if index.endswith(INDEX) for name in _named(self / index)}
        return tuple(sorted({*found, *self._there(sorted(named - {*KNOWN}))}))

    def _there(self, names: Iterable[str]) -> list[str]:
        places = [self / name for name in names]
        return [one.name for one, there in zip(places, all_of(Place.is_file, places), strict=True) if there]


@dataclass(frozen=True, slots=True)
class _Head:
    """A file of which only the beginning is read."""

    place: Place

    def read(self, count: int) -> bytes:
        """The first bytes."""
        return self.place.head(count)


def is_url(location: object) -> bool:
    """Whether a location is a URL, and no local path."""
    return isinstance(location, str) and URL.fullmatch(location) is not None


def local_path(location: str) -> str:
    """The path of a file:// URL; any other location as it is."""
    found = LOCAL.fullmatch(location)
    return found["path"] if found else location


def place_of(url: str) -> Place:
    """What a URL leads to.

    raises   UsageError: a library is missing, or no library knows such URLs
             NotFoundError, InputError: nothing is there, or it cannot be read
    """
    protocol, shown = url.partition("://")[0].lower(), shown_as(url)
    if CHAIN.search(url):
        raise UsageError(f"{shown} chains several stores", hint="give one URL, or download it and give the local path")
    try:
        place = patiently(lambda: _opened(protocol, url, shown), shown)
    except ImportError as error:
        message = f"{shown} needs a library that is not installed: {error.name or said(error)}"
        raise UsageError(message, hint=INSTALL) from None
    except FileNotFoundError:
        raise NotFoundError(f"nothing lies at {shown}", hint=SPELLING) from None
    except PermissionError as error:
        raise no_access(shown, error) from None
    if not place.is_dir():
        place.stat()
    return place


def _opened(protocol: str, url: str, shown: str) -> Place:
    if protocol in WEB:
        from lora_check.remote.web import Web

        address = urlsplit(url)
        path = f"{protocol}://{address.netloc}{address.path}".rstrip("/")
        return Place(path, shown, Store(protocol, Web(protocol, address.query)))
    from lora_check.remote.listed import opened

    backend, path = opened(url)
    return Place(path.rstrip("/"), shown, Store(protocol, backend))


def shown_as(location: str) -> str:
    """A location as a message may name it: a URL without its user and what follows a question mark."""
    if not is_url(location):
        return location
    protocol, _, rest = location.partition("://")
    host, slash, path = re.sub(r"[?#].*", "", rest, flags=re.DOTALL).partition("/")
    return f"{protocol.lower()}://{host if protocol == 'hf' else host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def _named(index: Place) -> Iterator[str]:
    """The files that an index names; none of one that cannot be read: whoever needs it says why."""
    try:
        told = json.loads(index.read_bytes()).get("weight_map", {})
        yield from (str(name) for name in told.values() if "/" not in str(name))
    except (ValueError, AttributeError):
        return
