"""Every option of every method changes something, and every wrong option is named with the right one."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from avalanche.core import SupervisedPlugin
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from torch import nn

from avalanche_fmlora.strategies.config import MethodConfig, structural_options
from avalanche_fmlora.strategies.fm_lora import FM_LORA_CLASSIFIER, FMLoRAConfig
from avalanche_fmlora.strategies.registry import method, methods

METHODS = methods()
EVERYTHING = object()

ANOTHER: dict[str, Any] = {
    "optimizer": "sgd",
    "rank": 3,
    "pool_size": 40,
    "n_tasks": 4,
    "fit_share": 0.5,
    "targets": ("k",),
    "blocks": (1,),
    "g_blocks": (1,),
    "e_blocks": (0,),
    "candidates": (1, 3),
    "search_share": 0.9,
    "max_samples": 6,
    "epsilon": 0.3,
    "clip_grad_norm": 1e-3,
    "core_step": 0.25,
    "seed": 1,
    "rank_selection": None,
}
"""A second value where none can be derived from the type."""

GIVEN: dict[str, dict[str, Any]] = {
    "lr_bases": {"bases": "first_experience"},
    "logit_scale": {"classifier": "cosine"},
    "row_transport": {"classifier": "class_mean", "transport_ridge": 0.01},
    "transport_ridge": {"classifier": "class_mean", "row_transport": True},
    "transport_samples": {"classifier": "class_mean", "row_transport": True, "transport_ridge": 0.01},
    "whitening": {"classifier": "class_mean"},
    "whitening_covariance": {"classifier": "class_mean", "whitening": 0.1},
    "momentum": {"optimizer": "sgd"},
    "slow_share": {"bases": "slow"},
    "tau_start": {"lr_rank": 1.0, "seed": 2},
    "tau_end": {"lr_rank": 1.0, "seed": 2},
    "n_tasks": {"threshold": 0.5},
    "restrict_to_seen": {"n_tasks": 5},
    "g_blocks": {"e_blocks": ()},
    "e_blocks": {"g_blocks": ()},
}
"""Options that only matter beside others."""

_HEAD_ONLY = dict.fromkeys(("row_transport", "transport_ridge", "transport_samples"), "features never drift")
_ONE_EXPERIENCE = {
    "row_transport": "there is no past",
    "transport_ridge": "there is no past",
    "transport_samples": "there is no past",
    "whitening_covariance": "there is no past",
    "loss_classes": "all classes are current",
}
INERT: dict[str, dict[str, str]] = {
    "ncm": dict.fromkeys(
        ("lr_head", "weight_decay", "momentum", "optimizer", "lr_schedule", "clip_grad_norm", "loss_classes", "seed"),
        "nothing trains",
    )
    | _HEAD_ONLY,
    "linear_probe": dict(_HEAD_ONLY),
    "joint": dict(_ONE_EXPERIENCE),
}
"""Options of the frame that can't matter to a method; they are tested to change nothing at all."""
NO_EFFECT_ON_RESULTS = {"cache_queries", "teacher"}
"""They spare passes where inputs repeat; see `test_options_of_speed_change_no_result` and `test_class_means.py`."""
ONLY_WHERE_CLASSES_RECUR = {"recurring_rows"}


