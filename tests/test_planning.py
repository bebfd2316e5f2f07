"""What `--dry-run` says is what would be run, and its seconds are counted right."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
from click.testing import CliRunner

from avalanche_fmlora import planning
from avalanche_fmlora.backbones import BackboneConfig
from avalanche_fmlora.checkpoint import CheckpointFolder
from avalanche_fmlora.cli import main
from avalanche_fmlora.config import RunConfig, make_run
from avalanche_fmlora.planning import Planned, Speed, plan, plan_line, plan_totals, rehearse
from avalanche_fmlora.results.record import run_id
from avalanche_fmlora.strategies.registry import methods
from avalanche_fmlora.sweep import sweep


def configuration(photos: Path, method: str = "seq_lora", order: int = 0, **options: Any) -> RunConfig:
    return make_run(
        {
            "method": method,
            "method_options": options,
            "benchmark": {"name": "image_folder", "path": photos, "n_experiences": 2},
            "backbone": {"name": "test_vit", "pretrained": False, "image_size": 32},
            "training": {"epochs": 3, "batch_size": 8},
            "class_order_seed": order,
        }
    )


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tenth of a second an image and epoch, nothing else; the list gets what was rehearsed."""
    rehearsed: list[str] = []

    def known(config: RunConfig, *_: Any) -> Speed:
        rehearsed.append(config.method)
        return Speed(0.1, 0.0, 0.0)

    monkeypatch.setattr(planning, "rehearse", known)
    return rehearsed


def test_finished_interrupted_failed_and_new_runs(photos: Path, tmp_path: Path, speeds: list[str]) -> None:
    done, broken, begun, new = (configuration(photos, order=order, rank=2) for order in range(4))
    sweep([done], tmp_path, threads=1)

    class Breaks:
        def threads(self, count: int) -> int:
            return 1

        def run(self, tasks: Any, finish: Any) -> None:
            from avalanche_fmlora.executors import RunLost

            for key in tasks:
                finish(key, RunLost("the worker died"))

    sweep([broken], tmp_path, executor=Breaks())
    folder = CheckpointFolder(tmp_path / "checkpoints" / run_id(begun.identity()))
    folder.save(1, {}, {"any": "identity"})
    before = sorted(tmp_path.rglob("*"))
    runs = plan([done, broken, begun, new, new], tmp_path)
    assert [r.state for r in runs] == ["finished", "failed", "goes on", "new"]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    images = [len(list((photos / "train").rglob("*.*")))]
    assert runs[3].seconds == pytest.approx(0.1 * 3 * images[0])
    assert runs[2].seconds == pytest.approx(0.1 * 3 * images[0] / 2)
    assert [r.seconds for r in runs[:2]] == [0.0, 0.0]
    assert speeds == ["seq_lora"], "orders share a rehearsal"
    retried = plan([broken], tmp_path, retry_failed=True)
    assert retried[0].state == "new"
    assert "class order 1, seed 0: failed: interrupted: the worker died" in plan_line(runs[1])
    assert "goes on after 1 experiences, about" in plan_line(runs[2])
    text = plan_totals(runs, at_once=2)
    assert "4 runs, 1 finished, 1 failed, 2 to run." in text
    assert "--retry-failed" in text


def test_rates_share_a_rehearsal_and_sizes_do_not(photos: Path, tmp_path: Path, speeds: list[str]) -> None:
    runs = [{"lr_lora": 1e-3}, {"lr_lora": 2e-3}, {"rank": 2}, {"rank": 4}]
    told: list[int] = []
    plan([configuration(photos, **o) for o in runs], tmp_path, report=lambda run: told.append(len(speeds)))
    assert speeds == ["seq_lora"] * 3
    assert told == [1, 1, 2, 3], "each run is told before the next is measured"


def test_missing_data_leave_an_estimate_open(photos: Path, tmp_path: Path, speeds: list[str]) -> None:
    lost = configuration(photos).model_copy(
        update={"benchmark": configuration(photos).benchmark.model_copy(update={"path": tmp_path / "nowhere"})}
    )
    (run,) = plan([lost], tmp_path)
    assert run.seconds is None
    assert "nowhere" in str(run.error)
    assert "no estimate: There is no " in plan_line(run)
    assert "No estimate for 1 runs" in plan_totals([run])
    assert not speeds


def test_a_backbone_that_is_not_there_takes_no_other_ones_estimate(
    photos: Path, tmp_path: Path, speeds: list[str]
) -> None:
    good = configuration(photos)
    lost = good.model_copy(update={"backbone": BackboneConfig(name="test_vit", weights=tmp_path / "nowhere.pth")})
    runs = plan([lost, good], tmp_path)
    assert "nowhere.pth" in str(runs[0].error)
    assert (runs[1].error, runs[1].seconds is None) == (None, False)


