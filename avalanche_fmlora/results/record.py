"""One run = one JSON record: written once, atomically, named by a hash of its configuration, never edited.

The shape is in :mod:`avalanche_fmlora.results.schema`. This module imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from avalanche_fmlora.results.schema import (
    SCHEMA,
    Backbone,
    Benchmark,
    Config,
    Cost,
    Environment,
    Experience,
    Metrics,
    Record,
    Seeds,
    blank_record,
    check,
    complete,
    order_key,
    plain,
    run_id,
    sha256_of,
)

__all__ = [
    "SCHEMA",
    "Backbone",
    "Benchmark",
    "Config",
    "Cost",
    "Environment",
    "Experience",
    "Metrics",
    "Record",
    "Seeds",
    "blank_record",
    "check_folder",
    "environment",
    "file_name",
    "find_record",
    "is_old",
    "order_key",
    "read_record",
    "read_records",
    "run_id",
    "write_atomically",
    "write_record",
]

_OLD_S = 3600.0
_DISTRIBUTIONS = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "avalanche": "avalanche-lib",
    "avalanche_fmlora": "avalanche-fmlora",
}


def environment(device: str, threads: int) -> Environment:
    """Versions and hardware of this process, for a run on `device` with `threads` CPU threads."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            versions[name] = version(distribution)
        except PackageNotFoundError:
            versions[name] = None
    facts = {"python": platform.python_version(), **versions, "platform": platform.platform()}
    facts |= {"processor": _processor() or platform.processor() or platform.machine() or None}
    return cast("Environment", {**facts, "cores": os.cpu_count(), "threads": threads, "device": str(device)})


def write_record(record: Record, folder: str | Path) -> Path:
    """Write `record` whole or not at all: ``folder/`` :func:`file_name`.

    NaN and infinity become null, arrays and tuples lists, and an error loses its folders. A retry that finished
    replaces the record of a failure.

    Returns:
        The path of the file.

    Raises:
        ValueError: if a key is missing or unknown, or if the values contradict each other.
        FileExistsError: if a failed run would replace the record of a finished one.
    """
    content = complete(plain(record))
    if isinstance(content["error"], str):
        content["error"] = without_folders(content["error"])
    check(content, "the record")
    path = Path(folder) / file_name(content)
    if content["status"] == "failed" and path.exists() and read_record(path)["status"] == "finished":
        raise FileExistsError(
            f"{path} is the record of a finished run, and this one failed: delete it to run it again."
        )
    text = json.dumps({**content, "checksum": sha256_of(content, "the record")}, indent=1, ensure_ascii=False)
    rows_on_one_line = re.sub(r'\[\n\s*([^\[\]{}"]*?)\n\s*\]', lambda m: "[" + " ".join(m[1].split()) + "]", text)
    return write_atomically(path, rows_on_one_line + "\n")


def without_folders(text: str) -> str:
    """Absolute paths in a message become their last names: records leave the machine they were made on.

    >>> without_folders("Expected 'CUB' at '/home/my name/data/CUB' or /tmp/x/y.zip: see http://a.org/b/c, n01/a.jpg")
    "Expected 'CUB' at 'CUB' or y.zip: see http://a.org/b/c, n01/a.jpg"
    """
    root = r"(?:~|[A-Za-z]:)?/"
    text = re.sub(rf"(['\"`]){root}[^'\"`\n]*/([^'\"`\n/]+)/?\1", r"\1\2\1", text)
    return re.sub(rf"(?:(?<=[\s(=])|^){root}(?:[^/\s'\"`]+/)+(?=[^/\s])", "", text)


