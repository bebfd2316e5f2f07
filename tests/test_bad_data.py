"""Images and labels that no model can learn from: refused in words that name the mend."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from avalanche_fmlora.modules.images import check_images
from avalanche_fmlora.modules.vit import forward_features
from avalanche_fmlora.strategies.registry import methods


def experience(images: Tensor, labels: Any = None) -> Any:
    """One experience of these images, half of them of each class."""
    given = torch.arange(len(images)) % 2 if labels is None else torch.as_tensor(labels)
    data = TensorDataset(images, given)
    data.targets = given.tolist()  # type: ignore[attr-defined]
    return benchmark_from_datasets(train=[as_classification_dataset(data)]).train_stream[0]


IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BAD_IMAGES = {
    "size": (IMAGES[..., :12], r"images of 16 × 16 px, the model's size, but got 16 × 12: resize.*img_size=\(16, 12\)"),
    "channels": (IMAGES[:, :1], r"shape \[B, 3, H, W\] but got \[8, 1, 16, 16\].*`Grayscale\(3\)`.*`in_chans`"),
    "flat": (IMAGES[:, 0], r"shape \[B, 3, H, W\] but got \[8, 16, 16\]"),
    "bytes": ((255 * IMAGES).byte(), r"images in torch\.float32.* but got torch\.uint8: end the .*`ToTensor\(\)`"),
    "double": (IMAGES.double(), r"images in torch\.float32.* but got torch\.float64"),
}


@pytest.mark.parametrize("case", sorted(BAD_IMAGES))
@pytest.mark.parametrize("method", sorted(methods()))
def test_images_that_the_model_cannot_take(method: str, case: str, make_strategy: Any) -> None:
    images, message = BAD_IMAGES[case]
    strategy = make_strategy(method)
    before = {k: v.clone() for k, v in strategy.model.state_dict().items() if k.startswith("vit.")}
    with pytest.raises(ValueError, match=message):
        strategy.train([experience(images)] if strategy.joint else experience(images))
    after = strategy.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


class Uneven(Dataset[Any]):
    """Images as `Resize` alone leaves them: one side is what it should be."""

    targets = (0, 0, 1, 1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3, 16, 16 + index), self.targets[index]


@pytest.mark.parametrize("method", ["fm_lora", "seq_lora", "ncm"])
def test_images_that_make_no_batch(method: str, make_strategy: Any) -> None:
    stream = benchmark_from_datasets(train=[as_classification_dataset(Uneven())]).train_stream
    with pytest.raises(ValueError, match=r"one shape in a batch but got \(3, 16, 1.\) and \(3, 16, 1.\).*`CenterCrop"):
        make_strategy(method).train(stream[0])


class Pictures(Uneven):
    """Images as a data set without a transform gives them."""

    def __getitem__(self, index: int) -> Any:
        return Image.new("RGB", (16, 16)), self.targets[index]


def test_images_without_a_transform_are_named(make_strategy: Any) -> None:
    stream = benchmark_from_datasets(train=[as_classification_dataset(Pictures())]).train_stream
    with pytest.raises(ValueError, match="Expected images as tensors but got Image: give the data set a transform"):
        make_strategy("fm_lora").train(stream[0])


def test_other_models_take_other_images(make_vit: Any) -> None:
    with pytest.raises(
        ValueError, match=r"multiples of 8 × 8 px, the model's patches, but got 16 × 20.*dynamic_img_pad"
    ):
        check_images(make_vit(dynamic_img_size=True), torch.rand(2, 3, 16, 20))
    check_images(make_vit(dynamic_img_size=True), torch.rand(2, 3, 16, 24))
    check_images(make_vit(dynamic_img_pad=True, dynamic_img_size=True), torch.rand(2, 3, 16, 20))
    check_images(make_vit(in_chans=1), torch.rand(2, 1, 16, 16))
    check_images(make_vit(dtype=torch.float64), IMAGES.double())
    half = make_vit(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"images in torch\.bfloat16"):
        check_images(half, IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_images(half, IMAGES)
        with pytest.raises(ValueError, match=r"but got torch\.float64"):
            check_images(half, IMAGES.double())


def test_a_model_that_embeds_by_convolutions_is_asked_too() -> None:
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, img_size=32)
    assert forward_features(hybrid.eval(), torch.rand(2, 3, 32, 32)).isfinite().all()
    with pytest.raises(ValueError, match=r"shape \[B, 3, H, W\] but got \[2, 1, 32, 32\]"):
        forward_features(hybrid, torch.rand(2, 1, 32, 32))
    grey = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, img_size=32, in_chans=1)
    assert forward_features(grey.eval(), torch.rand(2, 1, 32, 32)).isfinite().all()
    free = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, img_size=32, dynamic_img_size=True)
    assert forward_features(free.eval(), torch.rand(2, 3, 64, 64)).isfinite().all()


def test_a_hook_may_make_images_fit(make_vit: Any) -> None:
    vit = make_vit()
    vit.patch_embed.register_forward_pre_hook(lambda _, args: (args[0].float() / 255,))
    assert forward_features(vit, (255 * IMAGES).byte()).isfinite().all()


@pytest.mark.parametrize("method", ["fm_lora", "ncm", "inflora"])
def test_images_with_nan_are_counted(method: str, make_strategy: Any) -> None:
    images = IMAGES.clone()
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"those of 1 of 8 training images are not.*look for NaN or infinity in these"):
        make_strategy(method, classifier="class_mean").train(experience(images))


@pytest.mark.parametrize("method", sorted(set(methods()) - {"ncm", "fm_lora", "inflora"}))
def test_methods_that_look_at_no_image_first_stop_behind_their_training(method: str, make_strategy: Any) -> None:
    images = IMAGES.clone()
    images[3] = float("inf")
    strategy = make_strategy(method, classifier="linear")
    with pytest.raises(ValueError, match=r"finite parameters after training.* head are not.*anew.* lower"):
        strategy.train([experience(images)] if strategy.joint else experience(images))


def test_rates_that_are_too_high_are_named(make_strategy: Any) -> None:
    strategy = make_strategy("seq_lora", classifier="class_mean", lr_lora=1e30, optimizer="sgd", train_epochs=2)
    with pytest.raises(ValueError, match="finite parameters after training but those of bases, head are not"):
        strategy.train(experience(IMAGES))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1, 0] * 4, "class indices from 0 but got -1: leave images without a class out"),
        ([0.0, 1.0] * 4, r"class indices as integers but got 0\.0: give the data set int64 labels"),
    ],
)
def test_labels_that_are_no_classes(labels: Any, message: str, make_strategy: Any) -> None:
    for method in ("fm_lora", "ncm"):
        with pytest.raises(ValueError, match=message):
            make_strategy(method).train(experience(IMAGES, labels))
