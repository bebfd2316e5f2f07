"""The frame of every method: an Avalanche `SupervisedTemplate` around a frozen ViT and what is added to it."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates.base import BaseTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from avalanche.training.utils import trigger_plugins
from torch import Tensor, nn

from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.vit import TimmViT, check_vit, feature_dim
from avalanche_fmlora.plugins._passes import training_features
from avalanche_fmlora.plugins.class_means import ClassMeanPlugin
from avalanche_fmlora.plugins.imprinting import ImprintingPlugin
from avalanche_fmlora.plugins.lifecycle import ExperiencePlugin, SchedulePlugin
from avalanche_fmlora.strategies.compiled import CompiledFeatures
from avalanche_fmlora.strategies.config import MethodConfig, idle_options, validate
from avalanche_fmlora.strategies.loading import DataLoading
from avalanche_fmlora.strategies.loss import Loss, smooths
from avalanche_fmlora.strategies.optimization import Optimization
from avalanche_fmlora.strategies.optimizers import OptimizerLike, make_optimizer
from avalanche_fmlora.strategies.task_labels import TaskLabels
from avalanche_fmlora.strategies.trained import Trained
from avalanche_fmlora.strategies.training_set import Begun, TrainingSet, classes_of
from avalanche_fmlora.strategies.training_state import load_training_state, training_identity, training_state

_LOG = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ContinualStrategy(Trained, TrainingSet, Loss, Optimization, DataLoading):
    """Base of all strategies here. A method gives `method`, `config_class`, `build_network` and, if need be, plugins.

    Args:
        model: a timm ViT (`VisionTransformer`, or `Eva`, as DINOv3 is), with or without a head. It is frozen and
            adapted in place; its own weights are never written to.
        config: the method's configuration; its fields can be given as keywords of their own instead.
        optimizer: None for the configured one; a name; a function from parameter groups (with `name` and `lr`) to an
            optimizer; or an optimizer, which keeps its object and groups while the tensors in it follow what trains.
        criterion: of (logits [B, C], labels [B]); logits of classes left out of the loss are −∞ there. The label
            smoothing of torch's cross-entropy is over the classes that take part.
        train_mb_size, train_epochs, eval_mb_size, device, plugins, evaluator, eval_every, peval_mode: as in Avalanche.
            Passes with gradients beside the steps have batches of the smaller of both sizes. Evaluations within an
            experience (`eval_every`) predict by the rows in training: whitened ones are there when it is over.
        options: fields of the configuration class, as ``rank=16``.

    Raises:
        ValueError: for a model that can't be adapted, an unknown or invalid option, or batches and epochs of no size.
    """

    method: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = "–"
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    plugin_options: ClassVar[tuple[str, ...]] = ()
    joint: ClassVar[bool] = False
    model: ContinualNetwork

    def __init__(
        self,
        *,
        model: TimmViT,
        config: MethodConfig | None = None,
        optimizer: OptimizerLike = None,
        criterion: Any = None,
        train_mb_size: int = 32,
        train_epochs: int = 5,
        eval_mb_size: int | None = 128,
        device: str | torch.device = "cpu",
        plugins: Sequence[BasePlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        peval_mode: str = "epoch",
        **options: Any,
    ) -> None:
        self._given_plugins = {k: options.pop(k) for k in self.plugin_options if isinstance(options.get(k), BasePlugin)}
        self.config = self._resolve(config, options)
        named = {"optimizer": optimizer} if isinstance(optimizer, str) else {}
        given = {*options, *(() if config is None else config.model_fields_set)}
        for line in idle_options(self.config.model_copy(update=named), given):
            _LOG.warning("%s", line)
        criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        if getattr(criterion, "label_smoothing", 0.0) and not smooths(criterion):
            raise ValueError(
                "Expected a criterion without label smoothing, since the loss leaves out classes (logits of −∞): use "
                "torch.nn.CrossEntropyLoss(label_smoothing=…), which smooths over the others, or label_smoothing=0."
            )
        eval_mb_size = train_mb_size if eval_mb_size is None else eval_mb_size
        counts = {"train_mb_size": train_mb_size, "eval_mb_size": eval_mb_size, "train_epochs": train_epochs}
        for name, count in counts.items():
            least = int(name != "train_epochs")
            if not isinstance(count, Integral) or count < least:
                raise ValueError(f"Expected `{name}` to be a whole number from {least} but got {count!r}.")
        vit = check_vit(model).to(device)
        # It may refuse: before the model is changed.
        chosen = make_optimizer(optimizer, self.config, self.rates(), options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            network = self.build_network(vit).to(device)
        network.pooling = self.config.pooling
        network.built()
        self._passes_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        super().__init__(
            model=network,
            optimizer=chosen,
            criterion=criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=[*self.build_plugins(), *(plugins or [])],
            evaluator=evaluator,
            eval_every=eval_every,
            peval_mode=peval_mode,
        )
        self.plugins.sort(key=lambda plugin: getattr(plugin, "runs_last", False))
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")
        self._compiled = CompiledFeatures()
        self._features_of()
        self._training_classes = []
        self._at_start: tuple[Tensor, Tensor] | None = None
        self._unscaled, self._step_factors, self._given_tensors = [], [], []
        self._task_labels = TaskLabels()
        self.resources: list[dict[str, int]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the configuration's fields in the signature, for help() and completion."""
        # Not through BaseTemplate's own hook: it refuses every keyword that stands in no signature, so all our options.
        super(BaseTemplate, cls).__init_subclass__(**kwargs)
        base = [p for p in inspect.signature(ContinualStrategy.__init__).parameters.values() if p.kind != p.VAR_KEYWORD]
        fields = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.annotation)
            for name, f in cls.config_class.model_fields.items()
            if name != "optimizer"
        ]
        cls.__signature__ = inspect.Signature([*base[1:], *fields])

    # What a method gives

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """The network of the method around the user's model."""
        return ContinualNetwork(vit, self.build_head(vit))

    def rates(self) -> dict[str, float]:
        """Learning rate of each parameter group, by name."""
        return {"head": self.config.lr_head}

    def build_plugins(self) -> list[BasePlugin]:
        """The method's plugins, in order; they run before the user's."""
        return [ExperiencePlugin(), *self._frame_plugins()]

    def core_step(self) -> float:
        """Share of the update that is absorbed at the end of the current experience."""
        return 1.0

    # Shared parts

    def build_head(self, vit: TimmViT) -> IncrementalHead:
        """The configured classifier."""
        config = self.config
        cosine = config.classifier != "linear"
        dim = feature_dim(vit, config.pooling)
        return IncrementalHead(dim, cosine=cosine, scale=config.logit_scale, seed=config.seed)

    def _frame_plugins(self) -> list[BasePlugin]:
        plugins: list[BasePlugin] = []
        c = self.config
        if c.transport_samples and not (c.classifier == "class_mean" and c.row_transport):
            _LOG.warning(
                "transport_samples=%d has no effect here: images are moved to follow old rows, so it needs "
                "classifier='class_mean' and row_transport=True.",
                c.transport_samples,
            )
        if c.classifier == "class_mean":
            plugins.append(self._class_mean_plugin(transport=c.row_transport))
        elif c.classifier == "imprinted":
            plugins.append(ImprintingPlugin())
        if c.lr_schedule != "constant":
            plugins.append(SchedulePlugin(c.lr_schedule))
        return plugins

    def _class_mean_plugin(self, *, train_rows: bool = True, transport: bool = False) -> ClassMeanPlugin:
        c = self.config
        return ClassMeanPlugin(
            train_rows=train_rows,
            transport=transport,
            ridge=c.transport_ridge,
            samples=c.transport_samples,
            whitening=c.whitening,
            covariance=c.whitening_covariance,
            recurring=c.recurring_rows,
        )

    @classmethod
    def _resolve(cls, config: MethodConfig | None, options: dict[str, Any]) -> Any:
        if config is not None and not isinstance(config, cls.config_class):
            raise ValueError(f"Expected `config` to be a {cls.config_class.__name__} but got {type(config).__name__}.")
        for name in options:
            online = ["train_epochs"] if name == "train_passes" else []  # as Avalanche's online strategies call it
            near = online or difflib.get_close_matches(name, _TEMPLATE_ARGUMENTS, n=1, cutoff=0.8)
            if name not in cls.config_class.model_fields and near:
                raise ValueError(f"{cls.__name__} has no argument `{name}`: did you mean `{near[0]}`?")
        given = {} if config is None else config.model_dump()
        return validate(cls.config_class, {**given, **options}, cls.method)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] under the model as it is, in the configured precision."""
        with self._autocast():
            return self.model.features(images)

    def features_before(self, images: Tensor) -> Tensor:
        """Features [B, D] of the model before the current experience, float32, without autograd."""
        with self._autocast():
            return self.model.features_before(images).float()

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    # Avalanche's template

    def model_adaptation(self, model: ContinualNetwork | None = None) -> ContinualNetwork:
        """Training on a new experience opens it in the strategy's own model; else this only makes room for classes."""
        network = self.model if model is None else model
        opened = self._begun is not None and self._begun.experience is self.experience
        if self.is_training and network is self.model and not opened:
            self._begun = Begun.of(self.experience)
            for experience in self.training_experiences():
                self._task_labels.check(experience, classes_of(experience))
            network.begin(self.training_classes())
        else:
            network.head.grow(classes_of(self.experience))
        return network.to(self.device)

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Adapt the model, then point the optimizer at what trains now.

        Each part of an online stream is an experience of its own, whether its boundaries are known or not. Just before,
        with data, experience and model as they will be, plugins have their `on_begin`.
        """
        assert self.experience is not None
        if len(self.model.head.active) and not (self._begun is not None and self._begun.is_same(self.experience)):
            _LOG.warning("The experience before this one was broken off: what it has trained is dropped.")
        self.model.discard()  # nothing is open unless one was broken off, this one or another
        self._begun = None
        self._take_training_set()
        trigger_plugins(self, "on_begin", **kwargs)
        self.model = self.model_adaptation()
        self.make_optimizer()
        if not self.model.begin_keeps_features:
            self._at_start = None

    def forward(self) -> Tensor:
        """Logits of the mini-batch, float32."""
        with self._autocast():
            features = self._features_of()(self.mb_x)
        self.model.last_features = self.mb_features = features = features.to(self.model.head.rows.dtype)
        self._mb_extra = self.model.extra_loss() if self.is_training else None
        return self.model.head(features)

    def _features_of(self) -> Callable[[Tensor], Tensor]:
        """The model's `features`, compiled once a model if asked."""
        return self._compiled.of(self.model) if self.config.compile else self.model.features

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled function, which can't be pickled and, copied, would go on with this model; and without
        what hangs on the graph of a mini-batch.
        """
        return {**self.__dict__, "_compiled": CompiledFeatures(), "mb_features": None, "_mb_extra": None}

    def features_at_start(self) -> tuple[Tensor, Tensor]:
        """Features [M, D] and labels [M] of the experience that begins, before it trains.

        One pass for all who ask, and a second one where the begin of an experience itself changes features.
        """
        if self._at_start is None:
            self._at_start = training_features(self)
        return self._at_start

    def _before_training_exp(self, **kwargs: Any) -> None:
        self._at_start = None
        if self.config.compile:
            self._compiled.begin(self.model)
        self.unmerge()
        super()._before_training_exp(**kwargs)
        for plugin in self.plugins:
            if isinstance(plugin, PeriodicEval):  # left out by Avalanche where the last epoch is evaluated, but ours
                plugin.do_final = plugin.eval_every > -1  # ends with updates absorbed and rows written after that
        self._at_start = None
        self.resources.append({"trainable_parameters": self.model.trainable_parameters()})

    # Going on

    def training_state(self) -> dict[str, Any]:
        """All that going on after a finished experience needs; see :mod:`strategies.training_state`."""
        return training_state(self)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`training_state` was called on a strategy that was built in the same way."""
        load_training_state(self, state)

    def training_identity(self) -> dict[str, Any]:
        """What two strategies must share for one to take the other's training state: see :mod:`training_state`."""
        return training_identity(self)


# Avalanche has wrapped this class's constructor in the same check; see `__init_subclass__`.
ContinualStrategy.__init__ = ContinualStrategy.__init__.__wrapped__  # type: ignore[method-assign,attr-defined]
_TEMPLATE_ARGUMENTS = tuple(
    name for name, p in inspect.signature(ContinualStrategy.__init__).parameters.items() if p.kind == p.KEYWORD_ONLY
)
