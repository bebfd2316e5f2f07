"""Options that all published data sets share: transforms of one's own, and downloads beside what is there unpacked."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature_trees import miniature
from torchvision.transforms import v2

from avalanche_fmlora import domainnet, domainnet_cil, split_cifar100, split_cub200, split_imagenet_r
from avalanche_fmlora.data import published
from avalanche_fmlora.data.domainnet import DOMAINS, remotes
from avalanche_fmlora.data.loading import LoaderItems, finish_of

BUILDERS = {
    split_cifar100: "cifar-100-python",
    split_imagenet_r: "imagenet-r",
    split_cub200: "CUB_200_2011",
    domainnet: "domainnet",
    domainnet_cil: "domainnet",
}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four trees with 2 classes; not to be changed."""
    folder = tmp_path_factory.mktemp("miniature")
    miniature.write_cifar100(folder, 2, train=3, test=2)
    miniature.write_imagenet_r(folder, 2, per_class=5)
    miniature.write_cub200(folder, 2, train=3, test=2)
    miniature.write_domainnet(folder, 2, train=2, test=1)
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    def call(builder: Any, path: Path, **options: Any) -> Any:
        defaults = {"image_size": 16, "cache_dir": tmp_path / "cache", "subset": True}
        if builder is not domainnet:
            defaults["n_experiences"] = 2
        return builder(path, **(defaults | options))

    return call


# --- seed of the crops


def drawn(experience: Any, run_seed: int, epoch: int = 0, finish: Any = None) -> torch.Tensor:
    """All training images of one epoch, as a strategy's loader reads them in a run with that seed."""
    items = LoaderItems(experience.dataset, (run_seed, 0, 0), finish, crops=finish is not None)
    items.epoch.fill_(epoch)
    return items.finished(items.collate([items[i] for i in range(len(items))])[0])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("builder", "name"), BUILDERS.items())
def test_crops_of_a_seed_are_the_same_in_runs_of_other_seeds(
    originals: Path, build: Any, builder: Any, name: str, on_device: bool
) -> None:
    seeded, other, free = (build(builder, originals / name, seed=seed) for seed in (7, 8, None))
    assert [b.info.extra.get("seed") for b in (seeded, other, free)] == [7, 8, None]
    assert seeded.info.split_hash == free.info.split_hash
    assert seeded.info.class_order == free.info.class_order
    finish = finish_of(seeded.train_stream[0].dataset) if on_device else None
    first = drawn(seeded.train_stream[0], 0, finish=finish)
    assert torch.equal(first, drawn(seeded.train_stream[0], 1, finish=finish))
    assert not torch.equal(first, drawn(seeded.train_stream[0], 0, epoch=1, finish=finish))
    assert not torch.equal(first, drawn(other.train_stream[0], 0, finish=finish))
    assert not torch.equal(drawn(free.train_stream[0], 0, finish=finish), drawn(free.train_stream[0], 1, finish=finish))


def test_a_seed_below_zero_is_refused(originals: Path, build: Any) -> None:
    with pytest.raises(ValueError, match="Expected `seed` to be 0 or more, or None, but got -1"):
        build(split_cub200, originals / "CUB_200_2011", seed=-1)


# --- transforms


