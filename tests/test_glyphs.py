from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from glyph_likeness import MAX_LIKENESS, MAX_MIRRORED_LIKENESS, likeness
from timm.models.vision_transformer import VisionTransformer

from avalanche_fmlora.data import glyph_vit as packaged
from avalanche_fmlora.data.glyph_render import FACES, IMAGE_SIZE, available_faces, glyph_mask
from avalanche_fmlora.data.glyphs import (
    DOMAIN_CHARACTERS,
    PRETRAINING_CHARACTERS,
    SPLIT_CHARACTERS,
    STYLES,
    _images,
    domain_glyphs,
    faces_of,
    glyph_image,
    split_glyphs,
)
from avalanche_fmlora.data.uneven_glyphs import uneven_glyphs

CLASSES = SPLIT_CHARACTERS + DOMAIN_CHARACTERS
COMPARED_FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic")


def features(vit: VisionTransformer, images: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (packaged.GLYPH_VIT_MEAN, packaged.GLYPH_VIT_STD))
    x = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return F.normalize(torch.cat([vit(part) for part in x.split(250)]), dim=1)


def class_mean_accuracy(train: tuple[torch.Tensor, np.ndarray], test: tuple[torch.Tensor, np.ndarray]) -> float:
    n_classes = int(train[1].max()) + 1
    means = torch.stack([train[0][torch.tensor(train[1] == c)].mean(0) for c in range(n_classes)])
    predicted = (test[0] @ F.normalize(means, dim=1).T).argmax(1)
    return float((predicted == torch.tensor(test[1])).float().mean())


def test_character_lists_are_disjoint_and_drawn_in_enough_faces() -> None:
    everything = CLASSES + PRETRAINING_CHARACTERS
    assert (len(SPLIT_CHARACTERS), len(DOMAIN_CHARACTERS), len(PRETRAINING_CHARACTERS)) == (100, 20, 639)
    assert len(set(everything)) == len(everything)
    assert all(available_faces(char) == FACES for char in CLASSES)
    assert all(len(available_faces(char)) >= 4 for char in PRETRAINING_CHARACTERS)


def test_likeness_sees_one_shape_in_different_scripts_sizes_and_turns() -> None:
    latin_greek_cyrillic = likeness("A", "ΑА", COMPARED_FACES)
    assert np.allclose(latin_greek_cyrillic, 1, atol=1e-3)
    assert likeness("oVI", "OvlX", COMPARED_FACES)[[0, 1, 2], [0, 1, 2]].min() > 0.95
    assert likeness("d", "p", COMPARED_FACES, mirrored=True)[0, 0] > MAX_MIRRORED_LIKENESS
    assert likeness("w", "j", COMPARED_FACES)[0, 0] < 0.5


def test_no_two_classes_look_alike() -> None:
    straight, mirrored = (likeness(CLASSES, CLASSES, COMPARED_FACES, mirrored=m) for m in (False, True))
    np.fill_diagonal(straight, 0)
    np.fill_diagonal(mirrored, 0)
    assert straight.max() < MAX_LIKENESS
    assert mirrored.max() < MAX_MIRRORED_LIKENESS


def test_no_class_looks_like_a_pretraining_character() -> None:
    assert likeness(CLASSES, PRETRAINING_CHARACTERS, COMPARED_FACES).max() < MAX_LIKENESS


def test_test_faces_are_new_to_the_class() -> None:
    for seed in (0, 1):
        for char in CLASSES:
            train, test = faces_of(char, "train", seed), faces_of(char, "test", seed)
            assert (len(train), len(test)) == (9, 3)
            assert set(train) | set(test) == set(FACES)
    assert len({faces_of(char, "test") for char in CLASSES}) == 4


