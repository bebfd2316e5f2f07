"""A method of one's own, with parts that this package knows nothing of: they are counted, kept, or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from avalanche_fmlora import CheckpointPlugin
from avalanche_fmlora.cli import main
from avalanche_fmlora.experiment import _latest_rank
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.strategies import registry
from avalanche_fmlora.strategies.base import ContinualStrategy
from avalanche_fmlora.strategies.config import MethodConfig


class Adapted(ContinualNetwork):
    """A linear map on the features, one of a fixed set for each experience, counted in a plain number."""

    grows = False

    def __init__(self, vit: Any, head: Any) -> None:
        super().__init__(vit, head)
        self.adapters = nn.ModuleList()
        self.task, self.sizes, self.strength = 0, list[int](), 1.0
        for _ in range(0 if self.grows else 3):
            self.add()

    def add(self) -> None:
        width = self.vit.num_features
        self.adapters.append(nn.Linear(width, width, bias=False))
        nn.init.normal_(self.adapters[-1].weight, std=0.1)

    def begin(self, classes: Iterable[int]) -> None:
        super().begin(classes)
        if self.grows:
            self.add()
        self.task += 1
        self.sizes.append(len(list(classes)))

    def features(self, images: Tensor) -> Tensor:
        features = super().features(images)
        for adapter in list(self.adapters)[: self.task]:
            features = features + adapter(features)
        return features

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        current = list(self.adapters[self.task - 1].parameters()) if self.task else []
        return {**super().parameter_groups(), "adapter": current}


class Growing(Adapted):
    """One more map for each experience; it can't be loaded."""

    grows = True


class Loadable(Growing):
    """It can."""

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        while f"adapters.{len(self.adapters)}.weight" in state:
            self.add()


class OwnConfig(MethodConfig):
    """Options."""

    lr_adapter: float = 0.01
    """Rate of the maps."""


class Own(ContinualStrategy):
    """Maps on the features."""

    method: ClassVar[str] = "own"
    summary: ClassVar[str] = "maps on the features"
    config_class = OwnConfig
    network: ClassVar[type[Adapted]] = Adapted

    def build_network(self, vit: Any) -> ContinualNetwork:
        return self.network(vit, self.build_head(vit))

    def rates(self) -> dict[str, float]:
        return {"adapter": self.config.lr_adapter, "head": self.config.lr_head}


def _strategy(vit: Any, network: type[Adapted] = Adapted, cls: type[Own] = Own, **options: Any) -> Own:
    made = type("Made", (cls,), {"network": network})
    return made(model=vit, train_mb_size=8, train_epochs=2, evaluator=None, **options)


@pytest.fixture
def known() -> Iterator[dict[str, Any]]:
    """The registry, as it was afterwards."""
    before = dict(registry._METHODS)
    yield registry._METHODS
    registry._METHODS.clear()
    registry._METHODS.update(before)


@pytest.mark.parametrize("network", [Adapted, Loadable])
def test_a_run_that_was_stopped_goes_on(
    network: Any, make_vit: Any, class_benchmark: Any, images: Tensor, tmp_path: Path
) -> None:
    def run(n: int, *plugins: CheckpointPlugin) -> Own:
        strategy = _strategy(make_vit(), network, plugins=list(plugins))
        torch.manual_seed(0)
        start = plugins[0].resume(strategy) if plugins else 0
        for experience in class_benchmark.train_stream[start:n]:
            strategy.train(experience)
        return strategy

    whole = run(3)
    run(2, CheckpointPlugin(tmp_path))
    resumed = run(3, CheckpointPlugin(tmp_path))
    assert (resumed.model.task, resumed.model.sizes) == (3, [2, 2, 2])
    assert torch.equal(resumed.model.eval()(images), whole.model.eval()(images))


@pytest.mark.parametrize("network", [Adapted, Loadable])
def test_what_was_saved_predicts_the_same(
    network: Any, make_vit: Any, class_benchmark: Any, train: Any, images: Tensor, tmp_path: Path
) -> None:
    trained = train(_strategy(make_vit(), network), class_benchmark, n=2)
    path = trained.save(tmp_path / "own.safetensors")
    loaded = _strategy(make_vit(), network)
    loaded.load(path)
    assert loaded.model.adapter_numbers()[""] == {"task": 2, "sizes": [2, 2]}
    assert torch.equal(loaded.model.eval()(images), trained.model.eval()(images))


def test_a_file_takes_no_option_back(make_vit: Any, class_benchmark: Any, train: Any, tmp_path: Path) -> None:
    """What a network was built with is the new strategy's, and so is a count that the saved one had not begun."""
    path = _strategy(make_vit()).save(tmp_path / "own.safetensors")

    class Stronger(Adapted):
        def __init__(self, vit: Any, head: Any) -> None:
            super().__init__(vit, head)
            self.strength = 2.0

    strategy = train(_strategy(make_vit(), Stronger), class_benchmark, n=1)
    assert strategy.model.task == 1
    strategy.load(path)
    assert (strategy.model.task, strategy.model.sizes, strategy.model.strength) == (0, [], 2.0)


def test_numbers_that_are_kept_are_a_copy(make_vit: Any) -> None:
    model = _strategy(make_vit()).model
    model.sizes = [2]
    kept = model.adapter_numbers()
    model.sizes.append(3)
    assert kept[""]["sizes"] == [2]
    model.load_adapter_numbers(kept)
    model.sizes.append(4)
    assert kept[""]["sizes"] == [2]


