"""FM-LoRA (arXiv 2504.08823): updates in one shared low-rank subspace, a rank an experience, one slow prompt.

The paper's: factorised low-rank adaptation in shared bases with RxR task factors, a dynamic rank selector through
Gumbel-Softmax, one meta-prompt. Ours: every equation, default and training detail, and the class-mean classifier, whose
rows follow the drift of the features and hold the model by their cosines.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from avalanche.core import BasePlugin
from pydantic import Field, model_validator

from avalanche_fmlora.modules.factorized_lora import FactorizedLoRA
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.prompts import MetaPrompt
from avalanche_fmlora.modules.rank_selector import RankSelector, check_candidates
from avalanche_fmlora.modules.vit import Pooling, Target, TimmViT, adapt_linears
from avalanche_fmlora.plugins.factorized_lora import CoreRegularizationPlugin
from avalanche_fmlora.plugins.lifecycle import ExperiencePlugin
from avalanche_fmlora.plugins.meta_prompt import MetaPromptPlugin
from avalanche_fmlora.plugins.rank_selection import RankSelectionPlugin
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import Classifier, MethodConfig, RecurringRows, Structural
from avalanche_fmlora.strategies.registry import register
from avalanche_fmlora.strict import StrictModel


class RankSelectionConfig(StrictModel):
    """Options of the dynamic rank selector."""

    candidates: tuple[int, ...] | None = None
    """Ranks to choose from; null means {R/8, R/4, R/2, R}."""
    sigma: float = Field(0.25, gt=0)
    """Width of the prior around the target rank, as a share of R."""
    kl_weight: float = Field(0.1, ge=0)
    """Weight of KL(π ‖ prior) in the loss."""
    tau_start: float = Field(5.0, gt=0)
    """Gumbel-Softmax temperature at the first iteration."""
    tau_end: float = Field(0.5, gt=0)
    """Temperature when the choice is made."""
    search_share: float = Field(0.4, gt=0, le=1)
    """Share of an experience's iterations after which its rank is fixed."""
    per_layer: bool = False
    """One choice for each adapted map instead of one for all."""
    max_samples: int = Field(512, ge=2)
    """Images used to measure complexity and similarity."""


class MetaPromptConfig(StrictModel):
    """Options of the dynamic meta-prompt."""

    rate_share: float = Field(0.1, ge=0)
    """Share of the prompt's learning rate that is left after the first experience."""
    anchor_weight: float = Field(0.01, ge=0)
    """Weight of ‖P − P_{t−1}‖² in the loss."""
    epsilon: float | None = Field(None, gt=0, le=1)
    """Reptile step ε; null means 1/t."""
    fit_share: float = Field(0.25, ge=0, lt=1)
    """Share of the epochs, at the end, in which the prompt rests."""


