"""Plain HTTP: ranges of bytes, each answer held against the others. Nothing can be listed.

What an answer is worth is told by its headers: RFC 9110, sections 8.8 (validators), 14 (ranges) and 15.3.7 (206).
"""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import fsspec
from fsspec.asyn import sync

from lora_check.remote.store import ASKING, FORBIDDEN, PASSING, READING, ChangedError, RefusedError, Stat

CONNECTING, SILENCE = 10.0, 30.0
"""Seconds until a connection is made, and between two pieces of a body."""
CHUNK = 1 << 17
"""Bytes that are taken from a connection at once."""

ABSENT = (404, 410)
RANGE = re.compile(r"bytes (?:(?P<first>\d+)-(?P<last>\d+)|\*)/(?P<size>\d+)")
VALIDATORS = ("ETag", "Last-Modified")


class Web:
    """Files of HTTP servers; a path is a whole URL.

    query   what follows each of them, such as a signature
    """

    def __init__(self, protocol: str, query: str = "") -> None:
        told = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECTING, sock_read=SILENCE)
        ours = {"timeout": timeout, "trust_env": True, "read_bufsize": CHUNK}
        self._files: Any = fsspec.filesystem(protocol, client_kwargs={**ours, **told})
        self._query = f"?{query}" if query else ""

    def stat(self, path: str) -> Stat:
        """By a request for the first byte: it tells the size, and whether there are ranges."""
        found: Stat = sync(self._files.loop, self._get, path, 0, None, timeout=ASKING)
        return found

    def names(self, path: str) -> None:
        """A server shows what it likes for a folder."""

    def read(self, path: str, start: int, into: memoryview, seen: Stat) -> None:
        """The bytes of this very version."""
        answered: Stat = sync(self._files.loop, self._get, path, start, into, timeout=READING)
        if answered.contradicts(seen):
            raise ChangedError(path)

    async def _get(self, path: str, start: int, into: memoryview | None) -> Stat:
        """Ask for a range, and fill the buffer with it if there is one."""
        stop = start + (len(into) if into is not None else 1)
        options = dict(self._files.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        session = await self._files.set_session()
        url = self._files.encode_url(path + self._query)
        async with session.get(url, headers=headers, **options) as answer:
            found = _stat(answer)
            if into is None:
                return found
            _demand(answer, start, stop, found)
            await _fill(into, answer)
        return found


def _stat(answer: Any) -> Stat:
    """What an answer says of the whole file.

    raises   FileNotFoundError, PermissionError, RefusedError; OSError: ask again
    """
    status, says = answer.status, f"HTTP {answer.status} {answer.reason or ''}".strip()
    if status in ABSENT:
        raise FileNotFoundError(says)
    if status in FORBIDDEN:
        raise PermissionError(says)
    if status in PASSING:
        raise OSError(says)
    packed = answer.headers.get("Content-Encoding", "identity")
    if packed != "identity":
        raise RefusedError(f"the server packs the file as {packed}, though it was asked not to")
    stamp = tuple((name, answer.headers[name]) for name in VALIDATORS if name in answer.headers)
    told = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if told and status in (206, 416):
        return Stat(size=int(told["size"]), stamp=stamp)
    if status != 200 or answer.content_length is None:
        raise RefusedError(says if status != 200 else "the server does not tell its size")
    ignored = "the server ignores the range that it is asked for, and sends the whole file"
    return Stat(size=answer.content_length, stamp=stamp, whole=ignored)


def _demand(answer: Any, start: int, stop: int, found: Stat) -> None:
    """Check that the body is what was asked for, before any of it is read."""
    if found.whole:
        if start == 0 and stop == found.size:
            return
        raise RefusedError(found.whole)
    told = RANGE.fullmatch(answer.headers["Content-Range"])
    if answer.status == 416 or found.size < stop:
        raise ChangedError
    if not told or (told["first"], told["last"]) != (str(start), str(stop - 1)):
        raise RefusedError(f"the server sends {answer.headers['Content-Range']} instead")


async def _fill(into: memoryview, answer: Any) -> None:
    done = 0
    async for chunk in answer.content.iter_any():
        if done + len(chunk) > len(into):
            raise OSError(f"the body is longer than the {len(into)} bytes that were asked for")
        into[done : done + len(chunk)] = chunk
        done += len(chunk)
    if done < len(into):
        raise OSError(f"the body ends after {done} of {len(into)} bytes")
