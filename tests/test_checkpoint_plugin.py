"""Stopped and resumed from a checkpoint, every method ends as one that never stopped, bit for bit."""

from __future__ import annotations

import operator
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, amca_metrics, forgetting_metrics
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LRSchedulerPlugin, MASPlugin, ReplayPlugin
from safetensors.torch import load_file

from avalanche_fmlora import CheckpointPlugin, RankSelectionPlugin
from avalanche_fmlora.modules.network import backbone_parameter_names
from avalanche_fmlora.strategies.registry import methods

METHODS = sorted(methods())
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (
        "fm_lora",
        {"classifier": "class_mean", "row_transport": True, "prompt_length": 2, "stability": 0.1},
    ),
    "per layer": ("fm_lora", {"rank_selection": {"per_layer": True}}),
    "slow bases": ("fm_lora", {"bases": "slow", "optimizer": "sgd"}),
    "whitened": ("ncm", {"whitening": 0.5, "whitening_covariance": "running"}),
    "fp16": ("seq_lora", {"precision": "fp16"}),
    "imprinted": ("seq_lora", {"classifier": "imprinted"}),
    "class means": ("seq_lora", {"classifier": "class_mean", "row_transport": True}),
}
CASES = {**{name: (name, {}) for name in METHODS if name != "joint"}, **SPECIAL}


def _sgd(momentum: float) -> Any:
    return lambda groups: torch.optim.SGD(groups, momentum=momentum)


class _Stop(SupervisedPlugin):
    """Breaks off in the middle of an experience."""

    checkpointed = False

    def __init__(self, experience: int | None) -> None:
        super().__init__()
        self.experience = experience

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.experience.current_experience == self.experience:
            raise KeyboardInterrupt

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.train_epochs == 0:
            self.after_training_epoch(strategy)


