"""States loaded in the middle of an experience, and experiences that were broken off and begun again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from avalanche_fmlora import FM_LORA_CLASSIFIER

LORA = ["fm_lora", "inflora", "sd_lora"]


class _Do(SupervisedPlugin):
    """Does something before an epoch of the second experience, in its first run."""

    def __init__(self, epoch: int, what: Any) -> None:
        super().__init__()
        self.epoch, self.what = epoch, what

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.experience.current_experience == 1 and strategy.clock.train_exp_epochs == self.epoch:
            what, self.what = self.what, lambda _: None
            what(strategy)


class _StopFirst(SupervisedPlugin):
    """Breaks off the first experience that trains, in its third epoch."""

    stopped = False

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if not self.stopped and strategy.clock.train_exp_epochs == 2:
            self.stopped = True
            raise KeyboardInterrupt


def _reload(strategy: Any) -> None:
    strategy.model.load_state_dict(strategy.model.state_dict())


def _stop(strategy: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["fm_lora", "sd_lora", "inflora", "dual_prompt", "coda_prompt", "l2p", "seq_lora"])
def test_a_state_that_is_loaded_as_it_was_changes_nothing(
    name: str, make_strategy: Any, train: Any, class_benchmark: Any, images: Tensor
) -> None:
    """As early stopping does: the optimizer keeps its tensors, the head what it knows of the past's covariance."""

    def run(what: Any) -> Any:
        return train(make_strategy(name, plugins=[_Do(2, what)], **FM_LORA_CLASSIFIER), class_benchmark, n=2)

    reloaded, plain = run(_reload), run(lambda _: None)
    assert len(plain.model.head.folded)
    assert torch.equal(reloaded.model.head.folded, plain.model.head.folded)
    assert torch.equal(reloaded.model.eval()(images), plain.model.eval()(images))


def test_a_state_that_is_refused_changes_nothing(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    def refused(strategy: Any) -> None:
        with pytest.raises(ValueError, match="state of a network of the same configuration"):
            strategy.model.load_adapter_state({"other": torch.zeros(1)})

    def run(what: Any) -> Any:
        return train(make_strategy("fm_lora", plugins=[_Do(2, what)]), class_benchmark, n=2).model.head.folded

    assert torch.equal(run(refused), run(lambda _: None))


@pytest.mark.parametrize("name", LORA)
def test_an_experience_that_is_let_go_leaves_no_trace(
    name: str, make_strategy: Any, class_benchmark: Any, images: Tensor
) -> None:
    options = {"prompt_length": 2} if name == "fm_lora" else {}
    strategy = make_strategy(name, plugins=[_Do(3, _stop)], lr_schedule="constant", **options)
    first, second, _ = class_benchmark.train_stream
    strategy.train(first)
    model, before = strategy.model, strategy.model.eval().features(images)
    state = {k: v.clone() for k, v in model.adapter_state().items() if not k.startswith("head.")}
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    assert not torch.equal(model.eval().features(images), before)
    model.discard()
    assert torch.equal(model.eval().features(images), before)
    kept = {k: v for k, v in model.adapter_state().items() if not k.startswith("head.")}
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[k], state[k]) for k in kept if k != "prompt.anchor")  # which `begin` sets anew
    model.discard()
    assert torch.equal(model.eval().features(images), before), "nothing is open: nothing to let go"