def test_a_rehearsal_that_breaks_leaves_an_estimate_open(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(planning, "rehearse", broken)
    runs = plan([configuration(photos), configuration(photos, "ncm")], tmp_path)
    assert [(run.seconds, run.error) for run in runs] == [(None, "out of memory")] * 2


@pytest.mark.parametrize("batch", [1, 5, 25])
def test_a_rehearsal_has_images_for_every_batch(batch: int, photos: Path) -> None:
    config = configuration(photos, "ncm")
    config = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": batch})})
    assert rehearse(config, 3, "cpu").test_s > 0
    sizes = [len(experience.dataset) for experience in planning._noise(batch * planning._BATCHES, 32, 2)]
    assert sizes == [batch * planning._BATCHES] * 2


def test_images_that_are_never_the_same_again_are_rehearsed_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch of a prompt method takes the queries that its first one made; with random crops it has none."""
    made: list[Any] = []
    make = planning.make_strategy
    monkeypatch.setattr(planning, "make_strategy", lambda *a: made.append(make(*a)) or made[-1])
    plain = configuration(photos, "l2p", pool_size=2, prompt_length=2, top_k=1)
    cropped = plain.model_copy(update={"benchmark": plain.benchmark.model_copy(update={"augment": "crop_flip"})})
    plan([plain, cropped], tmp_path)
    assert [strategy.train_epochs for strategy in made] == [2, 1]


def test_what_several_at_once_take() -> None:
    config = RunConfig()
    runs = [Planned(config, "new", seconds=s) for s in (600.0, 60.0)]
    said = plan_totals(runs, 2)
    assert "About 11 min of computing, 10 min with 2 runs at once" in said, "the longest one sets the end"
    assert "at once" not in plan_totals(runs, None)


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_can_be_rehearsed(method: str, photos: Path) -> None:
    blocks: dict[str, Any] = {
        "dual_prompt": {"g_blocks": (0,), "e_blocks": (1,)},
        "coda_prompt": {"blocks": (0, 1), "pool_size": 6},
        "fm_lora": {"rank": 4},
    }
    speed = rehearse(configuration(photos, method, **blocks.get(method, {})), 2, "cpu")
    assert (speed.epoch_s > 0) == (method != "ncm"), "class means take no epoch"
    assert speed.around_s > 0
    assert 0 < speed.test_s < 1


def test_the_command_runs_nothing(photos: Path, tmp_path: Path, speeds: list[str]) -> None:
    arguments = [
        "compare", "--dry-run", "--methods", "ncm,seq_lora", "--class-orders", "0,1", "--benchmark", "image_folder",
        "--path", str(photos), "--n-experiences", "2", "--backbone", "test_vit", "--backbone.pretrained", "false",
        "--image-size", "32", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "seq_lora on image_folder (n_experiences=2), class order 1, seed 0: new, about" in done.output
    assert "4 runs, 4 to run." in done.output
    assert not (tmp_path / "out").exists()


def test_other_weights_under_the_same_name_do_not_pass_for_a_finished_run(photos: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "tiny.safetensors", tmp_path / "records"
    model = timm.create_model("test_vit", img_size=32, num_classes=0)
    safetensors.torch.save_file(model.state_dict(), weights)
    run = configuration(photos, "ncm")
    run = run.model_copy(update={"backbone": run.backbone.model_copy(update={"weights": weights, "pretrained": True})})
    (record,) = sweep([run], out)
    assert record["status"] == "finished"
    assert sweep([run], out) == [record]
    assert plan([run], out)[0].state == "finished"

    changed = {name: value + 1 for name, value in model.state_dict().items()}
    safetensors.torch.save_file(changed, weights)
    for again in (sweep, plan):
        with pytest.raises(ValueError, match=f"{weights} has changed .* a name of their own"):
            again([run], out)
    weights.unlink()
    assert sweep([run], out) == [record]


@pytest.mark.parametrize("as_zip", [False, True])
def test_other_images_under_the_same_name_do_not_pass_for_a_finished_run(
    photos: Path, tmp_path: Path, as_zip: bool
) -> None:
    out, place = tmp_path / "records", tmp_path / ("photos.zip" if as_zip else "photos")

    def put(source: Path) -> None:
        if as_zip:
            shutil.make_archive(str(place.with_suffix("")), "zip", source)
        else:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(source, place)

    put(photos)
    run = configuration(place, "ncm")
    (record,) = sweep([run], out)
    assert record["status"] == "finished"
    put(photos)  # a copy, written at another time
    assert sweep([run], out) == [record]
    assert plan([run], out)[0].state == "finished"

    others = tmp_path / "others"
    shutil.copytree(photos, others)
    first = min((others / "train").rglob("*.png"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-30] + bytes(30))  # of the same name and size
    put(others)
    _refused(run, place, out)
    first.write_bytes(whole)
    first.rename(first.with_name("renamed.png"))
    put(others)
    _refused(run, place, out)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert sweep([run], out) == [record]


def _refused(run: RunConfig, place: Path, out: Path) -> None:
    for again in (sweep, plan):
        with pytest.raises(ValueError, match=f"The images in {place} are others .* a name of its own"):
            again([run], out)
