"""image_folder: layouts, options, and an error that names the culprit for each kind of broken input."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import UNIT, class_files, encoded, pack, raw, save, write
from PIL import Image

from avalanche_fmlora.data.image_folder import image_folder


def test_class_incremental_folder(tmp_path: Path, build: Any) -> None:
    benchmark = build(write(tmp_path / "pets", class_files()), n_experiences=2, **UNIT)
    info = benchmark.info
    assert (info.name, info.kind, info.n_train, info.n_test) == ("pets", "class_incremental", (4, 4), (4, 4))
    assert info.class_names == ("c0", "c1", "c2", "c3")
    assert info.image_size == 8
    assert info.extra["source"] == "pets"
    assert info.extra["n_files"] == 16
    assert info.extra["resize"] == "shorter side to 8 px (bicubic, antialiased), centre crop"
    second = benchmark.train_stream[1]
    assert [raw(second, i) for i in range(4)] == [([40, 0, 0], 2), ([40, 0, 1], 2), ([60, 0, 0], 3), ([60, 0, 1], 3)]


def test_class_order_moves_pixels_with_labels(tmp_path: Path, build: Any) -> None:
    benchmark = build(write(tmp_path / "pets", class_files()), n_experiences=4, class_order_seed=3, **UNIT)
    order = benchmark.info.class_order
    assert sorted(order) == [0, 1, 2, 3]
    assert order != (0, 1, 2, 3)
    for t, original in enumerate(order):
        assert raw(benchmark.test_stream[t], 0) == ([20 * original, 0, 0], t)


def test_zip_folder_and_wrapped_zip_agree(tmp_path: Path, build: Any) -> None:
    files = class_files()
    clutter = {"__MACOSX/pets/train/c0/._0.png": b"x", "pets/train/c0/Thumbs.db": b"x", "pets/.git/a.png": b"x"}
    wrapped = {f"pets/{k}": v for k, v in files.items()} | clutter | {"LICENSE.txt": b"x"}
    dotted = {f"./{k}": v for k, v in files.items()} | {"train/notes.md": b"x", "train/c0/labels.csv": b"x"}
    paths = [
        write(tmp_path / "pets", files),
        pack(tmp_path / "pets.zip", files),
        pack(tmp_path / "wrapped.zip", wrapped),
        pack(tmp_path / "dotted.zip", dotted),
        write(tmp_path / "unpacked", {f"pets/{k}": v for k, v in files.items()}),
    ]
    infos = [build(p, n_experiences=4).info for p in paths]
    assert len({i.split_hash for i in infos}) == 1
    assert [i.name for i in infos] == ["pets", "pets", "wrapped", "dotted", "unpacked"]
    assert infos[1].extra["source"] == "pets.zip"


def test_images_that_cannot_be_read_are_named(tmp_path: Path, build: Any) -> None:
    """A phone's folder: with these passed over, classes would be smaller than they are, without a word."""
    path = write(tmp_path / "pets", class_files() | {"train/c0/IMG_1.HEIC": b"x", "train/c1/IMG_2.heic": b"x"})
    with pytest.raises(ValueError, match=r"2 images in 'pets' are of kinds that can't be read here: .*IMG_1.HEIC"):
        build(path, n_experiences=2)


def test_default_is_ten_experiences(tmp_path: Path, build: Any) -> None:
    path = write(tmp_path / "pets", class_files(20, 1))
    assert len(build(path).train_stream) == 10
    with pytest.raises(ValueError, match=r"divide the 20 classes of pets but got 3"):
        build(path, n_experiences=3)


def test_domain_incremental(tmp_path: Path, build: Any) -> None:
    files = {k: v for d in ("ink", "oil", "wax") for k, v in class_files(2, top=f"{d}/").items()}
    files["wax/train/c0/9.png"] = encoded((1, 2, 3))
    benchmark = build(pack(tmp_path / "art.zip", {f"art/{k}": v for k, v in files.items()}), **UNIT)
    assert benchmark.info.kind == "domain_incremental"
    assert benchmark.info.experience_names == ("ink", "oil", "wax")
    assert benchmark.info.n_train == (4, 4, 5)
    assert benchmark.info.n_test == (4, 4, 4)
    assert raw(benchmark.train_stream[2], 2) == ([1, 2, 3], 0)
    assert len(build(tmp_path / "art.zip", n_experiences=3).train_stream) == 3
    with pytest.raises(ValueError, match=r"number of domains of 'art.zip', 3 \('ink', 'oil', 'wax'\), but got 10"):
        build(tmp_path / "art.zip", n_experiences=10)


