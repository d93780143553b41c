"""The files beside the weights of an output: its config.json and its tokenizer."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxmerge.checkpoints import Checkpoint, CheckpointError
from jaxmerge.checkpoints.files import as_json
from jaxmerge.mergekit.layers import LAYER_KEYS, parts_of
from jaxmerge.mergekit.tokens import OUTDATED_NAMES, TOKENIZER_NAME, Tokenizer

CONFIG_NAME = "config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"

Sidecars = dict[str, bytes | Path]
"""Files by name: their bytes, or the file to copy."""


class Facts(NamedTuple):
    """What the config.json of an output must agree with.

    Attributes:
        dtype: that of its floating-point leaves; None if they differ.
        rows: how many rows its embeddings have, by how many those of the donor have.
        depth: how many layers the donor has, where the output has others.
        layers: for each of these, the configuration of the model that it is from and
            its number there.
        untied: whether it has a head besides its embeddings.
    """

    dtype: str | None
    rows: Mapping[int, int]
    depth: int | None
    layers: Sequence[tuple[Mapping[str, Any], int]]
    untied: bool


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json beside a checkpoint; empty if there is none.

    Raises:
        CheckpointError: it is no JSON.
    """
    path = next((p for p in checkpoint.sidecars() if p.name == CONFIG_NAME), None)
    return {} if path is None else _read_json(path)


def consistent(config: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """A configuration that says of the output what is so.

    Example:
        >>> facts = Facts("bfloat16", {64: 67}, None, [], untied=False)
        >>> consistent({"vocab_size": 64, "dtype": "float32"}, facts)
        {'vocab_size': 67, 'dtype': 'bfloat16'}
    """
    changed = dict(config)
    for key in config:
        if key in ("dtype", "torch_dtype") and facts.dtype is not None:
            changed[key] = facts.dtype
        elif key == "vocab_size":
            changed[key] = facts.rows.get(config[key], config[key])
        elif key == "tie_word_embeddings" and facts.untied:
            changed[key] = False
        elif key in LAYER_KEYS and config[key] == facts.depth:
            changed[key] = len(facts.layers)
        elif key == "layer_types" and len(config[key]) == facts.depth:
            changed[key] = [_layer_type(each, i) for each, i in facts.layers]
        elif isinstance(config[key], dict):
            changed[key] = consistent(config[key], facts)
    return changed


def _layer_type(config: Mapping[str, Any], layer: int) -> Any:
    found = next(c for c in (config, *parts_of(config)) if "layer_types" in c)
    return found["layer_types"][layer]


def replace_tokenizer(files: Sidecars, tokenizer: Tokenizer) -> Sidecars:
    """The files of an output, with this tokenizer instead of the donor's.

    Files that repeat the tokens of a tokenizer that has got more are left out.
    """
    own = {TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, TEMPLATE_NAME, *OUTDATED_NAMES}
    kept = {name: file for name, file in files.items() if name not in own}
    there = {n: tokenizer.path / n for n in own if (tokenizer.path / n).is_file()}
    if tokenizer.document != _read_json(there[TOKENIZER_NAME]):
        there = {n: path for n, path in there.items() if n not in OUTDATED_NAMES}
        return kept | there | {TOKENIZER_NAME: as_json(tokenizer.document)}
    return kept | there


def replace_template(files: Sidecars, template: str) -> Sidecars:
    """The files of an output, with this chat template in its tokenizer_config.json."""
    settings = files.get(TOKENIZER_CONFIG_NAME)
    config = _read_json(settings) if isinstance(settings, Path) else {}
    config["chat_template"] = template
    kept = {name: file for name, file in files.items() if name != TEMPLATE_NAME}
    return kept | {TOKENIZER_CONFIG_NAME: as_json(config)}


def usual_template(paths: Sequence[Path]) -> str | None:
    """The chat template that most models have, the first of equally many."""
    templates = [_template(path) for path in paths]
    counted = Counter(each for each in templates if each)
    return counted.most_common(1)[0][0] if counted else None


def _template(path: Path) -> str | None:
    if (path / TEMPLATE_NAME).is_file():
        return (path / TEMPLATE_NAME).read_text(encoding="utf-8").strip()
    if not (path / TOKENIZER_CONFIG_NAME).is_file():
        return None
    template = _read_json(path / TOKENIZER_CONFIG_NAME).get("chat_template")
    if isinstance(template, list):  # Several, by name.
        named = {each["name"]: each["template"] for each in template}
        template = named.get("default")
    return template and template.strip()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); repair it.") from error
