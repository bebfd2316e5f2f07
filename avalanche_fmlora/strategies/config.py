"""Configuration that all methods share, and how keyword options become a validated configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from avalanche_fmlora.modules.vit import Pooling
from avalanche_fmlora.strict import StrictModel, types_in

Precision = Literal["fp32", "bf16", "fp16"]
Classifier = Literal["linear", "cosine", "imprinted", "class_mean"]
RecurringRows = Literal["trained", "mean", "per_experience"]
Schedule = Literal["cosine", "constant", "coda"]


ValueT = TypeVar("ValueT")


class _OfTheModel:
    """Mark of options that say what the saved tensors mean."""


Structural = Annotated[ValueT, _OfTheModel()]
"""Type of an option without which saved tensors can't be read, as ``rank: Structural[int]``; all other options only
matter to training, so that a strategy with other values may load the file."""


class MethodConfig(StrictModel):
    """Options of every method: classifier, optimiser and precision."""

    classifier: Structural[Classifier] = "linear"
    """`linear`; `cosine` (trained); `imprinted` (cosine rows that start as class means and train on); `class_mean` (the
    same, then written again as class means)."""
    pooling: Structural[Pooling] = "model"
    """What the classifier reads: the features that the model's own head would get, class token and mean of the patch
    tokens side by side (`token_and_mean`; twice as wide), or both of each of the last four blocks (`multi_layer`; eight
    times as wide); of models that have and pool neither: `model`."""
    logit_scale: Structural[float] = Field(16.0, gt=0)
    """Scale s of the logits s·cos(f, w) of a classifier that is not `linear`."""
    row_transport: bool = False
    """Move the `class_mean` rows of past classes, and kept means of those that recur, along with the drift of the
    current experience's features."""
    transport_ridge: float = Field(10.0, gt=0)
    """Strength, in samples, of the anchor that holds the transport at the identity."""
    transport_samples: int = Field(0, ge=0)
    """Images of the experience, at most as many as it has, that are moved toward past rows before it trains, so that
    the drift there is measured too, and let go when it ends. Each costs three passes with gradients."""
    whitening: float | None = Field(None, gt=0)
    """Shrinkage λ with which `class_mean` rows are whitened for prediction, by the covariance within classes; null for
    plain cosines."""
    whitening_covariance: Literal["current", "secant", "running"] = "current"
    """Covariance that whitens: of the current experience's features; also of the past, as far as class means and their
    whitened rows remember it, which keeps nothing but these rows; or the mean over all experiences so far, for which
    D x D numbers are kept (a stored statistic, which the record declares)."""
    recurring_rows: RecurringRows = "trained"
    """What predicts a class that occurs in more than one experience, with `class_mean`: its row as trained (with
    which `whitening` ends for all rows); the mean over all its samples, those of the past standing in by their mean (at
    unit length where rows train); or one mean for each experience, the nearest of which counts (rows grow with
    experiences)."""
    loss_classes: Literal["current", "seen"] = "current"
    """Classes in the training loss: the experience's own (and those of replayed samples), or all seen so far."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimiser, fresh in each experience, if the strategy is not given one."""
    lr_head: float = Field(5e-3, ge=0)
    """Learning rate of the classifier's rows."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of everything that trains."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of `sgd`."""
    lr_schedule: Schedule = "cosine"
    """Course of all rates within an experience: half-cosine to zero, constant, or CODA-Prompt's by epoch.
    Without effect on an optimizer or scheduler that is passed in."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient of all that trains; none if null."""
    precision: Precision = "fp32"
    """Forward passes in this format (bf16, fp16: autocast; parameters stay in float32)."""
    compile: bool = False
    """Compile the features' forward pass with torch.compile."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the method's own random starts (bases, rows, Gumbel noise)."""

    def planned_for(self, n_experiences: int) -> MethodConfig:
        """These options for a stream of so many experiences: `n_tasks`, where there is one that was not given."""
        if "n_tasks" not in type(self).model_fields or "n_tasks" in self.model_fields_set:
            return self
        return self.model_copy(update={"n_tasks": n_experiences})


def structural_options(config: type[BaseModel]) -> set[str]:
    """Names of the options that are :data:`Structural` in a configuration class or in one that it extends.

    >>> sorted(structural_options(MethodConfig))
    ['classifier', 'logit_scale', 'pooling']
    """
    classes = [c for c in config.__mro__ if issubclass(c, BaseModel)]
    fields = [(name, field) for c in classes for name, field in c.model_fields.items()]
    return {name for name, field in fields if any(isinstance(m, _OfTheModel) for m in field.metadata)}


_CLASS_MEAN = "classifier='class_mean'"
_NEEDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "logit_scale": ("another classifier than 'linear'", lambda c: c.classifier != "linear"),
    "row_transport": (_CLASS_MEAN, lambda c: c.classifier == "class_mean"),
    "whitening": (_CLASS_MEAN, lambda c: c.classifier == "class_mean"),
    "recurring_rows": (_CLASS_MEAN, lambda c: c.classifier == "class_mean"),
    "whitening_covariance": (f"{_CLASS_MEAN} and whitening", lambda c: c.classifier == "class_mean" and c.whitening),
    "transport_ridge": (f"{_CLASS_MEAN} and row_transport", lambda c: c.classifier == "class_mean" and c.row_transport),
    "momentum": ("optimizer='sgd'", lambda c: c.optimizer == "sgd"),
    "meta_prompt": ("a prompt: prompt_length above 0", lambda c: bool(c.prompt_length)),
}


def idle_options(config: MethodConfig, given: Iterable[str]) -> list[str]:
    """What to say of options that were given and have no effect beside the others, unless they are off or the default.

    >>> idle_options(MethodConfig(whitening=0.3), ["whitening"])
    ["whitening=0.3 has no effect here: it needs classifier='class_mean'."]
    """
    fields = type(config).model_fields
    values = {name: getattr(config, name) for name in _NEEDS if name in given and name in fields}
    on = {name: value for name, value in values.items() if value not in (None, False, fields[name].default)}
    return [
        f"{name}={value!r} has no effect here: it needs {_NEEDS[name][0]}."
        for name, value in on.items()
        if not _NEEDS[name][1](config)
    ]


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def validate(model: type[ConfigT], options: dict[str, Any], where: str) -> ConfigT:
    """Options -> configuration.

    Args:
        model: the configuration class.
        options: field -> value.
        where: what the options belong to, for the message, as ``"fm_lora"``.

    Raises:
        ValueError: that names each wrong field, what came, and for an unknown one the nearest that exists.
    """
    try:
        return model.model_validate(options)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(model, where, e) for e in error.errors())) from None


def _explain(model: type[BaseModel], where: str, error: Any) -> str:
    path = [str(p) for p in error["loc"]]
    if error["type"] != "extra_forbidden":
        said = error["msg"].removeprefix("Value error, ").rstrip(".")
        if error["type"] == "model_type" and len(path) == 1:
            field = model.model_fields[path[0]]
            off = ", or null (None) to switch it off" if type(None) in types_in(field.annotation) else ""
            said = f"expected a dictionary with any of {', '.join(_fields_at(model, [*path, '']))}{off}"
        named = f"`{'.'.join(path)}` =" if path else "got"
        return f"{where}: {named} {error['input']!r}: {said}."
    fields = list(_fields_at(model, path[:-1]))
    near = difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.6)
    hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(fields)}."
    return f"{where} has no option `{'.'.join(path)}`: {hint}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = (
            [a for a in types_in(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)] if field else []
        )
        if inner:
            model = inner[0]
    return list(model.model_fields)