class FMLoRAConfig(MethodConfig):
    """Options of FM-LoRA."""

    rank: Structural[int] = Field(32, ge=1)
    """Rank R of the shared subspace."""
    targets: Structural[tuple[Target, ...]] = ("q", "v")
    """Adapted maps: q, k, v, proj, fc1, fc2."""
    blocks: Structural[tuple[int, ...] | None] = None
    """Adapted blocks, from 0; null means all."""
    scale: Structural[float] = Field(1.0, gt=0)
    """Scale s of the update s·A C B."""
    bases: Structural[Literal["first_experience", "pretrained_svd", "random_orthonormal", "slow"]] = "pretrained_svd"
    """Where the shared bases come from: leading singular vectors of the pretrained weights (an SVD of each adapted map
    when the strategy is built), random ones, or a plain LoRA that the first experience trains, frozen afterwards or
    (`slow`) training on at a small share of its rate."""
    core_step: Annotated[float, Field(gt=0, le=1)] | Literal["1/t", "2/(t+1)"] = "2/(t+1)"
    """Share α of an experience's update that is kept: 2/(t+1) in experience t, so that the longer the sequence, the
    less one experience moves what all share, and the core is a mean of all cores with weights 1, 2, …, t; 1/t for the
    plain mean; or a number in (0, 1]. The first update is kept whole."""
    distillation: float = Field(1.0, ge=0)
    """Weight of the cosines to past class means, held by the free teacher (the model before the task); 0 for none.

    With another classifier than ``class_mean`` there are no class means, and no distillation."""
    teacher: Literal["known", "every_step"] = "known"
    """`known`: the teacher speaks on images whose features the pass before the experience gave, at no further pass, and
    is silent where inputs change from epoch to epoch; `every_step`: one more forward pass a step, without autograd."""
    stability: float = Field(0.0, ge=0)
    """Weight λ_core of ‖C_t − C_{t−1}‖², with C_t as trained, before `core_step` takes its share of the update."""
    rank_selection: RankSelectionConfig | None = RankSelectionConfig()
    """Dynamic rank selector; null keeps rank R in every experience. A RankSelectionPlugin is taken too."""
    prompt_length: Structural[int] = Field(1, ge=0)
    """Tokens L of the meta-prompt; 0 for none."""
    meta_prompt: MetaPromptConfig = MetaPromptConfig()
    """How the meta-prompt moves. A plugin is taken too."""
    classifier: Classifier = "class_mean"
    """`linear`; `cosine` (trained); `imprinted` (cosine rows that start as class means and train on); `class_mean` (the
    same, then written again as class means)."""
    pooling: Structural[Pooling] = "token_and_mean"
    """What the classifier reads: the features that the model's own head would get, class token and mean of the patch
    tokens side by side (`token_and_mean`; twice as wide), or both of each of the last four blocks (`multi_layer`; eight
    times as wide); of models that have and pool neither: `model`."""
    row_transport: bool = True
    """Move the `class_mean` rows of past classes, and kept means of those that recur, along with the drift of the
    current experience's features."""
    whitening: float | None = Field(0.3, gt=0)
    """Shrinkage λ with which `class_mean` rows are whitened for prediction, by the covariance within classes; null for
    plain cosines."""
    whitening_covariance: Literal["current", "secant", "running"] = "secant"
    """Covariance that whitens: of the current experience's features; also of the past, as far as class means and their
    whitened rows remember it, which keeps nothing but these rows; or the mean over all experiences so far, for which
    D x D numbers are kept (a stored statistic, which the record declares)."""
    recurring_rows: RecurringRows = "per_experience"
    """What predicts a class that occurs in more than one experience, with `class_mean`: its row as trained; the mean
    over all its samples, those of the past standing in by their mean (at unit length); or one mean for each experience,
    the nearest of which counts (rows grow with experiences)."""
    lr_bases: float = Field(1e-3, ge=0)
    """Learning rate of bases that train: in the first experience, if `bases` is `first_experience` or `slow`."""
    slow_share: float = Field(0.01, ge=0)
    """Share of `lr_bases` that `slow` bases keep after the first experience."""
    lr_core: float = Field(2e-3, ge=0)
    """Learning rate of the task factors M, N."""
    lr_rank: float = Field(0.05, ge=0)
    """Learning rate of the rank selector's δ."""
    lr_prompt: float = Field(1e-3, ge=0)
    """Learning rate of the meta-prompt in the first experience."""

    @model_validator(mode="after")
    def _ranks_fit(self) -> FMLoRAConfig:
        if self.rank_selection is not None and self.rank_selection.candidates is not None:
            check_candidates(self.rank_selection.candidates, self.rank)
        return self


FM_LORA_CLASSIFIER: dict[str, Any] = {
    name: FMLoRAConfig.model_fields[name].default
    for name in ("classifier", "pooling", "row_transport", "whitening", "whitening_covariance", "recurring_rows")
}
"""FM-LoRA's classifier as options, which every method takes: ``NCMStrategy(model=vit, **FM_LORA_CLASSIFIER)``."""