def read_record(path: str | Path) -> Record:
    """Read one record and check that it is whole and as it was written.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is torn, of another kind, of a later version or was edited.
    """
    try:
        content = json.loads(Path(path).read_bytes().decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected {path} to be a result record but it is not a whole JSON file ({error}): "
            "delete it and run its configuration again."
        ) from error
    if not isinstance(content, dict) or "checksum" not in content or "schema" not in content:
        raise ValueError(
            f"Expected {path} to be a result record but it lacks `schema` and `checksum`: move other files elsewhere."
        )
    if content["schema"] != SCHEMA:
        raise ValueError(
            f"Expected {path} to have schema {SCHEMA} but got {content['schema']!r}: "
            "read it with the version of avalanche_fmlora that wrote it, or upgrade."
        )
    checksum = content.pop("checksum")
    if checksum != sha256_of(content, str(path)):
        raise ValueError(
            f"{path} does not match its checksum, so it was changed after the run: records are never edited. "
            "Restore it, or delete it and run its configuration again."
        )
    check(complete(content), str(path))
    return cast("Record", content)


def read_records(folder: str | Path) -> list[Record]:
    """All records of `folder`, ordered by benchmark, method, class order, seed and id; hidden files are left aside.

    Raises:
        FileNotFoundError: if there is no record.
        NotADirectoryError: if it is a file.
        ValueError: if one can't be read (see :func:`read_record`) or if two files hold the same run.
    """
    paths = sorted(path for path in Path(folder).glob("*.json") if not path.name.startswith("."))
    if not paths:
        if Path(folder).is_file():
            raise NotADirectoryError(f"Expected a folder of result records but {folder} is a file: name its folder.")
        missing = "it holds no *.json" if Path(folder).is_dir() else "it does not exist"
        raise FileNotFoundError(
            f"Expected result records in {folder} but {missing}: `fmlora run` or `fmlora compare` makes them."
        )
    records: dict[str, tuple[Path, Record]] = {}
    for path in paths:
        record = read_record(path)
        if record["id"] in records:
            raise ValueError(
                f"{records[record['id']][0]} and {path} are records of the same run, which would count twice: "
                "delete the copy."
            )
        records[record["id"]] = (path, record)
    return sorted((record for _, record in records.values()), key=order_key)


def find_record(folder: str | Path, config: Mapping[str, Any], *, failed: bool = False) -> Record | None:
    """The record of a finished run of `config` in `folder`, or None; with `failed`, that of a failed one too.

    Raises:
        ValueError: if the file is there but torn or edited.
    """
    wanted = run_id(config)
    for path in sorted(Path(folder).glob(f"[!.]*-{wanted}.json")):
        record = read_record(path)
        if record["id"] == wanted and (failed or record["status"] == "finished"):
            return record
    return None


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write bytes, or text as UTF-8, beside `path`, flush, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        told = f"{path} can't be written ({error.strerror}): make room, or name another folder"
        raise OSError(error.errno, told) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def is_old(path: Path) -> bool:
    """Whether a file was last written over an hour ago: by then what is written in one go is whole, or left behind."""
    try:
        return time.time() - path.stat().st_mtime > _OLD_S
    except FileNotFoundError:
        return False


def check_folder(folder: Path) -> None:
    """Make a folder for records, write into it once and read what lies there, before hours are spent on what follows.

    Raises:
        OSError: if that can't be done.
        ValueError: if a file in it is no record, or is not named as records are, so that none would find it.
    """
    write_atomically(folder / ".writable", "").unlink(missing_ok=True)
    for path in sorted(folder.glob("[!.]*.json")):
        record = read_record(path)
        if not path.stem.endswith(f"-{record['id']}"):
            raise ValueError(
                f"{path} holds run {record['id']}, which is looked for by that name: rename it to {file_name(record)}, "
                "or delete it if it is a copy."
            )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def file_name(record: Mapping[str, Any]) -> str:
    """The name of a record's file: ``<method>-<benchmark>-s<seed>-o<class_order_seed>-<id>.json``."""
    config = record["config"]
    order = "none" if config["class_order_seed"] is None else config["class_order_seed"]
    method, benchmark = (
        re.sub(r"[^A-Za-z0-9_.]+", "_", name) for name in (config["method"], config["benchmark"]["name"])
    )
    return f"{method}-{benchmark}-s{config['seed']}-o{order}-{record['id']}.json"


def _processor() -> str | None:
    """The model name that Linux reports, None elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
