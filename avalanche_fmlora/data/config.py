"""Which data a run learns: its fields, checked before anything is read. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from avalanche_fmlora.data.presets import Preset
from avalanche_fmlora.strict import StrictModel

BenchmarkName = Literal[
    "split_glyphs",
    "domain_glyphs",
    "uneven_glyphs",
    "image_folder",
    "split_cifar100",
    "split_imagenet_r",
    "split_cub200",
    "domainnet",
    "domainnet_cil",
]

MODULES = {
    "split_glyphs": "glyphs",
    "domain_glyphs": "glyphs",
    "uneven_glyphs": "uneven_glyphs",
    "image_folder": "image_folder",
    "split_cifar100": "cifar100",
    "split_imagenet_r": "imagenet_r",
    "split_cub200": "cub200",
    "domainnet": "domainnet",
    "domainnet_cil": "domainnet",
}
"""Where in `avalanche_fmlora.data` the function of that name is."""

_FETCHED = ("path", "download", "augment", "seed", "subset")
_TAKES: dict[str, tuple[str, ...]] = {
    "split_glyphs": ("n_experiences",),
    "domain_glyphs": (),
    "uneven_glyphs": ("n_experiences",),
    "image_folder": ("path", "n_experiences", "augment"),
    "split_cifar100": (*_FETCHED, "n_experiences"),
    "split_imagenet_r": (*_FETCHED, "n_experiences", "split_file"),
    "split_cub200": (*_FETCHED, "n_experiences"),
    "domainnet": (*_FETCHED, "domain_order"),
    "domainnet_cil": (*_FETCHED, "n_experiences"),
}
_WHY_NOT = {
    "split_glyphs": "its images are drawn",
    "uneven_glyphs": "its images are drawn",
    "domain_glyphs": "its images are drawn, in one experience a style",
    "domainnet": "it has one experience a domain",
}


def last_name(path: str | Path) -> str:
    """What a record keeps of a path, the same before and after it is made absolute.

    >>> last_name("data/photos/"), last_name("/data/photos/../pets"), last_name(".") == Path.cwd().name
    ('photos', 'pets', True)
    """
    return Path(os.path.abspath(Path(path).expanduser())).name


class BenchmarkConfig(StrictModel):
    """Which data, and how they are divided into experiences."""

    name: BenchmarkName = "split_glyphs"
    """`split_glyphs`, `domain_glyphs` and `uneven_glyphs` are embedded; `image_folder` takes your own images; the
    others are published data sets: `split_cifar100`, `split_imagenet_r`, `split_cub200`, `domainnet` and
    `domainnet_cil`."""
    path: Path | None = None
    """Folder or archive of `image_folder` or of a published data set; a relative path is looked for here, then below
    the data root. Null: where downloads of the data set are kept."""
    download: bool = False
    """Fetch a published data set into `path`, and go on with a download that broke off."""
    n_experiences: int | None = Field(None, ge=1)
    """Number of experiences of a class-incremental benchmark; null means 10 (`domainnet_cil`: 5). (A run that says 10
    where another leaves it out counts as another run.)"""
    domain_order: tuple[str, ...] | None = None
    """Domains of `domainnet`, in order; null is clipart, infograph, painting, quickdraw, real, sketch."""
    split_file: Path | None = None
    """List of the training images of `split_imagenet_r`, text or YAML; null is the fixed split, 24,000 and 6,000."""
    augment: Preset = "none"
    """What is done to images: `published` (the default of published data sets) trains on random resized crops and flips
    and tests on centre crops; `simple`, `resize`, `crop_flip`, `flip` and `none` change less."""
    seed: int | None = Field(None, ge=0)
    """Seed of the random crops and flips of a published data set's training images, which are then the same in runs of
    other seeds; null draws them from the run's seed."""
    subset: bool = False
    """Accept a part of a published data set, miniature trees for example; records then say so."""

    @model_validator(mode="before")
    @classmethod
    def _default_augment(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and "augment" not in values
            and "download" in _TAKES.get(str(values.get("name")), ())
        ):
            return {**values, "augment": "published"}
        return values

    @model_validator(mode="after")
    def _fit(self) -> BenchmarkConfig:
        takes = _TAKES[self.name]
        refused = [
            f"`{field}`"
            for field in type(self).model_fields
            if field not in ("name", *takes) and getattr(self, field) != type(self).model_fields[field].default
        ]
        if refused:
            why = f", since {_WHY_NOT[self.name]}" if self.name in _WHY_NOT else ""
            raise ValueError(f"`{self.name}` takes no {' and no '.join(refused)}{why}: leave it out")
        if self.name == "image_folder" and self.path is None:
            raise ValueError("`image_folder` needs `benchmark.path`, a folder or zip of images")
        return self

    @property
    def is_published(self) -> bool:
        """Whether it is a data set that can be downloaded."""
        return "download" in _TAKES[self.name]

    def builder(self) -> Callable[..., Any]:
        """The function that makes the benchmark."""
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"avalanche_fmlora.data.{MODULES[self.name]}"), self.name
        )
        return function

    def arguments(self) -> dict[str, Any]:
        """Of :meth:`builder`, but for those that the backbone and the run say."""
        values = {field: getattr(self, field) for field in _TAKES[self.name]}
        return {field: value for field, value in values.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """What a record keeps and is named by: the last names of paths, and nothing of where a whole published data set
        lies or came from."""
        plain = self.model_dump(mode="json", exclude={"download"})
        for field in ("path", "split_file"):
            plain[field] = None if plain[field] is None else last_name(plain[field])
        if self.is_published:
            return plain if self.subset else {**plain, "path": None}
        return {field: plain[field] for field in ("name", "path", "n_experiences", "augment")}

    def located(self, find: Callable[[Path], Path]) -> BenchmarkConfig:
        """The same with paths that are there; downloads what is to be downloaded.

        Args:
            find: an existing path for one of the configuration; raises FileNotFoundError.

        Raises:
            FileNotFoundError: if something is not there.
            ConnectionError, ValueError, OSError: see :func:`~avalanche_fmlora.data.download.fetch`.
        """
        found = {"split_file": find(self.split_file)} if self.split_file is not None else {}
        if self.path is not None:
            try:
                found["path"] = find(self.path)
            except FileNotFoundError as error:
                if not self.is_published:
                    raise
                if not self.download:
                    raise FileNotFoundError(f"{error} Or fetch {self.name} to there: `--download true`.") from None
                found["path"] = self.path.expanduser()
        if self.is_published:
            from avalanche_fmlora.data.published import prepare

            found["path"] = prepare(self.name, found.get("path"), self.download, self.domain_order)
        return self.model_copy(update=found)
