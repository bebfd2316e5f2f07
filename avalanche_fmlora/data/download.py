"""Fetch a published archive: resumed where it broke off, checked against its checksum, renamed only when whole.

Until then the bytes lie in `<name>.part`, with what tells one version of the file from another in `<name>.part.json`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 1 << 26
_BROKEN = (TimeoutError, ConnectionError, http.client.HTTPException, urllib.error.URLError)


@dataclass(frozen=True)
class RemoteFile:
    """A published file.

    Args:
        url: its address.
        name: of the file on disk.
        checksum: `sha256:<hex>` or `md5:<hex>`.
        size: in bytes, if it is published too.
        by_torchvision: leave the transfer to torchvision, whose data set it is; it starts anew where one broke off.
    """

    url: str
    name: str
    checksum: str
    size: int | None = None
    by_torchvision: bool = False


def fetch(remote: RemoteFile, folder: str | os.PathLike[str], *, timeout_s: float = 60.0, tries: int = 4) -> Path:
    """The file in `folder`, downloaded unless it is there already.

    Two processes that ask for the same file share one download. A file of that name that was put there by other means
    is checked as well, once: `<name>.checked.json` remembers it until the file changes. (In a folder that can't be
    written, as shared data's often can't, it is checked each time.)

    Args:
        remote: what to fetch.
        folder: where to; it is made.
        timeout_s: how long a silent server is waited for.
        tries: attempts in a row that bring nothing new before giving up; any progress starts the count anew.

    Returns:
        The path of the whole file.

    Raises:
        ConnectionError: if the server can't be reached, refuses, or falls silent.
        ValueError: if the bytes are not those that were published.
        OSError: if the disk is full or the folder can't be written.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / remote.name
    if target.exists() and not os.access(folder, os.W_OK):
        if not _is_checked(remote, target):
            _check(remote, target)
        return target
    with FileLock(folder / f".{remote.name}.lock"):
        if not target.exists():
            download = _TorchvisionDownload if remote.by_torchvision else _Download
            download(remote, target, timeout_s, tries).run()
        elif not _is_checked(remote, target):
            _check(remote, target)
            _remember(remote, target)
    return target


def _check(remote: RemoteFile, target: Path) -> None:
    found = _checksum(target, remote.checksum)
    if found != remote.checksum:
        raise ValueError(
            f"Expected '{target}' to have {remote.checksum} but it has {found} ({_bytes(target)}): remove it "
            f"and type the same command again to fetch {remote.url}, or give the path of a sound copy."
        )


