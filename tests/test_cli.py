"""The command line as a user meets it: in processes of its own, on images in a folder."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

from avalanche_fmlora.cli import main
from avalanche_fmlora.cli.common import messages
from avalanche_fmlora.executors import Resources

SMALL = [
    "--benchmark", "image_folder", "--n-experiences", "2", "--backbone", "test_vit", "--backbone.pretrained", "false",
    "--image-size", "32", "--epochs", "1", "--batch-size", "8",
]  # fmt: skip


def fmlora(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "avalanche_fmlora", *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["compare", "--help"], ["table", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from avalanche_fmlora.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "loaded = {'torch', 'avalanche', 'pandas', 'numpy', 'timm', 'pydantic'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_run_writes_a_record_and_is_not_run_twice(photos: Path, tmp_path: Path) -> None:
    command = ["run", "fm_lora", *SMALL, "--path", str(photos), "--rank", "4", "--prompt-length=2"]
    command += ["--rank-selection.candidates", "[1, 2]"]
    first = fmlora(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (path,) = (tmp_path / "runs" / "records").glob("*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "finished"
    assert record["config"]["method_options"]["rank"] == 4
    assert str(photos.parent) not in path.read_text()
    matrix = record["accuracy_matrix"]
    assert matrix[0][1] is None
    assert record["metrics"]["final_average_accuracy"] == pytest.approx(sum(matrix[1]) / 2)
    assert record["cost"]["test_forward_passes"] == 1.0
    waits = [e["data_wait_s"] / e["train_s"] for e in record["experiences"]]
    assert all(0 < wait < 1 for wait in waits)
    assert min(waits) <= record["cost"]["data_wait_share"] <= max(waits)
    stored = [e["stored_parameters"] for e in record["experiences"]]
    assert stored[0] == stored[1] > 0
    assert record["experiences"][1]["complexity"] is not None
    for row in record["experiences"]:  # M and N of q and v have 4 numbers a column, and the rank is 1 or 2 of 4
        left_out = sum(4 * 4 * (4 - rank) for rank in row["ranks_per_layer"])
        assert row["trainable_parameters"] - row["trained_parameters"] == left_out > 0
    assert record["benchmark"]["class_order_seed"] == 0
    assert len(record["backbone"]["sha256"]) == 64
    assert "fm_lora" in first.stdout

    again = fmlora(*command, "--training.num-workers", "1", cwd=tmp_path)
    assert "finished already" in again.stderr
    assert json.loads(path.read_text()) == record


def test_compare_writes_tables_and_goes_on_after_a_kill(photos: Path, tmp_path: Path) -> None:
    command = ["compare", "--methods", "ncm,linear_probe,seq_lora", *SMALL, "--path", str(photos), "--jobs", "1"]
    arguments = [sys.executable, "-m", "avalanche_fmlora", *command, "--class-orders", "0,1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    records = tmp_path / "runs" / "records"
    deadline = time.monotonic() + 120
    while not list(records.glob("*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.read_bytes() for p in records.glob("*.json")}
    assert kept

    done = fmlora(*command, "--class-orders", "0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(records.glob("*.json"))) == 6
    assert all(p.read_bytes() == before for p, before in kept.items())
    with (tmp_path / "runs" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert {(r["method"], r["class_order_seed"]) for r in runs} == {
        (m, o) for m in ("ncm", "linear_probe", "seq_lora") for o in "01"
    }
    assert all(Path(tmp_path / "runs" / f"{n}.csv").is_file() for n in ("matrix", "ranks", "summary"))
    table = fmlora("table", "runs", "--csv-to", "again", cwd=tmp_path)
    assert {p.name: p.read_text() for p in (tmp_path / "again").iterdir()} == {
        f"{n}.csv": (tmp_path / "runs" / f"{n}.csv").read_text()
        for n in ("runs", "matrix", "ranks", "summary", "paired")
    }
    paired = [fmlora("table", *words, cwd=tmp_path).stdout for words in (["runs", "--paired"], ["--paired", "runs"])]
    assert paired[0] == paired[1] != ""
    assert {r["benchmark"] for r in runs} == {photos.name}, "a folder of one's own is called by its name"
    assert table.stdout.count("±") >= 3
    assert table.stdout.strip() in done.stdout


def test_interrupt_keeps_what_is_finished(photos: Path, tmp_path: Path) -> None:
    arguments = [
        sys.executable,
        "-m",
        "avalanche_fmlora",
        "compare",
        "--methods",
        "ncm,seq_lora",
        *SMALL,
        "--epochs",
        "10000",  # longer than any machine takes to finish the other run
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    # A suite started in the background of a script ignores SIGINT, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*arguments, "--path", str(photos), "--jobs", "2"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "runs" / "records"
    deadline = time.monotonic() + 120
    while not list(records.glob("ncm*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in error
    assert [p.name.split("-")[0] for p in records.glob("*.json")] == ["ncm"]


def test_a_failed_run_is_kept_with_its_error_and_the_others_go_on(photos: Path, tmp_path: Path) -> None:
    command = ["compare", "--methods", "seq_lora,ncm", *SMALL, "--path", str(photos), "--rank", "1000", "--jobs", "1"]
    done = fmlora(*command, cwd=tmp_path)
    assert done.returncode == 1
    assert "Expected a `rank` between" in done.stderr
    assert done.stderr.endswith(
        "Failed runs keep their error until the same command is given with --retry-failed. "
        "The record of one that is not wanted any more can be deleted.\n"
    )
    (failed,) = (tmp_path / "runs" / "records").glob("seq_lora*.json")
    assert f"(record {failed.name})" in done.stderr, "to be deleted by who has no use for it"
    states = {p.name.split("-")[0]: json.loads(p.read_text()) for p in (tmp_path / "runs" / "records").glob("*.json")}
    assert states["ncm"]["status"] == "finished"
    assert states["seq_lora"]["status"] == "failed"
    assert states["seq_lora"]["error"].startswith("ValueError: Expected a `rank` between")


def test_a_run_that_cannot_start_leaves_no_record(photos: Path, tmp_path: Path) -> None:
    for flags, message in ((["--rank", "1000"], "Expected a `rank` between"), (["--n-experiences", "99"], "99")):
        done = fmlora("run", *SMALL, "--path", str(photos), *flags, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("Error: Expected")
        assert message in done.stderr
    assert not list((tmp_path / "runs" / "records").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "fm_lora", "--rnak", "4"], "did you mean `rank`"),
        (["run", "--epoch", "3"], "did you mean `epochs` of `training`"),
        (["run", "--num-workers", "2"], "or `--training.num_workers` as a flag"),
        (["run", "--batchsize", "4"], "did you mean `batch_size` of `training`"),
        (["run", "--seeds", "[0, 1]"], "a run has one `seed`, several are for `fmlora compare`"),
        (["run", "--lr", "4"], "`fmlora list fm_lora` shows the method's options"),
        (["compare", "--methods", "ncm,l2p", "--lr", "4"], "`fmlora list METHOD` shows the method's options"),
        (["compare", "--imagesize", "32"], "did you mean `image_size` of `backbone`"),
        (["run", "--image-size", "33"], "takes images of 32 px but got 33"),
        (["run", "fm_lore"], "did you mean 'fm_lora'"),
        (["run", "--epochs"], "--epochs needs a value"),
        (["run", "--download"], "--download true"),
        (["report", "afile"], "afile is a file: name its folder"),
        (["run", "--training.epochs", "many"], "training.epochs"),
        (["table", "nowhere"], "fmlora run"),
        (["run", "--config", "none.yaml"], "no configuration file"),
        (["run", "--benchmark", "image_folder"], "benchmark.path"),
        (["run", "--path", "x.zip"], "takes no `path`"),
        (["compare", "--benchmark", "image_folder", "--path", "nowhere.zip"], "There is no nowhere.zip"),
        (["run", "--out", "afile/x"], "afile/x/records/.writable can't be written (Not a directory): make room"),
        (["compare", "--methods", "ncm", "--out", "afile"], "afile/records/.writable can't be written"),
        (["run", "--device", "cuda:99"], "finds no cuda:99: it has cpu"),
        (["compare", "--device", "cuda:99"], "A GPU needs a torch with CUDA"),
        (["compare", "--device", "cuda:99", "--dry-run"], "finds no cuda:99"),
        (["compare", "--device", "meta"], "Expected a device of this machine but meta can't be used (Cannot copy out"),
        (["compare", "--device", "xpu", "--dry-run"], "xpu can't be used (Torch not compiled with XPU"),
        (
            ["compare", "--device", "gpu", "--jobs", "2"],
            "Expected `device` to be cpu, cuda or cuda:1, say, but got 'gpu'",
        ),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("no folder")
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert isinstance(done.exception, SystemExit)
    assert not list(tmp_path.rglob("*.json")), "nothing was started, so nothing failed"


@pytest.mark.parametrize(
    ("arguments", "jobs", "gpus"),
    [
        (["--executor", "ray", "--device", "cuda"], None, 1.0),
        (["--executor", "slurm", "--device", "cuda", "--gpus-per-run", "2"], None, 2.0),
        (["--executor", "ray"], None, 0.0),
        (["--executor", "processes", "--device", "cuda"], 1, 0.0),
        (["--device", "cuda", "--jobs", "2"], 2, 0.0),
    ],
)
def test_a_run_on_a_cluster_has_the_gpu_that_it_computes_on(
    arguments: list[str], jobs: int | None, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Resources] = []

    def make_executor(name: str, resources: Resources, folder: Path) -> None:
        asked.append(resources)
        raise ValueError("seen")

    monkeypatch.setattr("avalanche_fmlora.executors.make_executor", make_executor)
    assert "seen" in CliRunner().invoke(main, ["compare", "--methods", "ncm", *arguments]).stderr
    assert [(r.jobs, r.gpus_per_run) for r in asked] == [(jobs, gpus)]


def test_list_names_methods_and_their_options() -> None:
    lines = CliRunner().invoke(main, ["list"]).stdout.splitlines()
    assert {"fm_lora", "seq_lora", "linear_probe", "ncm", "joint"} <= {line.split()[0] for line in lines if line}
    shown = CliRunner().invoke(main, ["list", "fm_lora"]).stdout
    for line in (
        "classifier = class_mean  (linear | cosine | imprinted | class_mean)",
        "transport_samples = 0  (whole number)",
        "clip_grad_norm = null  (number | null)",
        "compile = false  (true | false)",
        "targets = [q, v]  ([q | k | v | proj | fc1 | fc2, …])",
        "core_step = 2/(t+1)  (number | 1/t | 2/(t+1))",
        "rank_selection = {…}  ({…} | null)",
        "rank_selection.sigma = 0.25  (number)",
        "meta_prompt.epsilon = null  (number | null)",
    ):
        assert f"{line}\n    " in shown, "an option, and below it what it means"
    assert max(map(len, shown.splitlines())) <= 112
    data = CliRunner().invoke(main, ["list", "benchmarks"]).stdout
    assert "benchmark.name = split_glyphs  (split_glyphs | domain_glyphs | " in data
    assert "benchmark.download = false  (true | false)" in data


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_field_with_one_dash_is_refused(command: str) -> None:
    done = CliRunner().invoke(main, [command, "-epochs", "3"])
    assert done.exit_code == 2
    assert "write --epochs in place of -epochs" in done.stderr
    assert "Show this message and exit" in CliRunner().invoke(main, [command, "-h"]).stdout


@pytest.mark.parametrize("arguments", [["list"], ["run", "--epochs"], ["compare", "--rnak", "4"], ["table", "nowhere"]])
def test_a_command_leaves_logging_and_warnings_as_they_were(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = logging.getLogger("avalanche_fmlora")
    monkeypatch.setattr(logging.root, "handlers", [])
    filters = list(warnings.filters)
    CliRunner().invoke(main, arguments)
    assert (package.level, package.handlers, package.propagate) == (logging.NOTSET, [], True)
    assert logging.root.handlers == []
    assert warnings.filters == filters


def test_messages_go_to_standard_error_while_a_command_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    logger = logging.getLogger("avalanche_fmlora.data.store")
    with messages(logging.INFO):
        logger.info("decoding")
        logging.getLogger("timm").warning("old name")
    logger.info("after")
    with messages(logging.WARNING):
        logger.info("not at this level")
    assert capsys.readouterr().err == "decoding\nold name\n"