@register
class FMLoRAStrategy(ContinualStrategy):
    """FM-LoRA (Yu et al., CVPRW 2025, arXiv 2504.08823) for a timm ViT in any Avalanche pipeline.

    Options are the fields of :class:`FMLoRAConfig`, arguments of the frame in :class:`ContinualStrategy`.
    `rank_selection` and `meta_prompt` also take a plugin in the place of a configuration. Stored after any number of
    experiences: bases, one core a map, one prompt, and of each class its row and the row whitened for prediction. Where
    classes recur, `recurring_rows="per_experience"` keeps a mean and a whitened row for each experience of a class: the
    head grows with domains, which records count as `head_parameters`; the two other choices do not grow.

    >>> import timm
    >>> vit = timm.create_model("test_vit", num_classes=0)
    >>> strategy = FMLoRAStrategy(model=vit, rank=8, prompt_length=0, evaluator=None)
    >>> strategy.model.stored_parameters()
    13056
    """

    method: ClassVar[str] = "fm_lora"
    summary: ClassVar[str] = "shared low-rank bases, one core, dynamic rank, meta-prompt"
    paper: ClassVar[str] = "arXiv 2504.08823"
    config_class = FMLoRAConfig
    plugin_options = ("rank_selection", "meta_prompt")
    config: FMLoRAConfig

    def build_network(self, vit: TimmViT) -> ContinualNetwork:
        """Low-rank updates in the chosen maps, a prompt at the input."""
        config, head = self.config, self.build_head(vit)
        if config.rank_selection is not None:
            RankSelector(config.rank, config.rank_selection.candidates)  # may refuse: before the model is changed
        layers = adapt_linears(vit, config.targets, config.blocks, config.rank, config.scale)
        prompt = MetaPrompt(config.prompt_length, vit.embed_dim) if config.prompt_length else None
        return ContinualNetwork(vit, head, FactorizedLoRA(layers, config.bases, config.seed), prompt)

    def rates(self) -> dict[str, float]:
        """Rates of bases, core, rank selector, prompt and head."""
        c = self.config
        return {"bases": c.lr_bases, "core": c.lr_core, "rank": c.lr_rank, "prompt": c.lr_prompt, "head": c.lr_head}

    def build_plugins(self) -> list[BasePlugin]:
        """Rank selector and prompt decide; then the experience is closed; then rows are written."""
        return [*self._deciding_plugins(), ExperiencePlugin(), *self._frame_plugins()]

    def _deciding_plugins(self) -> list[BasePlugin]:
        config, plugins = self.config, list[Any]()
        if "rank_selection" in self._given_plugins:
            plugins.append(self._given_plugins["rank_selection"])
        elif config.rank_selection is not None:
            plugins.append(RankSelectionPlugin(**dict(config.rank_selection), seed=config.seed))
        if "meta_prompt" in self._given_plugins:
            plugins.append(self._given_plugins["meta_prompt"])
        elif config.prompt_length:
            plugins.append(MetaPromptPlugin(**dict(config.meta_prompt)))
        if config.distillation or config.stability:
            plugins.append(
                CoreRegularizationPlugin(
                    distillation=config.distillation, teacher=config.teacher, stability=config.stability
                )
            )
        return plugins

    def core_step(self) -> float:
        """α: the whole of the first update; then as `core_step` says."""
        t = self._experiences_absorbed() + 1
        match self.config.core_step:
            case "1/t":
                return 1 / t
            case "2/(t+1)":
                return 2 / (t + 1)
            case share:
                return share if t > 1 else 1.0

    def make_optimizer(self, **kwargs: Any) -> None:
        """As the frame's; `slow` bases keep a share of their rate after the first experience."""
        super().make_optimizer(**kwargs)
        if self.config.bases == "slow" and self._experiences_absorbed():
            self.scale_rate("bases", self.config.slow_share)

    def _experiences_absorbed(self) -> int:
        assert self.model.lora is not None, "build_network makes one"
        return int(self.model.lora.experiences)