def _evaluator() -> EvaluationPlugin:
    return EvaluationPlugin(
        accuracy_metrics(epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        loggers=[],
    )


def _run(case: str, folder: Path | None, make_strategy: Any, benchmark: Any, stop: int | None = None) -> Any:
    name, options = CASES[case]
    plugins = [] if folder is None else [CheckpointPlugin(folder)]
    strategy = make_strategy(name, train_epochs=2, evaluator=_evaluator(), plugins=[*plugins, _Stop(stop)], **options)
    torch.manual_seed(0)
    start = 0 if folder is None else plugins[0].resume(strategy)
    for experience in benchmark.train_stream[start:]:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    return strategy


def _assert_same(one: Any, other: Any, place: str = "") -> None:
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            _assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_same(a, b, f"{place}/{i}")
    else:
        assert one == other, place


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_as_one_that_never_stopped(
    case: str, make_strategy: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    whole = _run(case, None, make_strategy, class_benchmark)
    for stop in (1, 2):  # the second time a run that has been resumed is stopped
        with pytest.raises(KeyboardInterrupt):
            _run(case, tmp_path, make_strategy, class_benchmark, stop)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
    resumed = _run(case, tmp_path, make_strategy, class_benchmark)
    _assert_same(resumed.training_state(), whole.training_state())
    assert resumed.clock.train_exp_counter == 3


@pytest.mark.parametrize("name", METHODS)
def test_the_backbone_is_not_in_it(
    name: str, make_vit: Any, make_strategy: Any, train: Any, make_class_benchmark: Any, tmp_path: Path
) -> None:
    """A checkpoint is at most three times what the method adds to the backbone, its head included.

    Some 20 kB of random generators and counters are in it, whatever the size of the model.
    """
    vit = make_vit(embed_dim=768, num_heads=4)
    strategy = make_strategy(name, vit, train_epochs=1, plugins=[CheckpointPlugin(tmp_path)])
    own = {f"vit.{n}" for n in backbone_parameter_names(strategy.model.vit)}

    def check(strategy: Any) -> None:
        path = max(tmp_path.iterdir())
        added = sum(t.numel() * t.element_size() for t in strategy.model.adapter_state().values())
        assert path.stat().st_size <= 3 * added
        names = {k.partition("model/tensors/")[2] for k in load_file(path)} - {""}
        assert names == set(strategy.model.adapter_state())
        assert not names & own

    train(strategy, make_class_benchmark(20, 2, 2), after=check)
    assert len(list(tmp_path.iterdir())) == (1 if strategy.joint else 2)


def test_a_folder_with_another_runs_checkpoints_is_left_alone(
    make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    train(make_strategy("ncm", plugins=[CheckpointPlugin(tmp_path)]), class_benchmark, n=1)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"Expected an empty folder but .* call `start = plugin\.resume\(strategy\)`"):
        train(make_strategy("ncm", plugins=[CheckpointPlugin(tmp_path)]), class_benchmark, n=1)
    plugin = CheckpointPlugin(tmp_path)
    with pytest.raises(ValueError, match=r"it has method = 'ncm' and here it is 'seq_lora'(.|\n)*There is no other"):
        plugin.resume(make_strategy("seq_lora", plugins=[plugin]))
    with pytest.raises(ValueError, match=r"it has options\.seed = 0 and here it is 1"):
        plugin.resume(make_strategy("ncm", plugins=[plugin], seed=1))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_backbone_is_refused(
    make_vit: Any, make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    train(make_strategy("seq_lora", plugins=[CheckpointPlugin(tmp_path)]), class_benchmark, n=1)
    plugin = CheckpointPlugin(tmp_path)
    with pytest.raises(ValueError, match="something else: it has backbone = "):
        plugin.resume(make_strategy("seq_lora", make_vit(seed=1), plugins=[plugin]))


def test_other_plugins_and_metrics_are_refused(
    make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    train(make_strategy("seq_lora", plugins=[CheckpointPlugin(tmp_path)]), class_benchmark, n=1)
    plugin = CheckpointPlugin(tmp_path)
    with pytest.raises(ValueError, match=r"with the metrics \[\] but this one has \['EpochAccuracy'"):
        plugin.resume(make_strategy("seq_lora", plugins=[plugin], evaluator=_evaluator()))
    with pytest.raises(
        ValueError, match=r"with the plugins \['SchedulePlugin'\] but this one has \['SchedulePlugin', '_R"
    ):
        plugin.resume(make_strategy("seq_lora", plugins=[plugin, _Remembers()]))


def test_strategies_of_others_are_refused(class_benchmark: Any, tmp_path: Path) -> None:
    from avalanche.models import SimpleMLP
    from avalanche.training import Naive

    plugin, model = CheckpointPlugin(tmp_path), SimpleMLP(input_size=3 * 16 * 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(model=model, optimizer=optimizer, plugins=[plugin], evaluator=None)
    message = "expects a strategy of avalanche_fmlora but got Naive"
    with pytest.raises(ValueError, match=message):
        strategy.train(class_benchmark.train_stream[0])
    with pytest.raises(ValueError, match=message):
        plugin.resume(strategy)


class _Remembers(SupervisedPlugin):
    """A user's own: numbers it keeps, and something that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.by_class: dict[int, int] = {}
        self.model = torch.nn.Linear(1, 1)
        self.better, self.half, self.kind = operator.gt, (lambda x: x / 2), dict  # code, which holds nothing
        calls: list[Any] = []
        self.counted = lambda x: calls.append(x)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.losses.append(float(strategy.loss.detach()))
        for y in strategy.mb_y.tolist():
            self.by_class[y] = self.by_class.get(y, 0) + 1


def test_what_the_user_adds_goes_on_too(make_strategy: Any, class_benchmark: Any, tmp_path: Path, caplog: Any) -> None:
    """Plugins, schedulers that run through, optimizers with tensors of their own, evaluation within training."""

    def run(folder: Path | None, n: int) -> tuple[Any, ...]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.tensor(2.0))
        optimizer = torch.optim.AdamW([{"params": [weight], "name": "lora", "lr": 0.01}])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        remembers = _Remembers()
        checkpoints = [CheckpointPlugin(folder)] if folder is not None else []
        strategy = make_strategy(
            "seq_lora",
            optimizer=optimizer,
            criterion=lambda logits, y: torch.nn.functional.cross_entropy(logits, y) * weight,
            plugins=[*checkpoints, remembers, LRSchedulerPlugin(scheduler, reset_scheduler=False, reset_lr=False)],
            evaluator=_evaluator(),
            eval_every=1,
            train_epochs=3,
        )
        start = checkpoints[0].resume(strategy) if checkpoints else 0
        for experience in class_benchmark.train_stream[start:n]:
            strategy.train(experience, eval_streams=[class_benchmark.test_stream])
        return strategy, scheduler, weight.detach(), remembers

    run(tmp_path, 2)
    assert caplog.text.count("can't hold what _Remembers keeps in `model`, `counted`: going on") == 1
    assert "LRScheduler" not in caplog.text
    whole, resumed = run(None, 3), run(tmp_path, 3)
    assert resumed[1].state_dict() == whole[1].state_dict()
    assert resumed[1].last_epoch == 9
    assert torch.equal(resumed[2], whole[2])
    assert resumed[2] != 2
    assert (resumed[3].losses, resumed[3].by_class) == (whole[3].losses, whole[3].by_class)
    states = [s.model.state_dict() for s in (whole[0], resumed[0])]
    assert not [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]


def test_a_finished_run_has_nothing_left_to_do(make_strategy: Any, class_benchmark: Any, tmp_path: Path) -> None:
    first = _run("fm_lora", tmp_path, make_strategy, class_benchmark)
    again = _run("fm_lora", tmp_path, make_strategy, class_benchmark)
    _assert_same(again.training_state(), first.training_state())
    history = next(p.history for p in again.plugins if hasattr(p, "history"))
    assert [h["experience"] for h in history] == [0, 1, 2]


def test_half_of_a_metric_is_worse_than_a_new_one(
    make_strategy: Any, class_benchmark: Any, tmp_path: Path, caplog: Any
) -> None:
    """AMCA makes an object for each stream that it meets, which a checkpoint can't: it starts anew."""
    experiences = list(class_benchmark.train_stream)
    strategies = []
    for _ in range(2):
        checkpoints = CheckpointPlugin(tmp_path)
        evaluator = EvaluationPlugin(amca_metrics(), loggers=[])
        strategy = make_strategy("ncm", evaluator=evaluator, plugins=[checkpoints])
        start = checkpoints.resume(strategy)
        strategies.append(start)
        strategy.train(experiences[start])
        strategy.eval(class_benchmark.test_stream)
    assert strategies == [0, 1]
    assert "The metric Top1_AMCA_Stream" in caplog.text


@pytest.mark.parametrize(("name", "evaluation"), [(n, e) for n in ("fm_lora", "l2p", "sd_lora") for e in (1, 2)])
def test_killed_in_an_evaluation_it_ends_with_the_same_model(
    name: str, evaluation: int, make_strategy: Any, class_benchmark: Any, images: Any, tmp_path: Path
) -> None:
    class InEval(SupervisedPlugin):
        checkpointed = False

        def before_eval(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_counter == evaluation:
                raise KeyboardInterrupt

    def run(folder: Path, *plugins: Any) -> Any:
        checkpoints = CheckpointPlugin(folder)
        strategy = make_strategy(name, train_epochs=1, plugins=[checkpoints, *plugins])
        torch.manual_seed(0)
        for experience in class_benchmark.train_stream[checkpoints.resume(strategy) :]:
            strategy.train(experience)
            strategy.eval(class_benchmark.test_stream)
        return strategy.model.eval()(images)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", InEval())
    assert torch.equal(run(tmp_path / "killed"), run(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"optimizer": "sgd"}, "optimizer"), ({"train_epochs": 3}, "epochs"), ({"lr_head": 0.5}, "lr_head")],
)
def test_a_strategy_that_trains_otherwise_is_refused(
    changed: dict[str, Any], said: str, make_strategy: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    def build(**options: Any) -> Any:
        return make_strategy("seq_lora", plugins=[CheckpointPlugin(tmp_path)], **{"train_epochs": 1, **options})

    build().train(class_benchmark.train_stream[0])
    with pytest.raises(ValueError, match=f"(?s){said}.*build the strategy as the one that was saved"):
        CheckpointPlugin(tmp_path).resume(build(**changed))


@pytest.mark.parametrize("kind", [EWCPlugin, MASPlugin])
def test_what_can_not_be_kept_inside_of_a_mapping_is_named(
    kind: Any, make_strategy: Any, class_benchmark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = kind(1.0)
    strategy = make_strategy("seq_lora", plugins=[plugin, CheckpointPlugin(tmp_path)])
    strategy.train(class_benchmark.train_stream[0])
    held = "params" if kind is MASPlugin else "importances"
    assert f"can't hold what {kind.__name__} keeps in" in caplog.text
    assert f"`{held}`" in caplog.text


@pytest.mark.parametrize(
    ("name", "saved", "now", "said"),
    [
        ("seq_lora", {"optimizer": _sgd(0.9)}, {"optimizer": _sgd(0.1)}, "optimizer_options.*momentum"),
        ("seq_lora", {}, {"criterion": torch.nn.CrossEntropyLoss(label_smoothing=0.3)}, "criterion_options"),
        (
            "fm_lora",
            {"rank_selection": RankSelectionPlugin()},
            {"rank_selection": RankSelectionPlugin(kl_weight=9.0, search_share=0.9)},
            "RankSelectionPlugin has kl_weight=9.0 where the saved one had 0.1, search_share=0.9",
        ),
    ],
)
def test_other_settings_of_what_the_user_gave_are_refused(
    name: str, saved: Any, now: Any, said: str, make_strategy: Any, class_benchmark: Any, tmp_path: Path
) -> None:
    build = {"train_epochs": 1}
    make_strategy(name, plugins=[CheckpointPlugin(tmp_path)], **saved, **build).train(class_benchmark.train_stream[0])
    with pytest.raises(ValueError, match=f"(?s){said}"):
        CheckpointPlugin(tmp_path).resume(make_strategy(name, plugins=[CheckpointPlugin(tmp_path)], **now, **build))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_arguments_of_foreign_plugins_are_named(
    make_strategy: Any, class_benchmark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for size in (3, 6):
        checkpoints = CheckpointPlugin(tmp_path)
        strategy = make_strategy("seq_lora", train_epochs=1, plugins=[ReplayPlugin(mem_size=size), checkpoints])
        if checkpoints.resume(strategy) == 0:
            strategy.train(class_benchmark.train_stream[0])
    assert "ReplayPlugin has mem_size=6 where the saved one had 3, and goes on with the saved" in caplog.text
