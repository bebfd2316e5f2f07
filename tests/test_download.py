"""fetch: against a server on this machine that truncates, stalls, redirects, refuses ranges and serves wrong bytes."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty_server import BODY, SHA256, Server
from PIL import Image

from avalanche_fmlora import split_imagenet_r
from avalanche_fmlora.data import cifar100, download, imagenet_r
from avalanche_fmlora.data.download import RemoteFile, fetch


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def get(server: Server, folder: Path, path: str = "pack.bin", **options: Any) -> Path:
    checksum, size = options.pop("checksum", SHA256), options.pop("size", len(BODY))
    remote = RemoteFile(server.url(path), "pack.bin", checksum, size, options.pop("by_torchvision", False))
    return fetch(remote, folder, **{"timeout_s": 0.5, **options})


def asked(server: Server) -> list[str | None]:
    return [range_ for _, range_ in server.requests]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.endswith((".lock", ".checked.json"))}


def test_whole_file_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = get(server, tmp_path / "new" / "folder")
    assert path.read_bytes() == BODY
    assert names(path.parent) == {"pack.bin"}
    assert get(server, path.parent) == path
    assert asked(server) == [None]
    assert capsys.readouterr().err == "", "no bar off a terminal"


def test_md5_without_a_published_size(server: Server, tmp_path: Path) -> None:
    md5 = "md5:" + hashlib.md5(BODY).hexdigest()
    assert get(server, tmp_path, checksum=md5, size=None).read_bytes() == BODY


def test_truncated_answers_are_gone_on_from(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000, 300_000]
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server) == [None, "bytes=1000-", "bytes=301000-"]


def test_an_interrupted_download_is_no_file_and_goes_on_in_the_next_call(server: Server, tmp_path: Path) -> None:
    server.cuts = [400_000, 0]
    server.statuses = []
    with pytest.raises(ConnectionError, match=r"400,000 bytes of 1280000 are here.*goes on from what came"):
        get(server, tmp_path, tries=1)
    assert names(tmp_path) == {"pack.bin.part", "pack.bin.part.json"}
    server.cuts = []
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server)[-1] == "bytes=400000-"


def test_a_stalling_server_is_left_and_asked_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.stalls = [5000], 1
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server) == [None, "bytes=5000-"]
    server.cuts, server.stalls = [0, 0], 2
    with pytest.raises(ConnectionError, match=r"pack.bin \(.*timed out.*Type the same command again"):
        get(server, tmp_path / "other", tries=2, timeout_s=0.2)


def test_redirects_keep_the_range(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000]
    assert get(server, tmp_path, "moved/pack.bin").read_bytes() == BODY
    assert server.requests[-1] == ("/pack.bin", "bytes=1000-")


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ranges_allowed, server.cuts = False, [1000]
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_file_that_changed_meanwhile_is_not_mixed(server: Server, tmp_path: Path) -> None:
    server.body, server.cuts = bytes(len(BODY)), [1000]
    with pytest.raises(ConnectionError):
        get(server, tmp_path, tries=1)
    server.body, server.etag = BODY, '"two"'
    assert get(server, tmp_path).read_bytes() == BODY
    assert len(server.requests) == 2, "If-Range makes the server send the whole new file at once"


def test_a_wrong_resumed_part_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "pack.bin.part").write_bytes(b"x" * 1000)
    (tmp_path / "pack.bin.part.json").write_text(json.dumps({"url": server.url(), "version": None}))
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server) == ["bytes=1000-", None]


def test_a_part_of_unknown_origin_is_not_built_on(server: Server, tmp_path: Path) -> None:
    (tmp_path / "pack.bin.part").write_bytes(BODY[:1000])
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server) == [None]


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_a_whole_part_needs_no_bytes(server: Server, tmp_path: Path, size: int | None) -> None:
    (tmp_path / "pack.bin.part").write_bytes(BODY)
    (tmp_path / "pack.bin.part.json").write_text(json.dumps({"url": server.url(), "version": '"one"'}))
    assert get(server, tmp_path, size=size).read_bytes() == BODY
    assert asked(server) == ([] if size else [f"bytes={len(BODY)}-"])


def test_wrong_bytes_are_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.body = BODY[:-1] + b"x"
    with pytest.raises(
        ValueError, match=rf"pack.bin to have {SHA256} but what came has sha256:[0-9a-f]+; it was removed"
    ):
        get(server, tmp_path)
    assert names(tmp_path) == set()


def test_another_size_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    server.body = b"<html>the page has moved</html>"
    with pytest.raises(ValueError, match=r"to be 1,280,000 bytes but the server offers 31"):
        get(server, tmp_path)


def test_a_web_page_in_place_of_the_file_takes_nothing_away(server: Server, tmp_path: Path) -> None:
    server.cuts = [400_000]
    with pytest.raises(ConnectionError):
        get(server, tmp_path, tries=1)
    server.pages = ["text/html; charset=utf-8"] * 3
    with pytest.raises(ConnectionError, match=r"a web page in place of the file; 400,000 bytes of 1280000 are here"):
        get(server, tmp_path, tries=2)
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server)[1:] == ["bytes=400000-"] * 4


def test_a_page_that_was_taken_for_the_file_costs_one_more_fetch(server: Server, tmp_path: Path) -> None:
    server.pages = ["application/octet-stream"]
    assert get(server, tmp_path).read_bytes() == BODY
    assert asked(server)[0] is asked(server)[-1] is None, "from its first byte, since the pieces don't fit"


def test_without_a_length_the_checksum_decides(server: Server, tmp_path: Path) -> None:
    server.send_length = False
    assert get(server, tmp_path, size=None).read_bytes() == BODY
    server.cuts = [1000]
    with pytest.raises(ValueError, match="but what came has"):
        get(server, tmp_path / "other", size=None)


def test_passing_errors_are_tried_again_and_lasting_ones_said_at_once(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 500]
    assert get(server, tmp_path).read_bytes() == BODY
    server.statuses = [404, 404]
    with pytest.raises(ConnectionError, match=r"HTTP 404 Not Found.*by other means.*other'"):
        get(server, tmp_path / "other")
    assert len(server.statuses) == 1


def test_no_network(tmp_path: Path) -> None:
    remote = RemoteFile("http://127.0.0.1:9/pack.bin", "pack.bin", SHA256)
    with pytest.raises(
        ConnectionError, match=r"Can't fetch http://127.0.0.1:9/pack.bin \(.*refused.*0 bytes of unknown"
    ):
        fetch(remote, tmp_path, timeout_s=0.1, tries=2)


def test_a_file_put_there_by_hand_is_checked_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pack.bin").write_bytes(BODY[:-5])
    with pytest.raises(ValueError, match=r"'.*pack.bin' to have sha256:.*\(1,279,995 bytes\): remove it"):
        get(server, tmp_path)
    assert (tmp_path / "pack.bin").exists()
    (tmp_path / "pack.bin").write_bytes(BODY)
    get(server, tmp_path)
    counts: dict[str, int] = collections.Counter()
    inner = download._checksum
    monkeypatch.setattr(download, "_checksum", lambda *a: counts.update(["x"]) or inner(*a))
    get(server, tmp_path)
    assert counts["x"] == 0
    os.utime(tmp_path / "pack.bin", ns=(0, 0))
    get(server, tmp_path)
    assert counts["x"] == 1
    assert server.requests == []


def test_a_file_in_a_folder_that_can_not_be_written_is_checked_in_place(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pack.bin").write_bytes(BODY)
    monkeypatch.setattr("avalanche_fmlora.data.download.os.access", lambda path, mode: False)
    assert get(server, tmp_path).read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["pack.bin"], "neither a lock nor a note"
    (tmp_path / "pack.bin").write_bytes(BODY[:-5])
    with pytest.raises(ValueError, match="or give the path of a sound copy"):
        get(server, tmp_path)


def test_a_full_disk_is_said_with_numbers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OSError, match=r"disk of '.*' is full: 1,280,000 more bytes .* and 1,000,000 are free. Make room"
    ):
        get(server, tmp_path)
    monkeypatch.undo()
    assert get(server, tmp_path).read_bytes() == BODY


def test_a_disk_that_fills_up_meanwhile(server: Server, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "pack.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"is full: 1,280,000 more bytes"):
        get(server, tmp_path)


def test_a_data_set_from_the_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in (f"imagenet-r/n1000000{label}/art_{i}.png" for label in range(2) for i in range(5)):
            image = io.BytesIO()
            Image.new("RGB", (20, 30)).save(image, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            archive.addfile(member, io.BytesIO(image.getvalue()))
    server.body, server.cuts = buffer.getvalue(), [5000]
    checksum = "sha256:" + hashlib.sha256(server.body).hexdigest()
    monkeypatch.setattr(imagenet_r, "ARCHIVE", RemoteFile(server.url(), "imagenet-r.tar", checksum, len(server.body)))
    options: dict[str, Any] = {"image_size": 8, "n_experiences": 2, "subset": True, "cache_dir": tmp_path / "cache"}
    benchmark = split_imagenet_r(tmp_path / "data", download=True, **options)
    assert (benchmark.info.n_train, benchmark.info.n_test) == ((4, 4), (1, 1))
    assert asked(server) == [None, "bytes=5000-"]
    again = split_imagenet_r(tmp_path / "data", **options)
    assert again.info.split_hash == benchmark.info.split_hash
    assert len(server.requests) == 2


def test_two_at_once_share_one_download(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: get(server, tmp_path), range(3)))
    assert [p.read_bytes() == BODY for p in paths] == [True] * 3
    assert len(server.requests) == 1


# --- what torchvision fetches

MD5 = "md5:" + hashlib.md5(BODY, usedforsecurity=False).hexdigest()
BY_TORCHVISION: dict[str, Any] = {"checksum": MD5, "by_torchvision": True}


def test_torchvision_fetches_its_own_data_set(server: Server, tmp_path: Path) -> None:
    assert cifar100.ARCHIVE.by_torchvision
    assert get(server, tmp_path, "moved/pack.bin", **BY_TORCHVISION).read_bytes() == BODY
    requests = len(server.requests)
    get(server, tmp_path, **BY_TORCHVISION)
    assert len(server.requests) == requests, "what is there is not fetched again"


@pytest.mark.parametrize("fault", ["wrong bytes", "truncated"])
def test_a_torchvision_download_with_another_md5_is_refused_and_removed(
    server: Server, tmp_path: Path, fault: str
) -> None:
    if fault == "truncated":
        server.cuts = [0, 1000]  # the first answer only shows where redirects lead
    else:
        server.body = BODY[:-1] + b"?"
    with pytest.raises(ValueError, match=rf"to have {MD5} but torchvision says: .*; it was removed\. .* try once more"):
        get(server, tmp_path, **BY_TORCHVISION)
    assert "pack.bin" not in names(tmp_path)
    assert "pack.bin.part" not in names(tmp_path)
    server.body = BODY
    assert get(server, tmp_path, **BY_TORCHVISION).read_bytes() == BODY


def test_torchvision_waits_no_longer_than_asked_and_starts_anew(server: Server, tmp_path: Path) -> None:
    server.cuts, server.stalls = [0, 1000], 2
    with pytest.raises(ConnectionError, match=r"timed out.* once the network is there: it starts anew\. Or fetch pack"):
        get(server, tmp_path, **BY_TORCHVISION)
    assert socket.getdefaulttimeout() is None
    assert get(server, tmp_path, **BY_TORCHVISION).read_bytes() == BODY


def test_torchvision_on_a_full_disk_or_without_a_network(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=rf"is full: {len(BODY):,} more bytes are needed .* it starts anew"):
            get(server, tmp_path, **BY_TORCHVISION)
        assert not server.requests
    absent = RemoteFile("http://127.0.0.1:9/pack.bin", "pack.bin", MD5, by_torchvision=True)
    with pytest.raises(ConnectionError, match=r"Can't fetch http://127\.0\.0\.1:9/pack\.bin .*put it into"):
        fetch(absent, tmp_path)