def _fields(config: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    found: list[tuple[str, FieldInfo]] = []
    for name, field in config.model_fields.items():
        inner = [a for a in (field.annotation, *get_args(field.annotation)) if _is_model(a)]
        if inner:
            found += _fields(inner[0], f"{prefix}{name}.")
        if not inner or type(None) in get_args(field.annotation):
            found.append((f"{prefix}{name}", field))
    return found


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _another(name: str, field: FieldInfo) -> Any:
    """A valid value that is not the default; EVERYTHING if the type has only one."""
    default, leaf = field.default, name.rpartition(".")[2]
    if leaf in ANOTHER:
        return ANOTHER[leaf]
    union = get_origin(field.annotation) in (Union, types.UnionType)
    for kind in get_args(field.annotation) if union else (field.annotation,):
        if get_origin(kind) is Literal:
            others = [v for v in get_args(kind) if v != default]
            return others[0] if others else EVERYTHING
        if kind is bool:
            return not default
        if kind is int:
            step = next((m.multiple_of for m in field.metadata if hasattr(m, "multiple_of")), 1)
            return (default or 4) + step
        if kind is float:
            return default / 2 if default else 0.5
    raise AssertionError(f"{name}: {field.annotation} needs an entry in ANOTHER")


CASES = [
    pytest.param(m, name, field, id=f"{m}-{name}")
    for m, cls in METHODS.items()
    for name, field in _fields(cls.config_class)
    if name not in NO_EFFECT_ON_RESULTS | ONLY_WHERE_CLASSES_RECUR and _another(name, field) is not EVERYTHING
]


class Smoothing(nn.Module):
    """A user's own loss, which says that it smooths labels."""

    label_smoothing = 0.1


class _Losses(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.losses.append(strategy.loss.item())


_TRACES: dict[str, Any] = {}


@pytest.fixture
def trace(make_strategy: Any, train: Any, make_class_benchmark: Any, images: Any, monkeypatch: Any) -> Any:
    """All that a short training gives: losses, state, logits, chosen ranks, and whether it was compiled."""

    def run(name: str, options: dict[str, Any]) -> Any:
        key = f"{name} {sorted(options.items(), key=str)}"
        if key not in _TRACES:
            compiled: list[Any] = []
            monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
            if "benchmark" not in _TRACES:
                _TRACES["benchmark"] = make_class_benchmark(4, 2, 8)
            plugin, options = _Losses(), dict(options)
            strategy = make_strategy(name, plugins=[plugin], train_mb_size=4, train_epochs=2, **options)
            train(strategy, _TRACES["benchmark"])
            with torch.no_grad():
                logits = strategy.model.eval()(images)
                features = strategy.features(images)
            history = [getattr(p, "history", None) for p in strategy.plugins if "Rank" in type(p).__name__]
            state = strategy.model.adapter_state()
            _TRACES[key] = ([*plugin.losses, history, len(compiled)], {**state, "logits": logits, "features": features})
        return _TRACES[key]

    return run


def _same(first: Any, second: Any) -> bool:
    (facts, tensors), (other_facts, other_tensors) = first, second
    if facts != other_facts or tensors.keys() != other_tensors.keys():
        return False
    return all(torch.equal(v, other_tensors[k]) for k, v in tensors.items())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_fm_loras_classifier(name: str, make_strategy: Any) -> None:
    """Named in full: what FM-LoRA sets other than the frame, rates and the method's own parts aside."""
    config, frame = FMLoRAConfig(), MethodConfig()
    other = {k for k in MethodConfig.model_fields if getattr(config, k) != getattr(frame, k)}
    assert other == {*FM_LORA_CLASSIFIER}
    given = make_strategy(name, **FM_LORA_CLASSIFIER)
    assert {k: getattr(given.config, k) for k in FM_LORA_CLASSIFIER} == {k: getattr(config, k) for k in other}
    assert given.model.head.dim == make_strategy("fm_lora").model.head.dim


@pytest.mark.parametrize(("name", "path", "field"), CASES)
def test_every_option_changes_something(name: str, path: str, field: FieldInfo, trace: Any) -> None:
    config_class = METHODS[name].config_class
    leaf = path.rpartition(".")[2]
    given = {k: v for k, v in GIVEN.get(leaf, {}).items() if k in config_class.model_fields or k == "optimizer"}
    if config_class.model_fields["classifier"].default != "linear":
        given.pop("classifier", None)
    if path == "seed" and config_class.model_fields["classifier"].default == "linear":
        given["classifier"] = "cosine"
    value = _another(path, field)
    nested = {leaf: value}
    for part in reversed(path.split(".")[:-1]):
        nested = {part: nested}
    same = _same(trace(name, given), trace(name, {**given, **nested}))
    reason = INERT.get(name, {}).get(path)
    assert same == (reason is not None), f"{path}={value!r} beside {given}: {reason or 'changes nothing'}"


_SAVED: dict[str, Any] = {}


@pytest.mark.parametrize(("name", "path", "field"), [c for c in CASES if "." not in c.values[1]])
def test_options_that_say_what_saved_tensors_mean_are_marked(
    name: str, path: str, field: FieldInfo, make_strategy: Any, train: Any, make_class_benchmark: Any, images: Any,
    tmp_path_factory: Any,
) -> None:  # fmt: skip
    """A strategy with another value either refuses the file or computes with it what was saved."""
    given = {k: v for k, v in GIVEN.get(path, {}).items() if k in METHODS[name].config_class.model_fields}
    given = {k: v for k, v in given.items() if METHODS[name].config_class.model_fields[k].annotation != _NO_CHOICE}
    key = f"{name} {given}"
    if key not in _SAVED:
        saved = train(make_strategy(name, train_epochs=1, **given), make_class_benchmark(4, 2, 4))
        _SAVED[key] = (saved.save(tmp_path_factory.mktemp("saved") / "adapter"), _logits(saved, images))
    file, logits = _SAVED[key]
    other = make_strategy(name, **{**given, path: _another(path, field)})
    if path in structural_options(METHODS[name].config_class):
        with pytest.raises(ValueError, match=rf"was saved with .*'{path}'"):
            other.load(file)
    else:
        other.load(file)
        assert torch.equal(_logits(other, images), logits)


_NO_CHOICE = Literal["class_mean"]


@torch.no_grad()
def _logits(strategy: Any, images: Any) -> Any:
    return strategy.model.eval()(images)


@pytest.mark.parametrize("name", [m for m, c in METHODS.items() if "cache_queries" in c.config_class.model_fields])
def test_options_of_speed_change_no_result(name: str, trace: Any) -> None:
    assert _same(trace(name, {}), trace(name, {"cache_queries": False}))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"joint"}))