class _Download:
    """One file on its way into `<name>.part`."""

    again = "it goes on from what came"

    def __init__(self, remote: RemoteFile, target: Path, timeout_s: float, tries: int) -> None:
        self.remote, self.target, self.timeout_s, self.tries = remote, target, timeout_s, tries
        self.part = target.with_name(f"{target.name}.part")
        self.facts = target.with_name(f"{target.name}.part.json")
        self.total = remote.size
        self.pieces = 0

    def run(self) -> None:
        """Fetch, check and rename; a wrong file that came in pieces is fetched once more as a whole."""
        for again in (True, False):
            self.pieces = 1 if self._offset() else 0
            self._receive()
            found = _checksum(self.part, self.remote.checksum)
            if found == self.remote.checksum:
                os.replace(self.part, self.target)
                self.facts.unlink(missing_ok=True)
                _remember(self.remote, self.target)
                return
            self._forget()
            if not again or self.pieces < 2:
                break
            logger.warning("The resumed %s is not the published one: fetched once more.", self.remote.name)
        raise self._changed(f"what came has {found}")

    def _receive(self) -> None:
        failures = 0
        with tqdm(total=self.total, unit="B", unit_scale=True, desc=self.remote.name, disable=None) as bar:
            while True:
                before = self._offset()
                try:
                    if self._one_request(bar):
                        return
                    problem: Exception = ConnectionError("the connection ended early")
                except urllib.error.HTTPError as error:
                    error.close()
                    if error.code == 416:  # nothing lies beyond what is here; the checksum will tell
                        return
                    if error.code < 500 and error.code not in (408, 429):
                        raise self._unreachable(error) from error
                    problem = error
                except _BROKEN as error:
                    problem = error
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        raise self._disk_full() from error
                    raise
                failures = 1 if self._offset() > before else failures + 1
                if failures >= self.tries:
                    raise self._unreachable(problem) from problem
                logger.info("%s: %s; going on from byte %d", self.remote.name, problem, self._offset())
                time.sleep(min(2.0 ** (failures - 1), 8.0, self.timeout_s))

    def _one_request(self, bar: tqdm[Any]) -> bool:
        """Append what one request brings; whether the file is whole then."""
        offset = self._offset()
        if self.total is not None and offset >= self.total:
            return True
        request = urllib.request.Request(self.remote.url, headers=self._headers(offset))
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            start = self._read_facts(response, offset)
            self._require_space((self.total or 0) - start)
            bar.total = self.total
            bar.n = start
            with open(self.part, "ab" if start else "wb") as file:
                self.pieces += 1
                while chunk := response.read1(_CHUNK_BYTES):  # what is there: a stall then loses nothing
                    file.write(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
        return self.total is None or self._offset() >= self.total

    def _headers(self, offset: int) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "avalanche-fmlora"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            version = json.loads(self.facts.read_text(encoding="utf-8"))["version"]
            if version:
                headers["If-Range"] = version
        return headers

    def _read_facts(self, response: Any, offset: int) -> int:
        """The byte at which the answer starts; notes its size and version.

        Raises:
            ConnectionError: if the answer is a web page or of another range.
            ValueError: if the server has a file of another size than the published one.
        """
        start, total = 0, response.headers.get("Content-Length")
        if response.status == 206:
            said = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            if said is None or int(said[1]) != offset:
                self._forget()
                raise ConnectionError(f"the server answered with the range {response.headers.get('Content-Range')!r}")
            start, total = offset, None if said[2] == "*" else said[2]
        elif response.headers.get_content_type() == "text/html":  # a network's sign-in page: what came is kept
            raise ConnectionError("the server answered with a web page in place of the file")
        if total is not None and self.remote.size not in (None, int(total)):
            raise ValueError(
                f"Expected {self.remote.url} to be {self.remote.size:,} bytes but the server offers {int(total):,}: "
                "the address leads elsewhere now. Fetch the file by other means and give its path."
            )
        self.total = int(total) if total is not None else self.remote.size
        tag = response.headers.get("ETag", "")
        version = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
        self.facts.write_text(json.dumps({"url": self.remote.url, "version": version}), encoding="utf-8")
        return start

    def _offset(self) -> int:
        """Bytes that can be built on; a part of unknown origin is none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads(self.facts.read_text(encoding="utf-8"))["url"] == self.remote.url:
                return self.part.stat().st_size
        return 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.facts.unlink(missing_ok=True)

    def _require_space(self, n_bytes: int) -> None:
        if shutil.disk_usage(self.part.parent).free < n_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, "")

    def _disk_full(self) -> OSError:
        free = shutil.disk_usage(self.part.parent).free
        needed = (self.total or 0) - self._offset()
        return OSError(
            f"The disk of '{self.part.parent}' is full: {needed:,} more bytes are needed for {self.remote.name} and "
            f"{free:,} are free. Make room and type the same command again: {self.again}. Or give a folder on "
            "another disk as the path."
        )

    def _changed(self, found: str) -> ValueError:
        return ValueError(
            f"Expected {self.remote.url} to have {self.remote.checksum} but {found}; it was removed. The "
            "publisher may have changed the file, or something on the way did: try once more, or fetch it by other "
            "means and give its path."
        )

    def _unreachable(self, error: Exception) -> ConnectionError:
        why = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            why = f"HTTP {error.code} {error.reason}"
        return ConnectionError(
            f"Can't fetch {self.remote.url} ({why}; {self._offset():,} bytes of {self.total or 'unknown'} are here). "
            f"Type the same command again once the network is there: {self.again}. Or fetch "
            f"{self.remote.name} by other means, and give its path or put it into '{self.target.parent}'."
        )


class _TorchvisionDownload(_Download):
    """The same by torchvision's downloader, which checks the MD5; it neither goes on with a part nor sets a timeout."""

    again = "it starts anew"

    def run(self) -> None:
        """Fetch and rename."""
        from torchvision.datasets.utils import download_url

        self._forget()
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(self.timeout_s)
        try:
            self._require_space(self.total or 0)
            download_url(self.remote.url, self.part.parent, self.part.name, self.remote.checksum.removeprefix("md5:"))
        except RuntimeError as error:  # how torchvision says that the MD5 is another; redirects in a circle too
            self._forget()
            raise self._changed(f"torchvision says: {str(error).rstrip('.')}") from error
        except (*_BROKEN, OSError) as error:
            self._forget()
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise self._disk_full() from error
            raise self._unreachable(error) from error
        finally:
            socket.setdefaulttimeout(patience)
        os.replace(self.part, self.target)
        _remember(self.remote, self.target)


def _checksum(path: Path, like: str) -> str:
    """`<algorithm>:<hex>` with the algorithm of `like`."""
    algorithm = like.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return f"{algorithm}:{digest.hexdigest()}"


def _checked_facts(remote: RemoteFile, path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"checksum": remote.checksum, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_checked(remote: RemoteFile, path: Path) -> bool:
    try:
        said = json.loads(path.with_name(f"{path.name}.checked.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(said == _checked_facts(remote, path))


def _remember(remote: RemoteFile, path: Path) -> None:
    """Note that the checksum is right; only a convenience, so a folder that can't be written is no error."""
    with contextlib.suppress(OSError):
        facts = json.dumps(_checked_facts(remote, path))
        path.with_name(f"{path.name}.checked.json").write_text(facts, encoding="utf-8")


def _bytes(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"