@pytest.mark.parametrize("name", LORA)
def test_begun_again_it_starts_from_the_model_before_it(name: str, make_strategy: Any, class_benchmark: Any) -> None:
    """Broken off while the prompt rests: the prompt trains again, and what measures the start sees the start."""
    starts: list[Tensor] = []
    trains: list[bool] = []

    class Watch(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_epochs == 0:
                starts.append(strategy.features_at_start()[0])
                if strategy.model.prompt is not None:
                    trains.append(strategy.model.prompt.prompt.requires_grad)

    options = {"prompt_length": 2} if name == "fm_lora" else {}
    strategy = make_strategy(
        name,
        plugins=[_Do(3, _stop), Watch()],
        lr_schedule="constant",
        classifier="class_mean",
        row_transport=True,
        **options,
    )
    first, second, _ = class_benchmark.train_stream
    strategy.train(first)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    strategy.train(list(class_benchmark.train_stream)[1])  # another object for the same experience
    assert len(starts) == 3
    torch.testing.assert_close(starts[2], starts[1])
    assert all(trains)
    assert int(strategy.model.lora.experiences) == 2
    assert strategy.model.prompt is None or int(strategy.model.prompt.experience) == 2
    if name == "fm_lora":
        ranks = next(p for p in strategy.plugins if hasattr(p, "history"))
        assert [row["experience"] for row in ranks.history] == [0, 1]


def test_rows_of_the_past_stay_if_their_class_was_broken_off(make_strategy: Any, domain_benchmark: Any) -> None:
    strategy = make_strategy("linear_probe", plugins=[_Do(3, _stop)])
    first, second, _ = domain_benchmark.train_stream
    strategy.train(first)
    rows = strategy.model.head.rows.clone()
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    strategy.model.discard()
    assert torch.equal(strategy.model.head.rows, rows)
    assert strategy.model.head.active_rows is None


@pytest.mark.parametrize("name", ["fm_lora", "inflora", "sd_lora", "coda_prompt", "linear_probe"])
def test_another_experience_trains_as_if_there_had_been_none(
    name: str, make_strategy: Any, class_benchmark: Any, caplog: Any
) -> None:
    first, second, third = class_benchmark.train_stream
    states = []
    for breaks in (True, False):
        strategy = make_strategy(name, plugins=[_Do(3, _stop)] if breaks else [])
        torch.manual_seed(4)
        strategy.train(first)
        if breaks:
            with pytest.raises(KeyboardInterrupt):
                strategy.train(second)
        torch.manual_seed(5)
        strategy.train(third)
        states.append(strategy.model.adapter_state())
    broken, whole = states
    assert "was broken off: what it has trained is dropped" in caplog.text
    assert not [k for k in whole if not torch.equal(broken[k], whole[k])]
    assert not broken["head.seen"][2:4].any(), "classes that were never trained to the end are not predicted"


def test_a_task_that_was_broken_off_leaves_its_expert_to_the_next(make_strategy: Any, class_benchmark: Any) -> None:
    strategy = make_strategy("dual_prompt", plugins=[_Do(3, _stop)])
    first, second, third = class_benchmark.train_stream
    strategy.train(first)
    expert = strategy.model.pool.experts[0].clone()
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    with pytest.raises(ValueError, match="Expected a model between experiences"):
        strategy.save("nowhere")
    strategy.train(third)
    assert int(strategy.model.pool.experiences) == 2
    assert torch.equal(strategy.model.pool.experts[0], expert)


@pytest.mark.parametrize("name", ["l2p", "dual_prompt", "coda_prompt"])
def test_no_query_of_an_image_outlives_its_experience(
    name: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Class means are taken when the task is closed, in a pass of their own."""
    strategy = make_strategy(name, classifier="class_mean", row_transport=True)
    train(strategy, class_benchmark, n=2, after=lambda s: _assert_no_queries(s.model.queries))


def _assert_no_queries(cache: Any) -> None:
    assert cache.enabled
    assert not len(cache)
    assert cache._weights is None


def test_joint_training_that_was_broken_off_begins_again(make_strategy: Any, class_benchmark: Any) -> None:
    class Stop(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_epochs == 1 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt

    stopped: list[bool] = []
    strategy = make_strategy("joint", plugins=[Stop()], epochs=2)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(class_benchmark.train_stream)
    strategy.train(class_benchmark.train_stream)
    assert strategy.model.head.seen.tolist() == [True] * 6
    with pytest.raises(ValueError, match="call `train` once, with the whole stream"):
        strategy.train(class_benchmark.train_stream)


def test_complexity_is_relative_to_the_first_experience_that_was_finished(
    make_strategy: Any, class_benchmark: Any
) -> None:
    broken, whole = make_strategy("fm_lora", plugins=[_StopFirst()]), make_strategy("fm_lora")
    with pytest.raises(KeyboardInterrupt):
        broken.train(class_benchmark.train_stream[0])
    for strategy in (broken, whole):
        strategy.train(class_benchmark.train_stream[1])
    assert broken.model.lora.first_complexity == whole.model.lora.first_complexity > 0


def test_means_are_not_kept_for_classes_that_recurred_in_vain(make_strategy: Any, domain_benchmark: Any) -> None:
    strategy = make_strategy("fm_lora", plugins=[_Do(2, _stop)])
    strategy.train(domain_benchmark.train_stream[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(domain_benchmark.train_stream[1])
    assert len(strategy.model.head.means) == 1
    strategy.model.discard()
    assert not len(strategy.model.head.means)
    strategy.train(domain_benchmark.train_stream[1])
    strategy.model.discard()
    assert len(strategy.model.head.means) == 2, "those of finished experiences stay"


@pytest.mark.parametrize("lowered", ["core", "prompt"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_that_were_lowered_since_stay_lowered(
    schedule: str, lowered: str, make_strategy: Any, class_benchmark: Any
) -> None:
    """The others are as before the experience, not as its schedule left them, and the prompt's is slow once."""
    rates: list[dict[str, float]] = []

    class First(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            if not strategy.clock.train_exp_epochs:
                rates.append({g["name"]: g["lr"] for g in strategy.optimizer.param_groups})

    first, second, third = class_benchmark.train_stream
    strategy = make_strategy("fm_lora", lr_schedule=schedule, plugins=[_Do(3, _stop), First()])
    strategy.train(first)
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    groups = {g["name"]: g for g in strategy.optimizer.param_groups}
    groups[lowered]["lr"] = 1e-5
    strategy.train(second)
    strategy.train(third)
    config = strategy.config
    share = config.meta_prompt.rate_share
    core, prompt = (1e-5 if lowered == name else getattr(config, f"lr_{name}") for name in ("core", "prompt"))
    assert [r["core"] for r in rates] == [config.lr_core, config.lr_core, core, core]
    assert [r["head"] for r in rates] == [config.lr_head] * 4
    assert [r["prompt"] for r in rates] == pytest.approx(
        [config.lr_prompt, *(share * p for p in (config.lr_prompt, prompt, prompt))]
    )


def test_what_is_loaded_after_a_broken_first_experience_trains_at_its_own_rates(
    make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Any
) -> None:
    saved = train(make_strategy("fm_lora"), class_benchmark, n=1)
    path = saved.save(tmp_path / "first.safetensors")
    strategy = make_strategy("fm_lora", lr_schedule="cosine", plugins=[_StopFirst()])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(class_benchmark.train_stream[0])
    strategy.load(path)
    share = strategy.config.meta_prompt.rate_share
    for experience in class_benchmark.train_stream[1:]:
        strategy.train(experience)
        rates = {g["name"]: g["lr"] for g in strategy.optimizer.param_groups}
        assert rates["prompt"] == pytest.approx(strategy.config.lr_prompt * share)
