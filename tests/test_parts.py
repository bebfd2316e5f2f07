"""Parts of FM-LoRA left out, replaced by plugins of one's own, or put in the wrong place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin

from avalanche_fmlora import MetaPromptPlugin, RankSelectionPlugin


@pytest.mark.parametrize(
    ("bases", "first"), [("pretrained_svd", 2 * 2 * 2 * 16), ("first_experience", 2 * 2 * (4 * 32))]
)
def test_parts_can_be_left_out(bases: str, first: int, make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    strategy = train(make_strategy("fm_lora", rank_selection=None, prompt_length=0, bases=bases), class_benchmark)
    assert not [p for p in strategy.plugins if isinstance(p, RankSelectionPlugin | MetaPromptPlugin)]
    assert strategy.model.prompt is None
    assert strategy.model.selector is None
    assert [r["trainable_parameters"] for r in strategy.resources] == [first, 2 * 2 * 2 * 16, 2 * 2 * 2 * 16]


def test_parts_can_be_replaced(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    ranks = RankSelectionPlugin(candidates=(1, 2), kl_weight=0.0, seed=3)
    prompts = MetaPromptPlugin(rate_share=0.0, epsilon=1.0)
    snapshots: list[Any] = []
    strategy = make_strategy("fm_lora", rank_selection=ranks, meta_prompt=prompts, bases="first_experience")
    train(strategy, class_benchmark, after=lambda s: snapshots.append(s.model.prompt.prompt.detach().clone()))
    assert [p for p in strategy.plugins if isinstance(p, RankSelectionPlugin | MetaPromptPlugin)] == [ranks, prompts]
    assert ranks.history[0]["rank"] == 4, "no update to bound where bases train"
    assert {h["rank"] for h in ranks.history[1:]} <= {1, 2}
    assert torch.equal(snapshots[0], snapshots[2]), "a rate of zero after the first experience"
    assert prompts.drift[0] > 0
    assert prompts.drift[1:] == [0.0, 0.0]


def test_plugins_in_the_wrong_place_say_so(make_strategy: Any, class_benchmark: Any) -> None:
    with pytest.raises(ValueError, match=r"RankSelectionPlugin expects .* low-rank updates"):
        make_strategy("linear_probe", plugins=[RankSelectionPlugin()]).train(class_benchmark.train_stream[0])
    with pytest.raises(ValueError, match=r"MetaPromptPlugin expects .* shared prompt"):
        make_strategy("seq_lora", plugins=[MetaPromptPlugin()]).train(class_benchmark.train_stream[0])


def test_the_chosen_rank_is_the_rank_of_the_update(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    cores: list[Any] = []
    strategy = make_strategy("fm_lora", lr_core=0.05)
    train(strategy, class_benchmark, after=lambda s: cores.append(s.model.lora.layers[0].core.double().clone()))
    history = next(p for p in strategy.plugins if isinstance(p, RankSelectionPlugin)).history
    assert [h["experience"] for h in history] == [0, 1, 2]
    for t in (1, 2):
        rank = torch.linalg.matrix_rank(cores[t] - cores[t - 1], rtol=1e-4)
        assert (rank <= history[t]["rank"]).all()
        columns = [4 - r for r in history[t]["ranks_per_layer"] for _ in ("M of q", "M of v", "N of q", "N of v")]
        assert history[t]["masked_parameters"] == 4 * sum(columns)
        assert 0 <= history[t]["complexity"] <= 1
        assert 0 <= history[t]["similarity"] <= 1
        relative = min(1.0, history[t]["complexity"] / history[0]["complexity"])
        assert history[t]["target"] == pytest.approx(1 + 3 * relative * (1 - history[t]["similarity"]), rel=1e-5)


def test_the_prompt_moves_slowly_after_the_first_experience(
    make_strategy: Any, train: Any, class_benchmark: Any
) -> None:
    """P_t = P_{t−1} + (P̂ − P_{t−1})/t, and it rests while the head fits."""
    values: list[list[Any]] = []

    class Values(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            values.append([])

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            values[-1].append(strategy.model.prompt.prompt.detach().clone())

    train(make_strategy("fm_lora", plugins=[Values()], train_epochs=4), class_benchmark)
    for t in (1, 2):
        anchor, reached = values[t - 1][-1], values[t][2]
        torch.testing.assert_close(values[t][3], anchor + (reached - anchor) / (t + 1))
        assert not torch.equal(reached, anchor)


def test_a_rank_selector_that_comes_too_late_or_to_other_updates_is_refused(
    make_strategy: Any, class_benchmark: Any
) -> None:
    first = class_benchmark.train_stream[0]
    late = make_strategy("fm_lora", rank_selection=None, plugins=[RankSelectionPlugin()])
    with pytest.raises(ValueError, match=r"give it as FMLoRAStrategy\(rank_selection=RankSelectionPlugin"):
        late.train(first)
    for name in ("sd_lora", "inflora"):
        with pytest.raises(ValueError, match="updates in shared bases"):
            make_strategy(name, plugins=[RankSelectionPlugin()]).train(first)


def test_passes_with_gradients_are_no_larger_than_steps(make_strategy: Any, train: Any, class_benchmark: Any) -> None:
    """Whoever lowers `train_mb_size` until a step fits into memory has every pass with gradients fit, too."""
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    options = {"train_mb_size": 4, "eval_mb_size": 12, "train_epochs": 1, "transport_samples": 10}
    strategy = make_strategy("fm_lora", transport_ridge=0.5, **options)
    vit = strategy.model.vit

    def note(module: Any, inputs: Any) -> None:
        sizes[torch.is_grad_enabled()].add(len(inputs[0]))

    vit.patch_embed.register_forward_pre_hook(note)
    train(strategy, class_benchmark, n=2)
    assert max(sizes[True]) == 4
    assert max(sizes[False]) == 12
