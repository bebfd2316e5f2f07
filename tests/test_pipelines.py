"""What users' pipelines do that a plain loop over a stream does not: merge, break off, label tasks, crop at random."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import GDumbPlugin
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from avalanche_fmlora.modules.class_rows import class_means
from avalanche_fmlora.plugins._passes import training_features
from avalanche_fmlora.plugins.class_means import ClassMeanPlugin


class At(SupervisedPlugin):
    """Calls a function with the strategy at one place of the loop, in a given experience."""

    def __init__(self, place: str, experience: int, call: Any) -> None:
        super().__init__()

        def there(strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_counter == experience:
                call(strategy)

        setattr(self, place, there)


class Labelled(Dataset[Any]):
    """Six images of each class, in a format of the caller's."""

    def __init__(self, classes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self.targets = [c for c in classes for _ in range(6)]
        self.images = torch.randn(len(self.targets), 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.targets[index]


def interrupt(strategy: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("prompt_length", [0, 1])
def test_merged_weights_do_not_reach_the_next_training(
    make_strategy: Any, train: Any, class_benchmark: Any, prompt_length: int
) -> None:
    merged, plain = (make_strategy("fm_lora", prompt_length=prompt_length, lr_core=0.05) for _ in range(2))
    train(merged, class_benchmark, after=lambda s: s.merge())
    train(plain, class_benchmark)
    merged.unmerge()
    ours, others = (s.model.adapter_state() for s in (merged, plain))
    assert all(torch.equal(ours[name], others[name]) for name in others)
    history = [next(p.history for p in s.plugins if hasattr(p, "history")) for s in (merged, plain)]
    assert history[0] == history[1]
    assert history[0][1]["similarity"] > 0


@pytest.mark.parametrize(
    ("method", "moves"),
    [("sd_lora", True), ("coda_prompt", True), ("dual_prompt", True), ("fm_lora", False), ("l2p", False)],
)
def test_old_rows_follow_from_the_features_before_the_experience_begins(
    make_strategy: Any, make_vit: Any, class_benchmark: Any, method: str, moves: bool
) -> None:
    """Also of the change that a method makes of its features in order to begin."""
    seen: dict[str, Any] = {}

    def look(strategy: Any) -> None:
        seen["begun"], labels = training_features(strategy)
        classes = labels.unique()
        means = F.normalize(class_means(seen["begun"], labels, classes)[0], dim=-1)
        torch.testing.assert_close(strategy.model.head.weights()[classes].detach(), means)  # new rows: as it begins
        seen["before"] = next(p for p in strategy.plugins if isinstance(p, ClassMeanPlugin))._before

    rate = {"sd_lora": "lr_lora", "fm_lora": "lr_core"}.get(method, "lr_prompt")
    strategy = make_strategy(
        method,
        make_vit(depth=5),
        classifier="class_mean",
        row_transport=True,
        plugins=[At("before_training_exp", 2, look)],
        **{rate: 0.05},
    )
    *past, last = class_benchmark.train_stream
    for experience in past:
        strategy.train(experience)
    strategy.experience, strategy.is_training = last, True
    known = F.normalize(training_features(strategy)[0], dim=-1)
    strategy.train(last)
    torch.testing.assert_close(seen["before"], known, rtol=0, atol=1e-6)
    jump = (F.normalize(seen["begun"], dim=-1) - known).norm(dim=-1).max()
    assert (jump > 1e-3) if moves else (jump < 1e-6)


@pytest.mark.parametrize("method", ["fm_lora", "dual_prompt", "coda_prompt", "l2p", "inflora", "sd_lora"])
def test_an_experience_that_was_broken_off_counts_once(
    make_strategy: Any, make_vit: Any, class_benchmark: Any, method: str
) -> None:
    done = {"sent": False}

    def once(strategy: Any) -> None:
        if not done["sent"]:
            done["sent"] = True
            raise KeyboardInterrupt

    # CODA-Prompt has room for three experiences, and no more
    strategy = make_strategy(method, make_vit(depth=5), plugins=[At("after_training_iteration", 0, once)])
    stream = class_benchmark.train_stream
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[0])
    for experience in stream:
        strategy.train(experience)
    counters = [strategy.model.lora, strategy.model.prompt, getattr(strategy.model, "pool", None)]
    names = ("experiences", "experience")
    counts = [int(getattr(c, n)) for c in counters if c is not None for n in names if hasattr(c, n)]
    assert set(counts) <= {3}
    assert strategy.model.head.seen.all()


@pytest.mark.parametrize("method", ["fm_lora", "sd_lora", "inflora"])
def test_an_experience_in_training_is_not_saved(
    make_strategy: Any, class_benchmark: Any, tmp_path: Any, method: str
) -> None:
    strategy = make_strategy(method, plugins=[At("after_training_iteration", 0, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(class_benchmark.train_stream[0])
    with pytest.raises(ValueError, match="save when `train` has returned"):
        strategy.save(tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("boundaries", [True, False])
def test_parts_of_an_online_stream_train_alike(make_strategy: Any, class_benchmark: Any, boundaries: bool) -> None:
    parts = split_online_stream(
        class_benchmark.train_stream, experience_size=8, access_task_boundaries=boundaries, shuffle=False
    )
    strategy = make_strategy("seq_lora", train_epochs=1)
    for part in parts:
        strategy.train(part)
    trained = [r["trainable_parameters"] for r in strategy.resources]
    assert len(trained) == 6
    assert set(trained) == {trained[0]}
    assert strategy.model.head.seen.all()


def test_random_crops_silence_the_free_teacher_aloud(
    make_strategy: Any, train: Any, class_benchmark: Any, caplog: Any
) -> None:
    """Noise in each batch stands for a random transform."""

    class Noise(SupervisedPlugin):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            strategy.mbatch[0] = strategy.mb_x + 0.01 * torch.randn_like(strategy.mb_x)

    with caplog.at_level(logging.WARNING):
        train(make_strategy("fm_lora", distillation=1.0), class_benchmark)
    assert "Distillation is off" not in caplog.text
    with caplog.at_level(logging.WARNING):
        train(make_strategy("fm_lora", distillation=1.0, plugins=[Noise()]), class_benchmark)
    assert caplog.text.count("Distillation is off in this experience") == 2  # in the two that have a past
    assert "teacher='every_step'" in caplog.text


def test_a_nameless_optimizer_is_told_what_it_misses(
    make_strategy: Any, make_vit: Any, train: Any, class_benchmark: Any, caplog: Any
) -> None:
    vit = make_vit()
    with caplog.at_level(logging.WARNING):
        train(make_strategy("fm_lora", vit, optimizer=torch.optim.Adam(vit.parameters(), lr=1e-3)), class_benchmark)
    assert "no group named 'prompt'" in caplog.text


def test_classes_that_return_under_another_task_label_are_named(
    make_strategy: Any, train: Any, task_benchmark: Any, domain_benchmark: Any, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        train(make_strategy("seq_lora", train_epochs=1), domain_benchmark)
    assert not caplog.records
    strategy = make_strategy("seq_lora", train_epochs=1)
    for label in (0, 1):
        experience = task_benchmark.train_stream[0]
        strategy.experience, strategy.is_training = _Labelled(experience, label), True
        strategy.model_adaptation()
    assert caplog.text.count("of task 1 were of another task before") == 1


class _Labelled:
    def __init__(self, experience: Any, label: int) -> None:
        self.task_labels, self.dataset = [label], experience.dataset


def test_keywords_for_plugins_do_not_reach_the_loader(make_strategy: Any, domain_benchmark: Any) -> None:
    strategy = make_strategy("fm_lora", train_epochs=1)
    strategy.train(domain_benchmark.train_stream[0], reset_optimizer_state=True, mine=3)
    assert len(strategy.resources) == 1


def test_a_prompt_that_goes_back_before_its_slow_step_takes_it_again(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """As early stopping does: the state of an epoch before the step comes back at the end."""
    kept: dict[str, Any] = {}

    def keep(strategy: Any) -> None:
        if strategy.clock.train_exp_epochs == 1:
            kept["state"] = {k: v.clone() for k, v in strategy.model.state_dict().items()}

    def restore(strategy: Any) -> None:
        if strategy.clock.train_exp_epochs == strategy.train_epochs - 1:
            strategy.model.load_state_dict(kept["state"])

    plugins = [At("after_training_epoch", 1, keep), At("after_training_epoch", 1, restore)]
    strategy = make_strategy("fm_lora", prompt_length=2, lr_prompt=0.05, plugins=plugins, train_epochs=8)
    train(strategy, class_benchmark, n=2)
    prompt, free = strategy.model.prompt, kept["state"]["prompt.prompt"]
    assert (free - prompt.anchor).norm() > 0
    torch.testing.assert_close(prompt.prompt.detach(), prompt.anchor + (free - prompt.anchor) / 2)


@pytest.mark.parametrize("name", ["fm_lora", "inflora", "sd_lora", "seq_lora", "l2p"])
def test_a_broken_off_experience_gives_way_to_what_was_saved(
    name: str, make_strategy: Any, class_benchmark: Any, images: Tensor, tmp_path: Path
) -> None:
    """It predicts as it did when it was saved, and the next training opens an experience of its own."""
    first, second, *_ = class_benchmark.train_stream
    strategy = make_strategy(name, plugins=[At("after_training_iteration", 1, interrupt)])
    strategy.train(first)
    path = strategy.save(tmp_path / "first.safetensors")
    before = strategy.model.eval()(images)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    strategy.load(path)
    after = strategy.model.eval()(images)
    assert torch.equal(after[:, : before.shape[1]], before)
    lora = strategy.model.lora
    assert lora is None or not lora.active
    assert not strategy.model.head.before.numel()
    strategy.clock.train_exp_counter = 2  # the plugin breaks off no more
    strategy.train(second)
    assert lora is None or int(lora.experiences) == 2
    prompt = strategy.model.prompt
    assert prompt is None or int(prompt.experience) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_that_a_strategy_holds_is_the_one_that_learns(
    compiled: bool, make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor
) -> None:
    """Twin: forward passes of the model itself, after it was replaced by a copy, and in a copied strategy."""
    with torch.compiler.set_stance("force_eager"):
        strategy = train(make_strategy("fm_lora", compile=compiled), class_benchmark, n=1)
        copied = copy.deepcopy(strategy)
        strategy.model = copy.deepcopy(strategy.model)
        for held in (strategy, copied):
            held.train(list(class_benchmark.train_stream)[1])
            held.mbatch = [images, None]
            held.model.eval()
            assert torch.equal(held.forward(), held.model(images))


@pytest.mark.parametrize("name", ["fm_lora", "inflora", "sd_lora", "ncm"])
def test_backbones_in_float64_learn_and_merge(name: str, make_strategy: Any, make_vit: Any, images: Tensor) -> None:
    strategy = make_strategy(name, make_vit(dtype=torch.float64), train_epochs=1)
    parts = [as_classification_dataset(Labelled(classes, torch.float64)) for classes in ((0, 1), (2, 3))]
    for experience in benchmark_from_datasets(train=parts).train_stream:
        strategy.train(experience)
    x = images.double()
    merged = strategy.merged_model().eval()(x)
    assert merged.dtype == torch.float64
    torch.testing.assert_close(merged, strategy.model.eval()(x).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "precision"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_weights_in_half_precision_are_refused(name: str, precision: str, make_strategy: Any, make_vit: Any) -> None:
    with pytest.raises(ValueError, match=rf"are in {name}, .*pass model.float\(\), and precision='{precision}'"):
        make_strategy("fm_lora", make_vit(dtype=getattr(torch, name)))


def test_a_data_set_makes_its_own_batches(make_strategy: Any) -> None:
    """Twin: the same data without a way of their own; one that halves every image shows in what is learned."""
    calls: list[int] = []

    def halved(items: Any) -> Any:
        calls.append(len(items))
        images, *others = default_collate(items)
        return [images / 2, *others]

    seen = []
    for collate in (halved, None):
        data = _make_taskaware_classification_dataset(Labelled((0, 1)), collate_fn=collate)
        if collate is None:
            data.collate_fn = default_collate
        (experience,) = benchmark_from_datasets(train=[data]).train_stream
        strategy = make_strategy("fm_lora", train_epochs=1)
        strategy.train(experience)
        seen.append(torch.cat([images for images, _ in strategy.batches(experience.dataset)]))
    assert sum(calls) > 0
    torch.testing.assert_close(2 * seen[0], seen[1])


@pytest.mark.filterwarnings("ignore:Call to deprecated function update:DeprecationWarning")  # GDumb's own
@pytest.mark.parametrize("name", ["fm_lora", "linear_probe", "l2p", "sd_lora"])
def test_a_model_that_starts_anew_on_gdumbs_memory_learns_all_its_classes(
    name: str, make_strategy: Any, class_benchmark: Any, train: Any
) -> None:
    strategy = train(make_strategy(name, plugins=[GDumbPlugin(18)]), class_benchmark, n=3)
    head = strategy.model.head
    if strategy.config.classifier == "class_mean":
        assert head.counts.tolist() == [3] * 6
    else:  # linear rows start at zero
        assert (head.rows.norm(dim=-1) > 0).all()
    if strategy.model.lora is not None:
        assert int(strategy.model.lora.experiences) == 1


@pytest.mark.filterwarnings("ignore:Call to deprecated function update:DeprecationWarning")  # GDumb's own
def test_gdumbs_memory_gives_means_of_all_domains(make_strategy: Any, domain_benchmark: Any, train: Any) -> None:
    counts: list[list[int]] = []
    strategy = make_strategy("ncm", plugins=[GDumbPlugin(9)])
    train(strategy, domain_benchmark, after=lambda s: counts.append(s.model.head.counts.tolist()))
    assert counts == [[3] * 3] * 3


def test_joint_training_looks_at_all_task_labels(make_strategy: Any, caplog: pytest.LogCaptureFixture) -> None:
    sets = [
        _make_taskaware_classification_dataset(Labelled((0, 1)), task_labels=[t] * 12, targets=[0] * 6 + [1] * 6)
        for t in (0, 1)
    ]
    stream = benchmark_from_datasets(train=sets).train_stream
    for experience in stream:
        experience.task_labels = [experience.current_experience]
    strategy = make_strategy("joint")
    strategy.train(stream)
    assert "of task 1 were of another task before" in caplog.text