def test_a_network_that_grows_is_told_how_to_be_loaded(
    make_vit: Any, class_benchmark: Any, train: Any, tmp_path: Path
) -> None:
    path = train(_strategy(make_vit(), Growing), class_benchmark, n=2).save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"If Growing grows .*, let its `make_room\(state\)` add what"):
        _strategy(make_vit(), Growing).load(path)


def test_methods_of_this_package_are_not_told_of_growth(make_strategy: Any, tmp_path: Path) -> None:
    path = make_strategy("seq_lora").save(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="saved with") as error:
        make_strategy("seq_lora", rank=2).load(path)
    assert "make_room" not in str(error.value)
    assert make_strategy("coda_prompt").model.adapter_numbers() == {}


def test_a_part_of_its_own_is_counted(make_vit: Any, class_benchmark: Any, train: Any) -> None:
    strategy = train(_strategy(make_vit()), class_benchmark, n=2)
    assert strategy.model.stored_parameters() == 3 * 16 * 16
    assert strategy.resources == [{"trainable_parameters": 16 * 16}] * 2
    grown = train(_strategy(make_vit(), Growing), class_benchmark, n=2)
    assert grown.model.stored_parameters() == 2 * 16 * 16


def test_a_plain_model_can_not_hold_features_of_its_own(make_vit: Any) -> None:
    strategy = _strategy(make_vit())
    with pytest.raises(ValueError, match=r"Adapted has its own `features`.*strategy\.model\(images\)"):
        strategy.merged_model()
    with pytest.raises(ValueError, match="features_before"):
        strategy.features_before(torch.zeros(1, 3, 16, 16))


def test_its_features_are_read_again_once_the_experience_has_begun(make_vit: Any, make_strategy: Any) -> None:
    """A part that is new with the experience changes them, which no plugin may overlook."""
    assert not _strategy(make_vit()).model.begin_keeps_features
    assert make_strategy("linear_probe").model.begin_keeps_features


def test_old_rows_follow_its_moved_images(make_vit: Any, class_benchmark: Any, train: Any) -> None:
    rows = [
        train(
            _strategy(make_vit(), classifier="class_mean", row_transport=True, transport_samples=samples),
            class_benchmark,
        ).model.head.rows
        for samples in (0, 8)
    ]
    assert not torch.equal(*rows)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"head": 0.1, "adaptor": 0.0}, r"\['adapter'\] have parameters without a rate, and \['adaptor'\] a rate"),
        ({"head": 0.1}, r"\['adapter'\] have parameters without a rate, and none a rate"),
        ({"head": 0.1, "adapter": 0.1, "more": 1.0}, r"none have parameters without a rate, and \['more'\] a rate"),
    ],
)
def test_each_part_has_a_rate_and_each_rate_a_part(
    rates: dict[str, float], said: str, make_vit: Any, class_benchmark: Any
) -> None:
    cls = type("Typo", (Own,), {"rates": lambda self: rates})
    strategy = _strategy(make_vit(), cls=cls)
    with pytest.raises(ValueError, match=said):
        strategy.train(class_benchmark.train_stream[0])


def test_a_history_of_something_else_is_no_rank() -> None:
    def plugin(history: Any) -> Any:
        return type("Plugin", (), {"history": history})()

    ranks = {"rank": 4, "complexity": 0.5}
    others = [plugin([0.5]), plugin({"rank": 3}), plugin([]), plugin([{"loss": 1}]), object()]
    assert _latest_rank(others) == {}
    assert _latest_rank([*others, plugin([{"rank": 8}, ranks])]) is ranks


@pytest.mark.parametrize("missing", ["method", "summary"])
def test_a_method_says_what_it_is(missing: str) -> None:
    named = {"method": "mine", "summary": "mine"}
    del named[missing]
    with pytest.raises(ValueError, match=f"Expected Mine to have a `{missing}`: write {missing}: ClassVar"):
        registry.register(type("Mine", (ContinualStrategy,), named))


def test_no_class_takes_the_place_of_another(known: dict[str, Any]) -> None:
    ours = known["ncm"]
    with pytest.raises(ValueError, match=r"'ncm' is that of avalanche_fmlora\.strategies\.ncm\.NCMStrategy"):
        registry.register(type(ours.__name__, (Own,), {"method": "ncm"}))
    assert known["ncm"] is ours
    first, again = (type("Own", (Own,), {"__qualname__": "Own"}) for _ in range(2))  # a notebook's cell, run twice
    registry.register(first), registry.register(again)
    assert known["own"] is again


def test_an_installed_package_brings_methods(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    source = "from avalanche_fmlora.strategies.ncm import NCMStrategy\n"
    source += "from avalanche_fmlora.strategies.registry import register\n\n@register\n"
    source += "class Theirs(NCMStrategy):\n    method, summary = 'theirs', 'from elsewhere'\n"
    (tmp_path / "their_methods.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [EntryPoint("theirs", "their_methods", registry.ENTRY_POINTS)]
    found.append(EntryPoint("gone", "no_such_module", registry.ENTRY_POINTS))
    monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.ENTRY_POINTS else [])
    registry._load_entry_points.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert registry.method("theirs").summary == "from elsewhere"
    assert "methods of no_such_module can't be imported" in caplog.text
    listed = CliRunner().invoke(main, ["list"])
    assert all(word in listed.output for word in ("theirs", "from elsewhere"))
    registry._load_entry_points.cache_clear()