def test_an_image_depends_on_its_class_split_index_style_and_seed_alone() -> None:
    few = _images("agw", None, 0, 2, 0, IMAGE_SIZE)
    _images.cache_clear()
    assert _images("agw", None, 0, 2, 0, IMAGE_SIZE).digest() == few.digest()
    other_order = _images("wga", None, 0, 5, 0, IMAGE_SIZE)
    assert np.array_equal(other_order.images[[10, 11, 5, 6, 0, 1]], few.images)
    image = glyph_image("a", 0, "train")
    assert np.array_equal(image, few.images[0])
    changed = [
        glyph_image("a", 1, "train"),
        glyph_image("a", 0, "test"),
        glyph_image("a", 0, "train", seed=1),
        *(glyph_image("a", 0, "train", style=style) for style in STYLES),
    ]
    assert all(np.abs(image.astype(int) - c).mean() > 5 for c in changed)


def digest_of_some_images() -> str:
    """Of images that came out differently under other instructions when they were calculated in single precision, or
    that hold pixels at exact halves (stamps), and of their neighbours."""
    digest = hashlib.sha256(_images(SPLIT_CHARACTERS[4:9], None, 0, 12, 0, IMAGE_SIZE).digest().encode())
    for style in STYLES:
        count = 66 if style == "stamp" else 12
        digest.update(_images(DOMAIN_CHARACTERS[:2], style, 0, count, 0, IMAGE_SIZE).digest().encode())
    return digest.hexdigest()


def test_images_are_the_same_to_the_bit_with_the_instructions_of_another_processor() -> None:
    """torch and numpy told to do without vector instructions round otherwise; 8-bit pixels must not."""
    lesser = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    code = "import test_glyphs; print(test_glyphs.digest_of_some_images())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **lesser},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest_of_some_images()


def test_split_glyphs_shapes_counts_and_labels() -> None:
    benchmark = split_glyphs(n_experiences=5, class_order_seed=3, train_per_class=2, test_per_class=1)
    info = benchmark.info
    assert (info.kind, info.image_size, info.n_train, info.n_test) == ("class_incremental", 32, (40,) * 5, (20,) * 5)
    assert sorted(info.class_names) == sorted(SPLIT_CHARACTERS)
    assert info.class_names[0] == SPLIT_CHARACTERS[info.class_order[0]]
    x, y, *_ = benchmark.test_stream[4].dataset[0]
    assert (x.dtype, tuple(x.shape), y) == (torch.float32, (3, 32, 32), 80)
    raw = glyph_image(info.class_names[80], 0, "test")
    assert torch.allclose(x * 0.25 + 0.5, torch.tensor(raw).permute(2, 0, 1) / 255, atol=1e-6)
    assert info.split_hash == split_glyphs(n_experiences=10, train_per_class=2, test_per_class=1).info.split_hash


def test_domain_glyphs_shapes_counts_and_labels() -> None:
    benchmark = domain_glyphs(train_per_class=2, test_per_class=1, image_size=40)
    info = benchmark.info
    assert info.experience_names == ("stamp", "neon", "chalk", "stripes", "mosaic")
    assert (info.image_size, info.n_train, info.n_test) == (40, (40,) * 5, (20,) * 5)
    for experience in benchmark.train_stream:
        assert sorted(set(experience.dataset.targets)) == list(range(20))
    assert tuple(benchmark.train_stream[0].dataset[0][0].shape) == (3, 40, 40)


def test_uneven_glyphs_of_all_orders_are_the_same_data() -> None:
    """Tables average over class orders of one split hash; other counts, seeds and experiences are other data."""
    counts = {"train_per_class": 2, "test_per_class": 1}
    hashes = {uneven_glyphs(class_order_seed=order, **counts).info.split_hash for order in (None, 0, 1)}
    other = [{**counts, "test_per_class": 2}, {**counts, "seed": 1}, {**counts, "n_experiences": 5}]
    assert len(hashes) == 1
    assert len(hashes | {uneven_glyphs(**options).info.split_hash for options in other}) == 4
    with pytest.raises(ValueError, match="to divide the 100 classes"):
        uneven_glyphs(n_experiences=0)


