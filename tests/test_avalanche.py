"""Inside Avalanche: its plugins, metrics, loggers and benchmarks have their effect on our strategies."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    loss_metrics,
    timing_metrics,
)
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training.plugins import (
    AGEMPlugin,
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    LwFPlugin,
    ReplayPlugin,
)


class Note(SupervisedPlugin):
    """Keeps labels and losses of every training step, an experience at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[set[int]] = []
        self.losses: list[list[float]] = []
        self.added: list[list[float]] = []
        self.epochs: list[int] = []

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.labels.append(set())
        self.losses.append([])

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.labels[-1] |= set(strategy.mb_y.tolist())
        self.losses[-1].append(strategy.loss.item())

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.epochs.append(strategy.clock.train_exp_epochs)


@pytest.mark.parametrize("method", ["fm_lora", "seq_lora"])
def test_replay_brings_old_labels_into_the_batch_and_the_loss(
    method: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    note = Note()
    replay = ReplayPlugin(mem_size=12)
    strategy = train(make_strategy(method, plugins=[replay, note], train_epochs=2), class_benchmark)
    assert note.labels == [{0, 1}, {0, 1, 2, 3}, {0, 1, 2, 3, 4, 5}]
    assert all(math.isfinite(x) for losses in note.losses for x in losses)
    assert len(replay.storage_policy.buffer) == 12
    assert strategy.model.head.counts.tolist() == ([8.0] * 6 if method == "fm_lora" else [0.0] * 6)


def test_the_loss_is_over_current_classes_and_those_replayed(make_strategy: Any, class_benchmark: Any) -> None:
    """By hand: cross-entropy of the logits of these classes only."""
    strategy = make_strategy("linear_probe", train_epochs=1)
    seen: list[tuple[Any, Any, Any]] = []

    class Look(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            seen.append((strategy.mb_output.detach().clone(), strategy.mb_y.clone(), strategy.loss.item()))

    strategy.plugins.append(Look())
    strategy.train(list(class_benchmark.train_stream)[:2])
    for k, (logits, labels, loss) in enumerate(seen):
        columns = [0, 1] if k < 2 else [2, 3]
        expected = torch.nn.functional.cross_entropy(logits[:, columns], labels - columns[0])
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert torch.isfinite(logits).all(), "the mask is in the loss, not in the logits"


@pytest.mark.parametrize("method", ["l2p", "dual_prompt", "coda_prompt", "inflora", "sd_lora", "seq_lora"])
def test_lwf_copies_the_model_of_any_method(make_strategy: Any, train: Any, class_benchmark: Any, method: str) -> None:
    lwf = LwFPlugin(alpha=5.0)
    strategy = train(make_strategy(method, plugins=[lwf]), class_benchmark, n=2)
    images = class_benchmark.test_stream[0].dataset.eval()[0][0][None]
    with torch.no_grad():
        assert torch.equal(lwf.lwf.prev_model.eval()(images), strategy.model.eval()(images))


@pytest.mark.parametrize("method", ["fm_lora", "coda_prompt", "seq_lora"])
def test_agem_reads_its_memory_in_every_step(make_strategy: Any, train: Any, class_benchmark: Any, method: str) -> None:
    agem, note = AGEMPlugin(4, 4), Note()
    train(make_strategy(method, plugins=[agem, note], train_epochs=2), class_benchmark, n=2)
    assert len(agem.buffers) == 2
    assert all(math.isfinite(x) for losses in note.losses for x in losses)


def test_lwf_adds_a_term_from_the_second_experience_on(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    terms: list[list[float]] = []

    class Lwf(LwFPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            terms.append([])

        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            before = strategy.loss.item()
            super().before_backward(strategy, **kwargs)
            terms[-1].append(strategy.loss.item() - before)

    lwf = Lwf(alpha=5.0)
    strategy = train(make_strategy("fm_lora", plugins=[lwf], distillation=0.0, lr_core=0.05), class_benchmark)
    assert set(terms[0]) == {0.0}
    assert all(max(t) > 1e-4 and all(math.isfinite(x) for x in t) for t in terms[1:])
    assert all(abs(t[0]) < 1e-6 for t in terms[1:]), "teacher and student start alike"
    teacher = lwf.lwf.prev_model
    images = class_benchmark.test_stream[0].dataset.eval()[0][0][None]
    with torch.no_grad():
        assert torch.equal(teacher.eval()(images), strategy.model.eval()(images)), "a copy of the finished model"
    assert teacher.lora.layers[0] is teacher.vit.blocks[0].attn.qkv, "whose own maps it moves"


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_ewc_knows_what_lasts(mode: str, make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    """The prompt of FM-LoRA lasts: it gets an importance. The frozen backbone gets none."""
    ewc = EWCPlugin(ewc_lambda=10.0, mode=mode, decay_factor=0.5 if mode == "online" else None)
    strategy = train(make_strategy("fm_lora", plugins=[ewc], train_epochs=2), class_benchmark)
    latest = ewc.importances[2]
    assert latest["prompt.prompt"].data.abs().max() > 0
    backbone = [v.data.abs().max() for k, v in latest.items() if k.startswith("vit.") and ".base." in k]
    assert backbone
    assert max(backbone) == 0
    assert strategy.model.prompt.prompt.requires_grad


def test_ewc_holds_a_sequential_lora(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    """The stronger the penalty, the less the LoRA moves in the second experience."""
    changes = []
    for strength in (0.0, 1e3, 1e5):
        ewc, snapshots = EWCPlugin(ewc_lambda=strength), list[Any]()
        strategy = make_strategy("seq_lora", plugins=[ewc], lr_lora=1e-3, lr_schedule="constant")
        train(
            strategy, class_benchmark, after=lambda s, to=snapshots: to.append(s.model.lora.layers[0].up.clone()), n=2
        )
        changes.append((snapshots[1] - snapshots[0]).norm().item())
        assert ewc.importances[0]["vit.blocks.0.attn.qkv.up"].data.max() > 0
    assert changes[2] < changes[1] < changes[0]


def test_early_stopping_stops_and_returns_to_the_best(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[TextLogger(io.StringIO())])
    note = Note()
    stopping = EarlyStoppingPlugin(patience=2, val_stream_name="train_stream/Task000", mode="max")
    strategy = make_strategy(
        "fm_lora",
        plugins=[note, stopping],
        evaluator=evaluator,
        eval_every=1,
        train_epochs=40,
        lr_bases=0.0,
        lr_head=0.0,
    )
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="is not computed yet"):
        strategy.train(class_benchmark.train_stream[0], eval_streams=[class_benchmark.train_stream[:1]])
    if not stopping.best_state:
        pytest.fail(f"no metric of that name in {sorted(strategy.evaluator.get_last_metrics())}")
    assert note.epochs[0] < 40
    assert strategy.model.head.seen.tolist() == [True, True]


def _evaluator(*loggers: Any) -> EvaluationPlugin:
    return EvaluationPlugin(
        accuracy_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        loss_metrics(epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(experience=True, stream=True),
        timing_metrics(epoch=True),
        loggers=list(loggers),
    )


def test_metrics_and_loggers(make_strategy: Any, train: Any, class_benchmark: Any, tmp_path: Path, capsys: Any) -> None:
    text, board = io.StringIO(), TensorboardLogger(str(tmp_path / "board"))
    csv = CSVLogger(str(tmp_path / "csv"))
    evaluator = _evaluator(InteractiveLogger(), TextLogger(text), csv, board)
    strategy = make_strategy("fm_lora", evaluator=evaluator, train_epochs=2)
    accuracies = []
    for experience in class_benchmark.train_stream:
        strategy.train(experience)
        accuracies.append(_by_experience(strategy.eval(class_benchmark.test_stream)))
    last = {k.removesuffix("/Task000"): v for k, v in strategy.evaluator.get_last_metrics().items()}
    assert accuracies[0][2] == accuracies[0][1] == 0.0, "classes never seen are never predicted"
    assert last["Top1_Acc_Stream/eval_phase/test_stream"] == pytest.approx(sum(accuracies[-1].values()) / 3)
    assert last["StreamForgetting/eval_phase/test_stream"] == pytest.approx(
        sum(accuracies[t][t] - accuracies[-1][t] for t in range(2)) / 2
    )
    assert last["StreamBWT/eval_phase/test_stream"] == pytest.approx(-last["StreamForgetting/eval_phase/test_stream"])
    assert math.isfinite(last["Loss_Stream/eval_phase/test_stream"])
    assert 0 < last["Time_Epoch/train_phase/train_stream"] < 60
    assert "Top1_Acc_Stream/eval_phase/test_stream" in text.getvalue()
    csv.close()
    rows = (tmp_path / "csv" / "eval_results.csv").read_text().strip().splitlines()
    assert len(rows) == 1 + 9
    assert list((tmp_path / "board").iterdir())
    board.writer.close()
    capsys.readouterr()


def _by_experience(metrics: dict[str, Any]) -> dict[int, float]:
    return {int(k[-3:]): v for k, v in metrics.items() if k.startswith("Top1_Acc_Exp/eval_phase/test_stream")}


def test_avalanches_accuracy_matrix(make_strategy: Any, class_benchmark: Any) -> None:
    from avalanche.evaluation.metrics import accuracy_matrix_metrics

    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True), accuracy_matrix_metrics(), loggers=[TextLogger(io.StringIO())]
    )
    strategy, rows = make_strategy("seq_lora", evaluator=evaluator, train_epochs=2), []
    for experience in class_benchmark.train_stream:
        strategy.train(experience)
        rows.append(_by_experience(strategy.eval(class_benchmark.test_stream)))
    matrix = next(v for k, v in strategy.evaluator.get_last_metrics().items() if "atrix" in k)
    expected = torch.tensor([[row[t] for t in range(3)] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(matrix, dtype=torch.float64), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("eval_every", "evaluations"), [(-1, 0), (0, 2), (1, 5)])
@pytest.mark.parametrize("method", ["fm_lora", "seq_lora"])
def test_periodic_evaluation_leaves_training_as_it_is(
    eval_every: int, evaluations: int, method: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """Evaluation between epochs, also on future experiences: the same bits as without."""
    counts, states = [], []
    for every in (-1, eval_every):
        count = 0

        class Count(SupervisedPlugin):
            def before_eval(self, strategy: Any, **kwargs: Any) -> None:
                nonlocal count
                count += 1

        # A data loader draws its seed from the global generator: one of its own keeps the order of batches.
        strategy = make_strategy(method, plugins=[Count(), _OwnOrder()], eval_every=every, train_epochs=3)
        strategy.eval(class_benchmark.test_stream)  # logits are equally wide from the start: the same rounding
        train(strategy, class_benchmark, eval_streams=[class_benchmark.test_stream])
        counts.append(count)
        states.append(strategy.model.adapter_state())
    assert counts == [1, 1 + 3 * evaluations]
    assert not [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]


class _OwnOrder(SupervisedPlugin):
    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        strategy.dataloader = torch.utils.data.DataLoader(
            strategy.adapted_dataset, batch_size=8, shuffle=True, generator=generator
        )


def test_workers_load_the_same_images(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    states = []
    for workers in (0, 2):
        strategy = make_strategy("fm_lora", plugins=[], train_epochs=1)
        train(strategy, class_benchmark, n=1, num_workers=workers)
        states.append(strategy.model.adapter_state())
    assert not [k for k, v in states[0].items() if not torch.equal(v, states[1][k])]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_parameters(
    precision: str, make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    types: set[Any] = set()
    reference = train(make_strategy("fm_lora", train_epochs=1), class_benchmark, n=2)
    strategy = make_strategy("fm_lora", precision=precision, train_epochs=1)
    strategy.model.vit.blocks[1].attn.proj.register_forward_hook(lambda *args: types.add(args[-1].dtype))
    train(strategy, class_benchmark, n=2)
    assert types == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {v.dtype for v in strategy.model.adapter_state().values() if v.is_floating_point()} == {torch.float32}
    images = torch.cat([x[None] for x, *_ in class_benchmark.test_stream[0].dataset.eval()])
    with torch.no_grad():
        exact = reference.model.eval()(images)
        assert (strategy.model.eval()(images) - exact).abs().max() < 1.0
        assert not torch.equal(strategy.model(images), exact)


def test_compiled_features_are_the_same(
    make_strategy: Any, train: Any, class_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile with the backend that only captures the graph."""
    compile_, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f: calls.append(f) or compile_(f, backend="eager"))
    plain = train(make_strategy("fm_lora", train_epochs=1), class_benchmark, n=2)
    compiled = train(make_strategy("fm_lora", train_epochs=1, compile=True), class_benchmark, n=2)
    assert len(calls) == 1
    expected = plain.model.adapter_state()
    for name, value in compiled.model.adapter_state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_methods_that_grow_stay_compiled(
    make_strategy: Any, train: Any, class_benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles one function for a few shapes only: each experience has one of its own, others are left alone."""
    compile_, passes = torch.compile, []

    def counting(graph: Any, inputs: Any) -> Any:
        return lambda *tensors: passes.append(True) or graph(*tensors)

    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=counting))
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    counts, options = [0], {"train_epochs": 1, "compile": True}
    with config.patch(**{limit: 2}):
        train(make_strategy("inflora", **options), class_benchmark, after=lambda s: counts.append(len(passes)))
        train(make_strategy("fm_lora", **options), class_benchmark, n=1, after=lambda s: counts.append(len(passes)))
    assert all(b > a for a, b in pairwise(counts)), counts


def test_strategy_arguments_are_avalanches(make_vit: Callable[..., Any]) -> None:
    from avalanche_fmlora import FMLoRAStrategy

    evaluator = EvaluationPlugin(loggers=[TextLogger(io.StringIO())])
    strategy = FMLoRAStrategy(
        model=make_vit(),
        rank=4,
        criterion=torch.nn.CrossEntropyLoss(reduction="sum"),
        train_mb_size=3,
        train_epochs=7,
        eval_mb_size=5,
        device="cpu",
        plugins=[Note()],
        evaluator=evaluator,
        eval_every=2,
        peval_mode="iteration",
    )
    assert (strategy.train_mb_size, strategy.train_epochs, strategy.eval_mb_size) == (3, 7, 5)
    assert strategy.evaluator is evaluator
    assert any(isinstance(p, Note) for p in strategy.plugins)
    with pytest.raises(TypeError):
        FMLoRAStrategy(make_vit())