def test_a_domain_that_lacks_a_class_is_named(tmp_path: Path, build: Any) -> None:
    files = {k: v for d in ("ink", "oil") for k, v in class_files(3, top=f"{d}/").items()}
    files = {k: v for k, v in files.items() if not k.startswith(("oil/test/c1", "oil/test/c2"))}
    with pytest.raises(ValueError, match=r"oil/test lacks 2 of 3 \('c1', 'c2'\)"):
        build(write(tmp_path / "art", files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test/c3/": None}, r"test lacks 1 of 4 \('c3'\)"),
        ({"train/": None}, r"train lacks 4 of 4 \('c0', 'c1', 'c2', 'c3'\)"),
        ({"train/": None, "test/": None}, r"holds no images .*\.png.*train/<class>/<image>.*<domain>/train"),
        ({"train/c9/a.txt": b"x"}, r"1 class folders in 'pets' hold no image: 'train/c9'"),
        ({"train/c9/a.txt": b"x", "test/c9/b.xcf": b"x"}, r"2 class folders.*'test/c9', 'train/c9'"),
        ({"ink/train/c0/a.png": encoded()}, r"mixes both layouts.*'ink'"),
        ({"train/loose.png": encoded()}, r"1 of 17 images in 'pets' are in no class folder: 'train/loose.png'"),
        ({"train/c0/deep/x.png": encoded()}, r"in no class folder: 'train/c0/deep/x.png'"),
        ({"val/c0/x.png": encoded()}, r"in no class folder: 'val/c0/x.png'"),
        ({"train/c1/0.png": b""}, r"1 of 16 images .*'train/c1/0.png' \(the file is empty\).*Replace or remove"),
        ({"train/c1/0.png": b"no image at all"}, r"'train/c1/0.png' \(cannot identify an image in its data\)"),
        (
            {"train/c1/0.png": encoded(size=(64, 64))[:-30], "test/c1/1.png": encoded(size=(64, 64))[:60]},
            r"2 of 16 images.*'test/c1/1.png'.*'train/c1/0.png'",
        ),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_broken_input_is_named(
    tmp_path: Path, build: Any, change: dict[str, bytes | None], message: str, as_zip: bool
) -> None:
    files = class_files()
    for name, data in change.items():
        if data is None:
            files = {k: v for k, v in files.items() if not k.startswith(name)}
        else:
            files[name] = data
    (tmp_path / "pets").mkdir()
    path = pack(tmp_path / "pets.zip", files) if as_zip else write(tmp_path / "pets", files)
    with pytest.raises(ValueError, match=message.replace("'pets'", r"'pets\.zip'") if as_zip else message):
        build(path, n_experiences=2)


def test_empty_class_folders_are_named(tmp_path: Path, build: Any) -> None:
    path = write(tmp_path / "pets", class_files())
    (path / "train" / "c9").mkdir()
    with pytest.raises(ValueError, match="'train/c9'"):
        build(path, n_experiences=2)


def test_missing_path_says_both_layouts(tmp_path: Path, build: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere'.*train/<class>/<image>.*<domain>/train/<class>/<image>"):
        build(tmp_path / "nowhere")


def test_no_zip_and_torn_zip(tmp_path: Path, build: Any) -> None:
    (tmp_path / "a.zip").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a.zip' is no zip archive.*5 bytes"):
        build(tmp_path / "a.zip")
    whole = pack(tmp_path / "b.zip", class_files()).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b.zip' is no zip archive, or a torn one"):
        build(tmp_path / "b.zip")


def test_flipped_bit_in_a_zip_member_is_named(tmp_path: Path, build: Any) -> None:
    path = pack(tmp_path / "pets.zip", class_files())
    data = bytearray(path.read_bytes())
    start = data.index(b"train/c2/1.png") + len("train/c2/1.png")
    data[start + 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"1 of 16 .*'train/c2/1.png' \(the archive's data are broken .*CRC"):
        build(path, n_experiences=2)


@pytest.mark.parametrize(
    "name", ["../evil.png", "train/../../evil.png", "/etc/evil.png", "C:/evil.png", r"train\c0\evil.png"]
)
def test_members_that_leave_the_archive_are_refused(tmp_path: Path, build: Any, name: str) -> None:
    path = pack(tmp_path / "pets.zip", class_files() | {name: encoded()})
    with pytest.raises(ValueError, match=r"evil.png' of 'pets.zip' .*no path may leave the archive's folder"):
        build(path, n_experiences=2)
    assert not list(tmp_path.rglob("evil.png"))


def test_links_encryption_and_twins_in_a_zip_are_refused(tmp_path: Path, build: Any) -> None:
    link = zipfile.ZipInfo("train/c0/link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(pack(tmp_path / "a.zip", class_files()), "a") as archive:
        archive.writestr(link, "/etc/hostname")
    with pytest.raises(ValueError, match=r"'train/c0/link.png' of 'a.zip' is a symbolic link"):
        build(tmp_path / "a.zip", n_experiences=2)

    data = bytearray(pack(tmp_path / "b.zip", class_files()).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "b.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"'train/c0/0.png' of 'b.zip' is encrypted"):
        build(tmp_path / "b.zip", n_experiences=2)

    with zipfile.ZipFile(pack(tmp_path / "c.zip", class_files()), "a") as archive:
        archive.writestr("./train/c0/0.png", encoded())
    with pytest.raises(ValueError, match=r"'c.zip' holds two members named 'train/c0/0.png'"):
        build(tmp_path / "c.zip", n_experiences=2)


def test_links_in_a_folder(tmp_path: Path, build: Any) -> None:
    path = write(tmp_path / "pets", class_files())
    inside = path / "train" / "c0" / "inside.png"
    inside.symlink_to(path / "train" / "c1" / "0.png")
    assert build(path, n_experiences=2).info.n_train == (5, 4)
    write(tmp_path, {"secret.png": encoded()})
    outside = path / "train" / "c0" / "outside.png"
    outside.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"'train/c0/outside.png' in .* is a link to .*secret.png', outside"):
        build(path, n_experiences=2)
    outside.unlink()
    (path / "train" / "loop").symlink_to(path)
    with pytest.raises(ValueError, match=r"'train/loop' in .* is a link to a folder that holds it"):
        build(path, n_experiences=2)
    (path / "train" / "loop").unlink()
    outside.symlink_to(path / "gone.png")
    with pytest.raises(ValueError, match=r"'train/c0/outside.png' in .*gone.png', which is missing"):
        build(path, n_experiences=2)


def test_augment_touches_train_images_only(tmp_path: Path, build: Any) -> None:
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    files = {
        f"{s}/c{c}/{i}.png": save(Image.fromarray(half)) for s in ("train", "test") for c in (0, 1) for i in range(16)
    }
    path = write(tmp_path / "pets", files)
    for augment, kinds in (("none", 1), ("flip", 2)):
        benchmark = build(path, n_experiences=1, augment=augment, **UNIT)
        lefts = {float(benchmark.train_stream[0].dataset[i][0][0, 4, 0]) for i in range(32)}
        assert len(lefts) == kinds
        assert {float(benchmark.test_stream[0].dataset[i][0][0, 4, 0]) for i in range(32)} == {1.0}
        assert benchmark.info.extra["augment"] == augment
    cropped = build(path, n_experiences=1, augment="crop_flip", **UNIT).train_stream[0].dataset
    means = {round(float(cropped[i][0].mean()), 3) for i in range(32)}
    assert cropped[0][0].shape == (3, 8, 8)
    assert len(means) > 2


def test_options_are_checked(tmp_path: Path, build: Any) -> None:
    path = write(tmp_path / "pets", class_files(2, 1))
    with pytest.raises(ValueError, match=r"`augment` to be one of .*crop_flip.* but got 'mirror'"):
        build(path, augment="mirror")
    with pytest.raises(ValueError, match=r"`interpolation` to be one of .*bicubic.* but got 'cubic'"):
        build(path, interpolation="cubic")
    for size in (0, -3, 7.5, True):
        with pytest.raises(ValueError, match="`image_size` to be a positive whole number"):
            build(path, image_size=size)


def real(name: str) -> Path:
    path = Path(os.environ.get("AVALANCHE_FMLORA_DATA", "")) / name
    if "AVALANCHE_FMLORA_DATA" not in os.environ or not path.is_file():
        pytest.skip(f"set AVALANCHE_FMLORA_DATA to the folder that holds {name}")
    return path


def test_real_photos(cache: Path) -> None:
    path = real("caltech100_96.zip")
    info = image_folder(path, image_size=56, cache_dir=cache).info
    assert info.kind == "class_incremental"
    assert len(info.class_names) == 100
    assert (sum(info.n_train), sum(info.n_test)) == (2903, 1769)
    assert image_folder(path, image_size=56, cache_dir=cache).info == info


def test_real_emoji(cache: Path) -> None:
    info = image_folder(real("emoji20_4domains_64.zip"), image_size=56, cache_dir=cache).info
    assert info.experience_names == ("fluent3d", "noto", "openmoji", "twemoji")
    assert len(info.class_names) == 20
    assert info.n_train == (357,) * 4
    assert info.n_test == (84,) * 4