def blacken(image: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(image[:, :16, :16])


@pytest.mark.parametrize(("builder", "name"), BUILDERS.items())
def test_own_transforms_take_the_presets_place_and_the_record_says_so(
    originals: Path, build: Any, builder: Any, name: str
) -> None:
    mean, std = (0.5, 0.4, 0.2), (0.5, 0.25, 0.1)
    own = v2.Compose([v2.Resize([16, 16], antialias=True), v2.Lambda(lambda image: image * 0 + 255)])
    benchmark = build(
        builder, originals / name, train_transform=blacken, eval_transform=own, mean=mean, std=std, augment="flip"
    )
    for stream, value in ((benchmark.train_stream, 0), (benchmark.test_stream, 1)):
        for experience in stream:
            image, *_ = experience.dataset[0]
            assert image.shape == (3, 16, 16)
            for channel in range(3):
                want = torch.full((16, 16), (value - mean[channel]) / std[channel])
                torch.testing.assert_close(image[channel], want)
    unseen, *_ = benchmark.train_stream[0].dataset.eval()[0]
    assert unseen.min() > 0, "passes without augmentation see training images as test images"
    assert benchmark.info.extra["augment"] == "flip, changed"
    said = benchmark.info.extra["transforms"]
    assert said.startswith("train: as given (blacken); test: as given (Compose); else train: shorter side to 16 px")
    assert (benchmark.info.mean, benchmark.info.std) == (mean, std)
    assert benchmark.info.split_hash == build(builder, originals / name, augment="flip").info.split_hash


def test_one_own_transform_leaves_the_other(originals: Path, build: Any) -> None:
    root = originals / "CUB_200_2011"
    plain, changed = (build(split_cub200, root, eval_transform=own) for own in (None, blacken))
    torch.manual_seed(0)
    want = plain.train_stream[0].dataset[0][0]
    torch.manual_seed(0)
    torch.testing.assert_close(changed.train_stream[0].dataset[0][0], want)
    assert plain.info.extra["augment"] == "published"
    assert changed.info.extra["transforms"].startswith("test: as given (blacken); else train: random resized crop")


# --- downloads beside what is there


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fetched; nothing is."""
    names: list[str] = []
    monkeypatch.setattr(published, "fetch", lambda remote, folder: names.append(remote.name))
    return names


@pytest.mark.parametrize(("builder", "name"), BUILDERS.items())
@pytest.mark.parametrize("above", [False, True])
def test_what_is_there_unpacked_is_not_fetched(
    originals: Path, tmp_path: Path, build: Any, builder: Any, name: str, above: bool, fetched: list[str]
) -> None:
    root = shutil.copytree(originals / name, tmp_path / "data" / name)
    if name == "domainnet":
        (root / "lists").mkdir()
        for path in root.glob("*.txt"):
            path.rename(root / "lists" / path.name)
    place = tmp_path / "data" if above and name != "domainnet" else root
    info = build(builder, place, download=True).info
    assert fetched == []
    assert info.split_hash == build(builder, originals / name).info.split_hash


@pytest.mark.parametrize(("builder", "name"), list(BUILDERS.items())[:3])
def test_a_part_that_is_there_unpacked_says_where_to_fetch_the_whole(
    originals: Path, build: Any, builder: Any, name: str, fetched: list[str]
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"{name}' has .*: unpack it again, or fetch it into another folder .*--path NEW_FOLDER --download true",
    ):
        build(builder, originals / name, download=True, subset=False)
    assert fetched == []


def test_domains_that_are_not_there_are_fetched(
    originals: Path, tmp_path: Path, build: Any, fetched: list[str]
) -> None:
    root = shutil.copytree(originals / "domainnet", tmp_path / "domainnet")
    shutil.rmtree(root / "real")
    with pytest.raises(ValueError, match=r"\['real'\] are not there"):
        build(domainnet, root, download=True)
    assert [name for name in fetched if name.endswith(".zip")] == ["real.zip"]
    fetched.clear()
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        build(domainnet, tmp_path / "new", download=True)
    assert fetched == [remote.name for remote in remotes(DOMAINS)]


# --- CIFAR-100


def test_another_pickle_is_told_by_what_it_lacks(originals: Path, tmp_path: Path, build: Any) -> None:
    root = shutil.copytree(originals / "cifar-100-python", tmp_path / "cifar")
    content = pickle.loads((root / "train").read_bytes())
    content["labels"] = content.pop("fine_labels")
    (root / "train").write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=r"`train` in '.*cifar' to hold \['data', 'fine_labels'\] but \['fine_labels'\]"
    ):
        build(split_cifar100, root)
