"""Files of a checkpoint: which are there, what they are, what is wrong with them."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from jaxmerge.checkpoints.interface import CheckpointError

REPORT_NAME = "jaxmerge_report.json"
COMMIT_NAME = "commit_success.txt"
"""What Orbax puts next to a complete checkpoint."""

_SIDECAR_SUFFIXES = frozenset(
    {".bpe", ".jinja", ".json", ".model", ".py", ".spm", ".tiktoken", ".txt", ".vocab"}
)
_PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def require_weights(path: Path) -> None:
    """Raises if `path` is no regular file or only a git-lfs pointer to one."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; {contents_of(path.parent)}.")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path} is a git-lfs pointer, not the file itself: "
                f"run `git lfs pull` in {path.parent}."
            )


def contents_of(directory: Path, limit: int = 12) -> str:
    """Describes what a directory contains, for error messages."""
    if not directory.is_dir():
        return f"the directory {directory} does not exist either"
    names = sorted(entry.name for entry in directory.iterdir())
    if not names:
        return f"{directory} is empty"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{directory} contains {', '.join(names[:limit])}{more}"


def pickled_weights(paths: Iterable[Path]) -> list[Path]:
    """Selects the files that PyTorch writes with pickle, model files before others."""
    pickled = sorted(path for path in paths if path.suffix in _PICKLE_SUFFIXES)
    models = [path for path in pickled if path.name.startswith("pytorch_model")]
    return models or pickled


def convert_pickle_message(pickled: Sequence[Path]) -> str:
    """Says why pickled PyTorch files are refused, and how to convert them."""
    return f"""\
{pickled[0]} holds PyTorch weights in pickle format, which can run code when loaded and
cannot be read leaf by leaf. Convert to safetensors first, where torch is installed:

    import huggingface_hub, torch
    weights = {{}}
    for path in {[str(path) for path in pickled]}:
        weights |= torch.load(path, map_location="cpu", weights_only=True)
    huggingface_hub.save_torch_state_dict(weights, {str(pickled[0].parent)!r})"""


def sidecar_files(directory: Path) -> list[Path]:
    """Lists config, tokenizer and code files of a directory, without weights."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.suffix in _SIDECAR_SUFFIXES
        and not path.name.startswith(".")
        and ".index." not in path.name
        and path.name not in (REPORT_NAME, COMMIT_NAME)
        and path.is_file()
    )


def config_with_dtype(path: Path, dtype: str) -> bytes:
    """A model's `config.json` that says another dtype, where it says one at all.

    Raises:
        CheckpointError: the file is not JSON.
    """
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); repair it.") from error
    for key in {"torch_dtype", "dtype"} & config.keys():
        config[key] = dtype
    return as_json(config)


def as_json(content: Any) -> bytes:
    """JSON as it is put into files that people read, too.

    Example:
        >>> json.loads(as_json(["\\u00e9", "\\udce9"])) == ["\\u00e9", "\\udce9"]
        True
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Half a character, which names of files may have, is written as JSON has it.
    return text.encode(errors="backslashreplace")


def blake3_of(paths: Iterable[Path], root: Path | None = None) -> dict[str, str]:
    """Computes file name -> BLAKE3 (hex); names are relative to `root`, if given."""
    digests = {}
    for path in paths:
        name = path.name if root is None else path.relative_to(root).as_posix()
        digests[name] = blake3().update_mmap(path).hexdigest()
    return digests


def lack_of_space(path: Path, needed: int) -> str | None:
    """Says that the disk is too small for a new file or directory, if it is."""
    place = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return None
    return (
        f"{path} needs {needed:,} bytes, but {place} has only {free:,} free. Make "
        "room, choose another disk or a smaller dtype."
    )


def sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