def test_uneven_glyphs_are_as_hard_as_their_level_says() -> None:
    """Frozen class means read the easy half far better than the hard half; levels follow the class order."""
    benchmark = uneven_glyphs(n_experiences=10, class_order_seed=3, train_per_class=9, test_per_class=6)
    levels = benchmark.info.extra["levels"]
    assert sorted(levels) == [round(k / 9, 4) for k in range(10)] != levels
    assert uneven_glyphs(n_experiences=2, train_per_class=1, test_per_class=1).info.extra["levels"] == [1.0, 0.0]
    assert benchmark.info.extra["levels"] != uneven_glyphs(class_order_seed=4, train_per_class=1).info.extra["levels"]
    vit = packaged.glyph_vit().eval()
    accuracy = []
    for train, test in zip(benchmark.train_stream, benchmark.test_stream, strict=True):
        parts = []
        for experience in (train, test):
            items = [(x, int(y) % 10) for x, y, *_ in experience.dataset.eval()]
            with torch.no_grad():
                z = F.normalize(vit(torch.stack([x for x, _ in items])), dim=1)
            parts.append((z, np.array([y for _, y in items])))
        accuracy.append(class_mean_accuracy(*parts))
    order = np.argsort(levels)
    assert np.mean([accuracy[t] for t in order[:5]]) > 0.1 + np.mean([accuracy[t] for t in order[5:]])


def test_mistaken_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="`train_per_class` to be at least 1 but got 0"):
        split_glyphs(train_per_class=0)
    with pytest.raises(ValueError, match="`image_size` to be at least 8 but got 4"):
        domain_glyphs(image_size=4)
    with pytest.raises(ValueError, match=r"`n_experiences` to divide the 100 classes of uneven_glyphs but got 7"):
        uneven_glyphs(n_experiences=7)
    with pytest.raises(ValueError, match=r"U\+0020"):
        glyph_mask(" ", "DejaVuSans")


def test_packaged_weights_are_small_plain_timm_and_the_ones_described() -> None:
    path = files("avalanche_fmlora") / "assets" / "glyph_vit.safetensors"
    assert len(path.read_bytes()) <= 4 * 2**20
    facts = json.loads((path.parent / "glyph_vit.json").read_text())
    assert packaged.glyph_vit_sha256() == facts["sha256"]
    assert facts["characters"] == len(PRETRAINING_CHARACTERS)
    vit = packaged.glyph_vit()
    assert type(vit) is VisionTransformer
    assert not vit.training
    assert {p.dtype for p in vit.parameters()} == {torch.float32}
    assert {type(m).__module__.split(".")[0] for m in vit.modules()} <= {"torch", "timm"}
    assert not list(vit.buffers())
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(vit(x), vit.train()(x))
    assert not torch.equal(vit(x), packaged.glyph_vit(pretrained=False)(x))


def test_folding_keeps_the_output() -> None:
    torch.manual_seed(0)
    vit = packaged.build_glyph_vit(batch_norm=True)
    x = torch.randn(8, 3, 32, 32)
    vit.train()(x)
    folded = packaged.fold_batch_norm(vit.eval())
    assert torch.allclose(folded(x), vit(x), atol=1e-5)


def test_frozen_class_means_leave_room_on_split_glyphs() -> None:
    train, test = (_images(SPLIT_CHARACTERS, None, s, n, 0, IMAGE_SIZE) for s, n in ((0, 12), (1, 6)))
    vit = packaged.glyph_vit()
    accuracy = class_mean_accuracy(
        (features(vit, train.images), train.labels), (features(vit, test.images), test.labels)
    )
    assert 0.35 <= accuracy <= 0.75


def test_experiences_of_unequal_size_are_refused_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avalanche_fmlora.data.glyphs._images", None)
    with pytest.raises(
        ValueError, match=r"`n_experiences` to divide the 100 classes .* but got 3: choose one of \[1, 2, 4"
    ):
        split_glyphs(n_experiences=3)
