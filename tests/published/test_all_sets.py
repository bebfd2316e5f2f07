"""What holds for every published data set: splits, labels, archives, and every error of reading them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avalanche_fmlora import domainnet, domainnet_cil, split_cifar100, split_cub200, split_imagenet_r
from avalanche_fmlora.data import published


def tar(folder: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as archive:
        archive.add(folder, arcname=folder.name)
    return target


@pytest.mark.parametrize(
    ("builder", "name", "n_train", "n_test"),
    [
        (split_cifar100, "cifar-100-python", (10, 10), (4, 4)),
        (split_imagenet_r, "imagenet-r", (12, 14), (4, 2)),
        (split_cub200, "CUB_200_2011", (6, 6), (4, 4)),
        (domainnet_cil, "domainnet", (36, 36), (24, 24)),
    ],
)
def test_class_incremental(
    originals: Path, build: Any, builder: Any, name: str, n_train: tuple[int, ...], n_test: tuple[int, ...]
) -> None:
    benchmark = build(builder, originals / name, class_order_seed=3)
    info = benchmark.info
    assert info.kind == "class_incremental"
    assert info.name == f"{builder.__name__} (subset)"
    assert (info.n_train, info.n_test) == (n_train, n_test)
    assert info.image_size == 16
    assert info.extra["source"] == name
    assert info.extra["subset"] is True
    assert info.extra["augment"] == "published"
    plain = build(builder, originals / name)
    assert info.class_names == tuple(plain.info.class_names[i] for i in info.class_order)
    assert info.class_order != (0, 1, 2, 3)
    assert info.split_hash == plain.info.split_hash
    for t, experience in enumerate(benchmark.test_stream):
        assert {int(y) for y in experience.dataset.targets} == {2 * t, 2 * t + 1}
    image, label, *_ = benchmark.train_stream[1].dataset[0]
    assert image.shape == (3, 16, 16)
    assert 0 <= image.min() <= image.max() <= 1
    assert int(label) in (2, 3)
    with pytest.raises(ValueError, match="divide the 4 classes"):
        build(builder, originals / name, n_experiences=3)


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        (split_cifar100, "cifar-100-python"),
        (split_imagenet_r, "imagenet-r"),
        (split_cub200, "CUB_200_2011"),
        (domainnet, "domainnet"),
    ],
)
def test_a_part_must_be_asked_for(originals: Path, build: Any, builder: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected {builder.__name__} to have .* but '.*{name}' has .*subset true"):
        build(builder, originals / name, subset=False)


@pytest.mark.parametrize("builder", [split_cifar100, split_imagenet_r, split_cub200, domainnet, domainnet_cil])
def test_nothing_there(tmp_path: Path, build: Any, builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere' but nothing is there: type `--path.*--download true.*https?://"
    ):
        build(builder, tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=r"home/avalanche_fmlora/downloads/\w+' but nothing is there"):
        build(builder, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Expected .*empty' .*(none|not there|nowhere)"):
        build(builder, tmp_path / "empty")


@pytest.mark.parametrize(
    ("builder", "name", "target", "mode"),
    [
        (split_cifar100, "cifar-100-python", "cifar-100-python.tar.gz", "w:gz"),
        (split_imagenet_r, "imagenet-r", "imagenet-r.tar", "w"),
        (split_cub200, "CUB_200_2011", "CUB_200_2011.tgz", "w:gz"),
        (split_cub200, "CUB_200_2011", "other.tar.xz", "w:xz"),
    ],
)
def test_the_archive_gives_what_the_folder_gives(
    originals: Path, tmp_path: Path, build: Any, builder: Any, name: str, target: str, mode: str
) -> None:
    path = tar(originals / name, tmp_path / target, mode)
    info = build(builder, originals / name).info
    archived = build(builder, path).info
    assert archived.split_hash == info.split_hash
    assert archived.extra["source"] == target
    assert archived.n_train == info.n_train
    assert build(builder, path).info.split_hash == info.split_hash
    if target.startswith(name):
        assert build(builder, tmp_path).info.split_hash == info.split_hash, "the folder that holds the archive"


@pytest.mark.parametrize(
    ("builder", "name", "target"),
    [
        (split_cifar100, "cifar-100-python", "cifar-100-python.tar.gz"),
        (split_imagenet_r, "imagenet-r", "imagenet-r.tar"),
        (split_cub200, "CUB_200_2011", "CUB_200_2011.tgz"),
    ],
)
def test_a_torn_archive_and_half_a_download(
    originals: Path, tmp_path: Path, build: Any, builder: Any, name: str, target: str
) -> None:
    path = tar(originals / name, tmp_path / target, "w:gz" if target.endswith("gz") else "w")
    whole = path.read_bytes()
    for share in (0.3, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"is no tar archive, or a torn one \(.*fetch or pack it again"):
            build(builder, path)
    path.unlink()
    (tmp_path / f"{target}.part").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=rf"holds 100 bytes of {target}, half a download: .*--download true` goes on"):
        build(builder, tmp_path)


def test_a_tar_cut_at_or_in_a_header_is_not_taken_for_whole(originals: Path, tmp_path: Path, build: Any) -> None:
    path = tar(originals / "imagenet-r", tmp_path / "imagenet-r.tar")
    with tarfile.open(path) as archive:
        cut = archive.getmembers()[20].offset
    whole = path.read_bytes()
    path.write_bytes(whole[: cut + 100])
    with pytest.raises(ValueError, match=r"what follows byte [\d,]+ is no member"):
        build(split_imagenet_r, path)
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"to have 30,000 images of 200 classes but '.*' has \d+ of [23]"):
        build(split_imagenet_r, path, subset=False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil.jpg", "climbs"),
        ("/etc/evil.jpg", "absolute"),
        ("C:/evil.jpg", "absolute"),
        ("a\\evil.jpg", "backslash"),
    ],
)
def test_tar_members_that_leave_the_archive_are_refused(
    originals: Path, tmp_path: Path, build: Any, name: str, why: str
) -> None:
    path = tar(originals / "imagenet-r", tmp_path / "imagenet-r.tar")
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo(name)
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=rf"evil.jpg' of 'imagenet-r.tar' .*{why}.*no path may leave"):
        build(split_imagenet_r, path)
    assert not list(tmp_path.rglob("evil.jpg"))


def test_links_and_twins_in_a_tar_are_refused(originals: Path, tmp_path: Path, build: Any) -> None:
    path = tar(originals / "imagenet-r", tmp_path / "imagenet-r.tar")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("imagenet-r/./README.txt"))
    with pytest.raises(ValueError, match=r"holds two members named 'imagenet-r/README.txt'"):
        build(split_imagenet_r, path)
    path = tar(originals / "imagenet-r", tmp_path / "imagenet-r.tar")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("imagenet-r/n10000000/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"link.jpg' of 'imagenet-r.tar' is a link or a device"):
        build(split_imagenet_r, path)


def test_unreadable_images_are_named(tree: Callable[[str], Path], build: Any) -> None:
    root = tree("CUB_200_2011")
    victim = next((root / "images").rglob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:80])
    with pytest.raises(ValueError, match=rf"1 of 20 images of split_cub200 can't be decoded: .*{victim.name}"):
        build(split_cub200, root)


def test_download_fetches_into_the_folder_and_reads_it(
    originals: Path, tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(remote: Any, folder: Path) -> Path:
        fetched.append(remote.url)
        folder.mkdir(exist_ok=True)
        return tar(originals / "imagenet-r", folder / remote.name)

    monkeypatch.setattr(published, "fetch", fetch)
    info = build(split_imagenet_r, tmp_path / "new", download=True).info
    assert fetched == ["https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar"]
    assert info.extra["source"] == "new"
    build(split_imagenet_r, tmp_path / "new" / "imagenet-r.tar", download=True)
    assert len(fetched) == 1, "an archive that is given is not fetched"
