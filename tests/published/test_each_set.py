"""CIFAR-100, ImageNet-R, CUB-200 and DomainNet, each by itself: pixels, lists, orders, and every error."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torchvision.datasets import CIFAR100

from avalanche_fmlora import domainnet, split_cifar100, split_cub200, split_imagenet_r
from avalanche_fmlora.data.domainnet import DOMAINS, remotes
from avalanche_fmlora.data.imagenet_r import fixed_split


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*.jpg")):
            archive.write(path, path.relative_to(folder.parent))
    return target


# --- CIFAR-100


def test_cifar_pixels_labels_and_resizing(originals: Path, build: Any) -> None:
    root = originals / "cifar-100-python"
    content = pickle.loads((root / "test").read_bytes())
    pixels = np.asarray(content["data"]).reshape(-1, 3, 32, 32)
    benchmark = build(split_cifar100, root, image_size=32, augment="none")
    assert benchmark.info.class_names == ("class00", "class01", "class02", "class03")
    for t, experience in enumerate(benchmark.test_stream):
        for i in range(4):
            image, label, *_ = experience.dataset[i]
            assert label == content["fine_labels"][4 * t + i]
            np.testing.assert_array_equal((image.numpy() * 255).round().astype(np.uint8), pixels[4 * t + i])
    assert build(split_cifar100, root, image_size=48).train_stream[0].dataset[0][0].shape == (3, 48, 48)


def test_cifar_checksums_are_torchvisions(originals: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = originals / "cifar-100-python"
    md5 = {name: hashlib.md5((root / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    with pytest.raises(
        ValueError, match=r"to have `meta` with MD5 7973b15100ade9c7d40fb424638fde48 but .*has one with"
    ):
        build(split_cifar100, root, subset=False)
    monkeypatch.setitem(CIFAR100.meta, "md5", md5["meta"])
    assert build(split_cifar100, root, subset=False).info.name == "split_cifar100"


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": _Evil()}), r"asks for builtins.print"),
        (b"", "no pickle"),
        (pickle.dumps([1, 2]), "to hold a dictionary but got list"),
    ],
)
def test_a_pickle_runs_no_code(
    tree: Callable[[str], Path], build: Any, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree("cifar-100-python")
    (root / "train").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(split_cifar100, root)
    assert "run" not in capsys.readouterr().out


# --- ImageNet-R


def test_imagenet_r_is_split_24_000_to_6_000() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(30_000 - 200 * 51, np.ones(200) / 200) + 51
    names = [f"n{c:08d}/art_{i}.jpg" for c in range(200) for i in range(counts[c])]
    train = fixed_split(names)
    assert (len(names), len(train)) == (30_000, 24_000)
    per_class = Counter(name.split("/")[0] for name in train)
    assert max(abs(per_class[f"n{c:08d}"] - 0.8 * counts[c]) for c in range(200)) < 1
    assert fixed_split(reversed(names)) == train
    digest = hashlib.sha256("\n".join(sorted(train)).encode()).hexdigest()
    assert digest == "cc9ea54cf9889400af14644468dc6b8ea76be57c1ffad4ec7833eae04d467be9", "the rule never changes"


def test_imagenet_r_in_train_and_test_folders_is_the_same(tree: Callable[[str], Path], build: Any) -> None:
    root = tree("imagenet-r")
    want = build(split_imagenet_r, root).info
    for i, folder in enumerate(sorted(p for p in root.iterdir() if p.is_dir())):
        for j, image in enumerate(sorted(folder.iterdir())):
            target = root / ("train" if (i + j) % 2 else "test") / folder.name / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            image.rename(target)
    info = build(split_imagenet_r, root).info
    assert info.extra["split_list_sha256"] == want.extra["split_list_sha256"]
    assert info.split_hash == want.split_hash
    twin = next((root / "train").rglob("*.jpg"))
    (root / "test" / twin.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(twin, root / "test" / twin.parent.name)
    with pytest.raises(ValueError, match=rf"'{twin.parent.name}/{twin.name}' twice"):
        build(split_imagenet_r, root)


def test_imagenet_r_split_hash_is_that_of_the_lines(originals: Path, build: Any) -> None:
    root = originals / "imagenet-r"
    names = [f"{p.parent.name}/{p.name}" for p in root.rglob("*.jpg")]
    train = fixed_split(names)
    lines = "".join(sorted(f"{'train' if n in train else 'test'} {n}\n" for n in names))
    assert build(split_imagenet_r, root).info.extra["split_list_sha256"] == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("kind", ["coda.yaml", "list.yml", "list.txt"])
def test_imagenet_r_with_another_split(originals: Path, tmp_path: Path, build: Any, kind: str) -> None:
    root = originals / "imagenet-r"
    names = sorted(f"data/imagenet-r/test/{p.parent.name}/{p.name}" for p in root.rglob("*_[0-5].jpg"))
    text = {
        "coda.yaml": yaml.safe_dump({"data": names, "targets": [0] * len(names)}),
        "list.yml": yaml.safe_dump(names),
        "list.txt": "\n".join(f"{name} 7" for name in names) + "\n\n",
    }[kind]
    (tmp_path / kind).write_text(text)
    info = build(split_imagenet_r, root, split_file=tmp_path / kind).info
    assert (info.n_train, info.n_test) == ((12, 12), (4, 4))
    assert info.extra["split_rule"] == f"training images of {kind}, all others for test"
    assert info.extra["split_list_sha256"] != build(split_imagenet_r, root).info.extra["split_list_sha256"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "n10000000/art_0.jpg\nn10000000/art_99.jpg",
            r"1 of 2 images that .* not in the data set: 'n10000000/art_99.jpg'",
        ),
        ("n10000000/art_0.jpg", r"1 of 32 images, less than half: give the list of training"),
        ("data: {a: b}", "to hold a list of paths"),
        ("data: [a, b", "no valid YAML"),
    ],
)
def test_imagenet_r_with_a_wrong_list(originals: Path, tmp_path: Path, build: Any, text: str, message: str) -> None:
    path = tmp_path / ("split.yaml" if text.startswith("data") else "split.txt")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        build(split_imagenet_r, originals / "imagenet-r", split_file=path)
    with pytest.raises(FileNotFoundError, match=r"no list of training images '.*none.txt'"):
        build(split_imagenet_r, originals / "imagenet-r", split_file=tmp_path / "none.txt")


# --- CUB-200


def test_cub_follows_its_lists(tree: Callable[[str], Path], build: Any) -> None:
    root = tree("CUB_200_2011")
    lines = (root / "train_test_split.txt").read_text().splitlines()
    (root / "train_test_split.txt").write_text("\n".join(["1 0", *lines[1:]]) + "\n")
    info = build(split_cub200, root).info
    assert info.class_names == ("001.Bird_0", "002.Bird_1", "003.Bird_2", "004.Bird_3")
    assert (info.n_train, info.n_test) == ((5, 6), (5, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("images.txt", None), r"images.txt, train_test_split.txt, image_class_labels.txt side by side .* nowhere"),
        (("train_test_split.txt", "1 1\n2 0\n"), r"list the same images but 18 are not in all of them"),
        (("image_class_labels.txt", "1 1 1\n"), r"Expected `<image id> <value>` in each line .* but got '1 1 1'"),
        (("images/001.Bird_0/Bird_0000_0000.jpg", None), r"1 of 20 images that images.txt lists .*Bird_0000_0000.jpg"),
    ],
)
def test_cub_with_something_missing(
    tree: Callable[[str], Path], build: Any, change: tuple[str, str | None], message: str
) -> None:
    root = tree("CUB_200_2011")
    name, text = change
    (root / name).unlink() if text is None else (root / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        build(split_cub200, root)


# --- DomainNet


def test_domainnet_order(originals: Path, build: Any) -> None:
    info = build(domainnet, originals / "domainnet").info
    assert info.experience_names == DOMAINS == ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    assert (info.kind, info.n_train, info.n_test) == ("domain_incremental", (12,) * 6, (8,) * 6)
    assert info.class_names == ("class_0", "class_1", "class_2", "class_3")
    benchmark = build(domainnet, originals / "domainnet", domain_order=["sketch", "clipart"])
    assert benchmark.info.experience_names == ("sketch", "clipart")
    brightness = [np.mean([float(x.mean()) for x, *_ in e.dataset]) for e in benchmark.test_stream]
    assert brightness[0] > brightness[1] + 0.1, "each domain has its own images"
    drawn = build(domainnet, originals / "domainnet", class_order_seed=1).info.experience_names
    assert sorted(drawn) == sorted(DOMAINS)
    assert drawn != DOMAINS
    for wrong in (["sketch"], ["sketch", "sketch"], ["sketch", "photo"]):
        with pytest.raises(ValueError, match=r"two or more of \['clipart', .*each once"):
            build(domainnet, originals / "domainnet", domain_order=wrong)


def test_domainnet_from_zips_and_lists_below(tree: Callable[[str], Path], build: Any) -> None:
    root = tree("domainnet")
    want = build(domainnet, root).info
    (root / "txt").mkdir()
    for path in root.glob("*.txt"):
        path.rename(root / "txt" / path.name)
    for domain in ("painting", "real"):
        zipped(root / domain, root / f"{domain}.zip")
        shutil.rmtree(root / domain)
    info = build(domainnet, root).info
    assert info.split_hash == want.split_hash
    assert info.extra["split_list_sha256"] == want.extra["split_list_sha256"]


def test_domainnet_with_a_class_that_a_domain_lacks(tree: Callable[[str], Path], build: Any) -> None:
    root = tree("domainnet")
    lines = (root / "painting_train.txt").read_text().splitlines()
    (root / "painting_train.txt").write_text("\n".join(line for line in lines if "class_2" not in line) + "\n")
    benchmark = build(domainnet, root)
    assert benchmark.info.extra["lacking"] == {"painting/train": ["class_2"]}
    assert benchmark.info.n_train == (12, 12, 9, 12, 12, 12)
    assert {int(y) for y in benchmark.train_stream[2].dataset.targets} == {0, 1, 3}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda r: shutil.rmtree(r / "painting"),
            r"but \['painting'\] are not there: looked for folders like `painting/.*"
            r"painting.zip. Fetch http://csr.bu.edu/.*painting.zip into it, or type `--download true`",
        ),
        (
            lambda r: (r / "real_test.txt").unlink(),
            r"official list real_test.txt in .*not there: fetch http://csr.bu.edu",
        ),
        (
            lambda r: next((r / "real" / "class_1").iterdir()).unlink(),
            r"1 of 120 images that the lists name .*real/class_1",
        ),
        (lambda r: (r / "real_test.txt").write_text("real/class_1/x.jpg one\n"), r"each line of real_test.txt but got"),
        (lambda r: (r / "real_test.txt").write_text("real/class_1/x.jpg 7\n"), r"gives class 'class_1' the number 7"),
        (
            lambda r: (shutil.rmtree(r / "real"), (r / "real.zip.part").write_bytes(b"abc")),
            r"3 bytes of real.zip, half a",
        ),
        (lambda r: (shutil.rmtree(r / "real"), (r / "real.zip").write_bytes(b"abc")), r"real.zip' is no zip archive"),
        (
            lambda r: shutil.copytree(r / "real", r / "old" / "real"),
            r"twice, as 'old/real/.*' and 'real/.*': move one of the two folders elsewhere",
        ),
    ],
)
def test_domainnet_with_something_missing(
    tree: Callable[[str], Path], build: Any, spoil: Callable[[Path], Any], message: str
) -> None:
    root = tree("domainnet")
    spoil(root)
    with pytest.raises(ValueError, match=message):
        build(domainnet, root)


def test_domainnet_lists_are_the_official_ones(originals: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"to have clipart_train.txt with sha256 affdadf5\w+ but '.*' has one with \w+"
    ):
        build(domainnet, originals / "domainnet", subset=False)
    files = {remote.name: remote for remote in remotes()}
    assert len(files) == 18
    assert files["painting.zip"].url == "http://csr.bu.edu/ftp/visda/2019/multi-source/groundtruth/painting.zip"
    assert files["sketch_test.txt"].url == "http://csr.bu.edu/ftp/visda/2019/multi-source/domainnet/txt/sketch_test.txt"
    assert sum(remote.size or 0 for remote in files.values()) == pytest.approx(18.5e9, rel=0.01)
    assert {len(remote.checksum) for remote in files.values()} == {len("sha256:") + 64}
    assert [remote.name for remote in remotes(["real", "clipart"])][-2:] == ["real.zip", "clipart.zip"]
