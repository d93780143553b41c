"""The files of a PEFT LoRA adapter: which leaves of its base it changes, and how.

A directory has a configuration and a safetensors file, in which there are two thin
factors for each matrix that is changed.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints import huggingface
from jaxmerge.checkpoints.files import blake3_of, contents_of, pickled_weights
from jaxmerge.checkpoints.interface import FLOATS, CheckpointError, Index
from jaxmerge.checkpoints.safetensors import SafetensorsFile, open_safetensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

MERGE_FIRST = (
    "Merge the adapter into its base with PEFT first, "
    "model.merge_and_unload().save_pretrained(directory), and use the result."
)
# Options that make of a layer something else than base + scaling * B @ A.
_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
    *("lora_bias", "megatron_config", "monteclora_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
    "velora_config",
)
# All others move the base: the factors then add up to it with something taken away.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")

_PREFIX = "base_model.model."
_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_(embedding_[AB])(?:\.[^.]+)?")
_UNKNOWN = re.compile(
    r"(.+\.)?(lora_\w+|modules_to_save|original_module|token_adapter)(\..+)?"
)


class Factors(NamedTuple):
    """The low-rank update of a leaf, `scaling * left @ right`.

    Attributes:
        left: the name of B in the file, shape (outputs, rank), for convolutions
            followed by axes of length 1.
        right: the name of A in the file, shape (rank, *inputs).
        rank: how many rows A has.
        scaling: what the product is multiplied by.
        embedding: whether the leaf is a table of shape (inputs, outputs).
    """

    left: str
    right: str
    rank: int
    scaling: float
    embedding: bool


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter directory, opened: what it does to which leaf is known, none is read.

    Attributes:
        path: the directory.
        factors: low-rank updates by the name of the leaf in the base.
        whole: name of a leaf in the base -> name in the file of its new values, for
            leaves that were trained as a whole (`modules_to_save`, biases).
        fan_in_fan_out: whether linear layers store (inputs, outputs), as GPT-2's do.
        base_name: what the adapter calls its base.
    """

    path: Path
    factors: Mapping[str, Factors]
    whole: Mapping[str, str]
    fan_in_fan_out: bool
    base_name: str
    _file: SafetensorsFile = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The leaves of the base that it changes."""
        return list(dict.fromkeys([*self.factors, *self.whole]))

    def product_shape(self, name: str) -> tuple[int, ...]:
        """The shape (outputs, *inputs) of the update of a leaf."""
        left, right = (self._file.leaves[key].shape for key in self.factors[name][:2])
        return (left[0], *right[1:])

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the new values of a leaf."""
        return self._file.leaves[self.whole[name]].shape

    def read_factors(
        self, name: str, dtype: Any = np.float32
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads `scaling * B`, shape (outputs, rank), and A, shape (rank, *inputs)."""
        factors = self.factors[name]
        left = self._file.read(factors.left).astype(dtype)
        right = self._file.read(factors.right).astype(dtype)
        return factors.scaling * left.reshape(left.shape[:2]), right

    def read_whole(self, name: str, index: Index = ...) -> np.ndarray:
        """Reads the new values of a leaf."""
        return self._file.read(self.whole[name], index)

    def digest(self) -> dict[str, str]:
        """Computes the BLAKE3 (hex) of its files."""
        return blake3_of([self.path / CONFIG_NAME, self._file.path])


def is_adapter(path: Path) -> bool:
    """Whether a directory is an adapter, and not a model that one was merged into."""
    models = (huggingface.WEIGHTS_NAME, huggingface.INDEX_NAME)
    return (path / CONFIG_NAME).is_file() and not any(
        (path / name).is_file() for name in models
    )


def open_adapter(path: Path) -> PeftAdapter:
    """Opens an adapter directory and checks that it is plain LoRA.

    Raises:
        CheckpointError: another kind of adapter, unknown tensors, ranks that disagree
            with the configuration, or a damaged file.
    """
    config = _read_config(path / CONFIG_NAME)
    file = open_safetensors(_find_weights(path))
    found: dict[str, dict[str, str]] = {}
    for key in file.leaves:
        name, role = _role(file.path, key)
        keys = found.setdefault(name, {})
        if role in keys:
            raise CheckpointError(
                f"{file.path} holds {keys[role]!r} and {key!r}, both for leaf "
                f"{name!r}: several adapters in one file? Save each one by itself."
            )
        keys[role] = key
    return PeftAdapter(
        path,
        {
            name: _factors(file, config, name, keys)
            for name, keys in found.items()
            if keys.keys() - {"whole"}
        },
        {name: keys["whole"] for name, keys in found.items() if "whole" in keys},
        bool(config.get("fan_in_fan_out")),
        str(config.get("base_model_name_or_path") or "unknown"),
        file,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} is no LoRA adapter: it has no {CONFIG_NAME}; "
            f"{contents_of(path.parent)}."
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}). Download it again."
        ) from error
    match config:
        case {"peft_type": "LORA", "r": int(), "lora_alpha": int() | float()}:
            pass
        case {"peft_type": str(kind)} if kind != "LORA":
            raise CheckpointError(
                f"{path}: peft_type is {kind!r}; only LORA is understood. "
                + MERGE_FIRST
            )
        case _:
            raise CheckpointError(
                f"{path} lacks 'peft_type', 'r' or 'lora_alpha', or they are no text "
                "and numbers; this is no configuration of a LoRA adapter."
            )
    for key in _VARIANTS:
        if config.get(key):
            raise CheckpointError(
                f"{path}: {key} is {config[key]!r}; only plain LoRA is understood. "
                + MERGE_FIRST
            )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (config.get(option) or {}).items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(
                    f"{path}: {pattern!r} in {option} is no valid regular expression: "
                    f"{error}. Correct it."
                ) from error
            if not isinstance(value, int | float):
                raise CheckpointError(
                    f"{path}: {option} gives {value!r} for {pattern!r}, which is no "
                    "number. Correct it."
                )
    start = config.get("init_lora_weights")
    if start not in _INITIALISATIONS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changed the base before "
            "training, so that the adapter does not fit the base as it is. "
            f"{MERGE_FIRST} Or save it with path_initial_model_for_weight_conversion."
        )
    return config


def _find_weights(directory: Path) -> Path:
    candidates = sorted(p for p in directory.glob("*.safetensors") if p.is_file())
    named = [path for path in candidates if path.name == WEIGHTS_NAME]
    if len(named or candidates) == 1:
        return (named or candidates)[0]
    if not candidates and (pickled := pickled_weights(directory.iterdir())):
        raise CheckpointError(
            f"{pickled[0]} is in pickle format, which can run code when loaded. Load "
            "the adapter with PEFT and save it with save_pretrained, which writes "
            f"{WEIGHTS_NAME}."
        )
    raise CheckpointError(
        f"{directory} has a {CONFIG_NAME}, but neither {WEIGHTS_NAME} nor a single "
        f"other *.safetensors file; {contents_of(directory)}."
    )


def _role(path: Path, key: str) -> tuple[str, str]:
    """The leaf of the base that a tensor is for, and what it is there.

    That is one of "A", "B", "embedding_A", "embedding_B" and "whole".
    """
    if not key.startswith(_PREFIX):
        raise CheckpointError(
            f"{path}: the key {key!r} does not start with {_PREFIX!r}, as PEFT's do. "
            "Save the adapter with PEFT's save_pretrained."
        )
    # PEFT wraps the layers that it adapts, and their biases with them.
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    if match := _LINEAR.fullmatch(name) or _EMBEDDING.fullmatch(name):
        return f"{match[1]}.weight", match[2]
    if _UNKNOWN.fullmatch(name):
        raise CheckpointError(
            f"{path}: the key {key!r} belongs to something else than plain LoRA. "
            + MERGE_FIRST
        )
    return name, "whole"


def _factors(
    file: SafetensorsFile, config: Mapping[str, Any], name: str, keys: Mapping[str, str]
) -> Factors:
    roles = sorted(keys.keys() - {"whole"})
    if roles not in (["A", "B"], ["embedding_A", "embedding_B"]):
        raise CheckpointError(
            f"{file.path}: of leaf {name!r} there is lora_{' and lora_'.join(roles)}; "
            "it takes an A and a B. The file is incomplete; save the adapter again."
        )
    right, left = (keys[role] for role in roles)
    rank = _by_pattern(config, "rank_pattern", name, config["r"])
    alpha = _by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
    a, b = file.leaves[right], file.leaves[left]
    if not a.shape[:1] == b.shape[1:2] == (rank,) or rank < 1:
        raise CheckpointError(
            f"{file.path}: leaf {name!r} has rank {rank} by {CONFIG_NAME} (r and "
            f"rank_pattern), but {right!r} has shape {a.shape} and {left!r} "
            f"{b.shape}. The scaling depends on it: correct the configuration, in "
            "which the first pattern that matches counts (PEFT sorts them on saving)."
        )
    if len(a.shape) != len(b.shape) or any(size != 1 for size in b.shape[2:]):
        raise CheckpointError(
            f"{file.path}: {right!r} of shape {a.shape} and {left!r} of shape "
            f"{b.shape} are no pair of factors. {MERGE_FIRST}"
        )
    for key in (right, left):
        if file.leaves[key].dtype not in FLOATS:
            raise CheckpointError(
                f"{file.path}: {key!r} is {file.leaves[key].dtype}; save the adapter "
                "in bfloat16, float16 or float32."
            )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(left, right, rank, scaling, embedding=roles != ["A", "B"])


def _by_pattern(
    config: Mapping[str, Any], option: str, name: str, default: float
) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    module = name.removesuffix(".weight")
    for pattern, value in (config.get(option) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
