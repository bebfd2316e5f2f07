"""What is done is not done again: finished runs are known by their records, and one that was killed goes on.

It does so from the last experience that it finished: its own checkpoints lie beside the records.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from avalanche_fmlora.backbones import file_sha256
from avalanche_fmlora.checkpoint import CheckpointFolder
from avalanche_fmlora.config import RunConfig, find_data
from avalanche_fmlora.results.record import Record, find_record, run_id

logger = logging.getLogger(__name__)


def known_record(
    config: RunConfig,
    folder: Path,
    data_root: Path | None = None,
    *,
    failed: bool = False,
    listings: dict[Path, str] | None = None,
) -> Record | None:
    """The record of a run that is finished; with `failed`, of one that broke down, too.

    Args:
        config: of the run.
        folder: of the records.
        data_root: folder of relative data paths.
        failed: return a failed record as well.
        listings: give the same dict for all runs of a sweep, and no folder of images is looked through twice.

    Raises:
        ValueError: if the record is torn, edited, or of other weights or images than those that the file or folder of
            that name holds now.
    """
    record = find_record(folder, config.identity(), failed=failed)
    if record is not None and record["config"]["label"] != config.label:
        logger.warning(
            "%s in %s is finished under the label %r and keeps it, not %r: to run it anew, delete *-%s.json there.",
            config.method, folder, record["config"]["label"], config.label, record["id"],
        )  # fmt: skip
    if record is not None:
        _same_weights(record, config, folder, data_root)
        _same_images(record, config, folder, data_root, {} if listings is None else listings)
    return record


def _same_weights(record: Record, config: RunConfig, folder: Path, data_root: Path | None) -> None:
    weights, then = config.backbone.weights, record["backbone"]["sha256"]
    if weights is None or then is None or (path := _found(weights, data_root)) is None:
        return
    if (now := _sha256(path, path.stat().st_mtime_ns)) != then:
        raise ValueError(
            f"{path} has changed (sha256 {now[:8]}) since {record['id']} in {folder} was run with it ({then[:8]}): "
            "give the new weights a name of their own, or run into another folder."
        )


def _same_images(
    record: Record, config: RunConfig, folder: Path, data_root: Path | None, listings: dict[Path, str]
) -> None:
    """Names and sizes only, which takes no time; a record of a version that kept none of them is taken at its word."""
    given, then = config.benchmark.path, record["benchmark"]["extra"].get("listing")
    if given is None or then is None or (path := _found(given, data_root)) is None:
        return
    if path not in listings:
        from avalanche_fmlora.data.image_folder import folder_listing

        listings[path] = folder_listing(path)
    if listings[path] != then:
        raise ValueError(
            f"The images in {path} are others than those that {record['id']} in {folder} was run with: give the folder "
            "or archive with the new ones a name of its own, or run into another folder."
        )


def _found(path: Path, data_root: Path | None) -> Path | None:
    """Where it is, or None: records that were made elsewhere are read where their data are not."""
    try:
        return find_data(path, data_root)
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, stamp: int) -> str:
    return file_sha256(path)


class Loop(Protocol):
    """What a run is in the middle of."""

    strategy: Any
    experiences: list[dict[str, Any]]

    def state(self) -> dict[str, Any]:
        """Rows and sums so far, as plain values."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from rows and sums."""


def checkpoint_folder(records: Path, identity: Mapping[str, Any]) -> CheckpointFolder:
    """Where a run with this configuration keeps its checkpoints, below the folder of its record."""
    return CheckpointFolder(records / "checkpoints" / run_id(identity))


class RunCheckpoints:
    """Checkpoints of one run.

    Seconds and images of a run are sums over the experiences, of which each was finished in one go: what a kill made
    void is not in them. `started_at` is the first start, the peak of memory that of all parts.

    Args:
        folder: of the run.
        configuration: the run's identity.
        data: hash of the split.
        backbone: hash of the weights.
        environment: versions and hardware of this process.
        started_at: of this process.

    Attributes:
        peak_memory_bytes: of the parts before this one.
    """

    def __init__(
        self,
        folder: Path,
        configuration: Mapping[str, Any],
        *,
        data: str | None,
        backbone: str,
        environment: Mapping[str, Any],
        started_at: str,
    ) -> None:
        self.checkpoints = CheckpointFolder(folder)
        self.environment = dict(environment)
        self.started_at = started_at
        self.peak_memory_bytes = 0
        plain = {k: v for k, v in configuration.items() if k != "label"}
        version = self.environment["avalanche_fmlora"]
        self._identity = {"configuration": plain, "data": data, "backbone": backbone, "avalanche_fmlora": version}

    def resume(self, loop: Loop) -> None:
        """Bring a fresh loop to where the last good checkpoint was written; without one, leave it as it is."""
        try:
            found = self.checkpoints.latest(self._identity)
        except ValueError as error:
            logger.warning("%s\nThere is no other checkpoint: the run starts from the beginning.", error)
            return
        if found is None:
            return
        finished, state = found
        others = [k for k, v in state["environment"].items() if self.environment.get(k) != v]
        if others:
            logger.warning("The first %d experiences were run with another %s.", finished, ", ".join(others))
        loop.strategy.load_training_state(state["strategy"])
        loop.load_state(state["loop"])
        self.started_at = state["started_at"]
        self.peak_memory_bytes = state["peak_memory_bytes"]
        logger.warning("Going on after %d finished experiences, from %s.", finished, self.checkpoints.folder)

    def save(self, loop: Loop, peak_memory_bytes: int) -> None:
        """Write a checkpoint; call it when an experience is trained and evaluated.

        Args:
            loop: of the run.
            peak_memory_bytes: of this process so far.
        """
        state = {
            "loop": loop.state(),
            "strategy": loop.strategy.training_state(),
            "started_at": self.started_at,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes),
            "environment": self.environment,
        }
        self.checkpoints.save(len(loop.experiences), state, self._identity)