def test_every_way_to_predict_classes_that_recur_is_another(
    name: str, make_strategy: Any, train: Any, domain_benchmark: Any, images: Any
) -> None:
    logits = []
    for kind in ("trained", "mean", "per_experience"):
        options = {"classifier": "class_mean", "recurring_rows": kind, "train_epochs": 2}
        strategy = train(make_strategy(name, **options), domain_benchmark, n=2)
        logits.append(strategy.model.eval()(images))
    assert torch.equal(logits[0], logits[1]) == (name == "ncm"), "rows that never train are means as they are"
    assert not torch.equal(logits[1], logits[2])


@pytest.mark.parametrize("bases", get_args(FMLoRAConfig.model_fields["bases"].annotation))
def test_all_kinds_of_bases_train(bases: str, trace: Any) -> None:
    others = [b for b in get_args(FMLoRAConfig.model_fields["bases"].annotation) if b != bases]
    assert not any(_same(trace("fm_lora", {"bases": bases}), trace("fm_lora", {"bases": b})) for b in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_mb_sise": 8}, r"has no argument `train_mb_sise`: did you mean `train_mb_size`\?"),
        ({"rnak": 8}, r"fm_lora has no option `rnak`: did you mean `rank`\?"),
        (
            {"rank_selection": {"sigm": 1.0}},
            r"no option `rank_selection\.sigm`: did you mean `sigma`\?|`sigm`.*`sigma`",
        ),
        ({"rank_selection": False}, r"`rank_selection` = False: .*any of candidates.*null \(None\) to switch it off"),
        ({"meta_prompt": False}, r"`meta_prompt` = False: expected a dictionary with any of rate_share, [a-z_, ]*\.$"),
        ({"train_mb_size": 0}, r"`train_mb_size` to be a whole number from 1 but got 0"),
        ({"eval_mb_size": 0}, r"`eval_mb_size` to be a whole number from 1 but got 0"),
        ({"train_passes": 1}, r"no argument `train_passes`: did you mean `train_epochs`\?"),
        ({"train_epochs": -1}, r"`train_epochs` to be a whole number from 0 but got -1"),
        ({"rank": 0}, r"fm_lora: `rank` = 0: Input should be greater than or equal to 1"),
        ({"rank": 17}, r"`rank` between 1 and 16"),
        ({"targets": ("w",)}, r"`targets"),
        ({"blocks": (5,)}, r"`blocks` to be different indices in 0\.\.1 but got \(5,\)"),
        ({"bases": "slw"}, r"`bases` = 'slw': Input should be 'first_experience'"),
        ({"core_step": 1.5}, r"`core_step"),
        ({"core_step": 0.0}, r"`core_step"),
        ({"core_step": "2/t"}, r"`core_step"),
        ({"precision": "fp64"}, r"`precision` = 'fp64'"),
        ({"prompt_length": -1}, r"`prompt_length` = -1"),
        ({"criterion": Smoothing()}, r"without label smoothing.*use torch\.nn\.CrossEntropyLoss\(label_smoothing=…\)"),
        ({"config": METHODS["ncm"].config_class()}, r"`config` to be a FMLoRAConfig but got NCMConfig"),
        ({"model": nn.Linear(2, 2)}, r"timm VisionTransformer or Eva but got"),
        ({"rank_selection": {"candidates": (4, 64)}}, r"`candidates` to be increasing ranks between 1 and 4"),
    ],
    ids=str,
)
def test_wrong_options_are_named_before_the_model_is_touched(
    options: dict[str, Any], message: str, make_vit: Any
) -> None:
    vit = make_vit()
    with pytest.raises(ValueError, match=message):
        method("fm_lora")(**{"model": vit, "rank": 4, "evaluator": None, **options})
    assert method("fm_lora")(model=vit, rank=4, evaluator=None).config.rank == 4


def test_a_configuration_object_and_keywords_are_the_same(make_strategy: Any) -> None:
    config = FMLoRAConfig(rank=3, distillation=0.5)
    assert make_strategy("fm_lora", config=config).config == config
    assert make_strategy("fm_lora", config=config, rank=2).config == config.model_copy(update={"rank": 2})
    assert make_strategy("fm_lora", rank=3, distillation=0.5).config == config


def test_evaluation_batches_are_those_of_training_if_none_are_given(make_strategy: Any) -> None:
    assert make_strategy("fm_lora", train_mb_size=7, eval_mb_size=None).eval_mb_size == 7


def test_unknown_method_gives_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no method 'fm_lara': did you mean 'fm_lora'\?"):
        method("fm_lara")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_signature_and_help_name_every_option(name: str) -> None:
    import inspect

    cls = METHODS[name]
    names = set(inspect.signature(cls).parameters)
    assert names >= {"model", "optimizer", "train_mb_size", "plugins", *cls.config_class.model_fields}
    assert all(field.description for _, field in _fields(cls.config_class))
    assert cls.__doc__
    assert cls.summary


def test_ranks_to_choose_from_are_checked_before_a_model_is_there() -> None:
    with pytest.raises(ValueError, match=r"`candidates` to be increasing ranks between 1 and 32 but got \(64,\)"):
        FMLoRAConfig.model_validate({"rank_selection": {"candidates": [64]}})
