"""Golden cases of mergekit: their models as checkpoints, and recipes carried out."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxmerge
from jaxmerge.registry import methods

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = dict(np.load(FOLDER / "mergekit.npz"))
CASES = json.loads((FOLDER / "mergekit.json").read_text())
COPIES = {"ft1_copy": "ft1", "ft1_sharded": "ft1"}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
EXTRA = ("<|a|>", "<|b|>", "<|c|>")


def below(prefix):
    """The golden arrays whose names start with a prefix, without it."""
    prefix = f"{prefix}/"
    found = {k: v for k, v in GOLDEN.items() if k.startswith(prefix)}
    return {name.removeprefix(prefix): array for name, array in found.items()}


def dtype_of(model):
    suffix = model.rpartition("_")[2]
    return np.dtype({"bf16": jnp.bfloat16, "f16": "float16"}.get(suffix, "float32"))


def leaves_of(model, vocabulary=False):
    """The leaves of a golden model; of shallow ones with or without embeddings."""
    leaves = below(f"inputs/{COPIES.get(model, model)}")
    if not vocabulary and not model.startswith("deep"):
        leaves = {n: leaf for n, leaf in leaves.items() if n not in VOCABULARY}
    return {name: leaf.astype(dtype_of(model)) for name, leaf in leaves.items()}


def write_models(root, vocabulary):
    """Writes golden models: all, or with their embeddings those that have some."""
    models = {name.split("/")[1] for name in GOLDEN if name.startswith("inputs/")}
    for model in sorted(models | COPIES.keys()):
        leaves = leaves_of(model, vocabulary)
        if vocabulary and model.startswith(("deep", "ft1_sharded", "ft1_copy")):
            continue
        if vocabulary and VOCABULARY[0] not in leaves:
            continue
        small = 4096 if model == "ft1_sharded" else 10**9
        write_model(root / "inputs" / model, leaves, max_shard_bytes=small)
    for name in ("m0", "m1", "m2", "m3"):
        whole = root / "inputs" / "raw" / name
        jaxmerge.save(whole, below(f"raw/{name}.safetensors"))
        (whole / "model.safetensors").rename(root / f"inputs/raw/{name}.safetensors")
    pickled = root / "inputs" / "ft1_bin"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    if not vocabulary:
        for name in ("base", "ft2", "adapter"):
            link = root / "lora" / "inputs" / name.replace("adapter", "lora")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(FOLDER / "lora" / name)


def write_model(path, leaves, config=None, **options):
    """Writes a checkpoint with a config.json, and a tokenizer if it has embeddings."""
    jaxmerge.save(path, leaves, **options)
    layers = {name.split(".")[2] for name in leaves if ".layers." in name}
    rows = len(leaves[VOCABULARY[0]]) if VOCABULARY[0] in leaves else 64
    tied = VOCABULARY[1] not in leaves
    standard = {
        "dtype": str(next(iter(leaves.values())).dtype),
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": tied,
        "vocab_size": rows,
    }
    (path / "config.json").write_text(json.dumps(standard | (config or {})))
    if VOCABULARY[0] in leaves:
        words = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, 64))]
        write_tokenizer(path, words, EXTRA[: rows - 64])


def write_tokenizer(path, words, added=()):
    """Writes the files of a tokenizer that knows words, and tokens added to them."""
    document = {
        "added_tokens": [
            {"id": len(words) + i, "content": token, "special": True}
            for i, token in enumerate(added)
        ],
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}},
    }
    (path / "tokenizer.json").write_text(json.dumps(document))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def carried_out(plan, only=None):
    """Merges a plan in memory, or those leaves of it that are in `only`."""
    merged = {}
    for part in plan.parts:
        steps = {n: s for n, s in part.steps.items() if only is None or n in only}
        inputs = {}
        for name, step in steps.items():
            if step.treatment == "merged":
                inputs[name] = step
            else:
                merged[name] = step.source.read(name).astype(step.out.dtype)
        if not inputs:
            continue
        call = methods()[part.recipe.method].bind(
            part.recipe.options, part.recipe.seed, list(part.recipe.models)
        )
        base = part.inputs.base and _read(part.inputs.base, inputs)
        models = [_read(model, inputs) for model in part.inputs.models.values()]
        like = models[0] if base is None else base
        for name, step in inputs.items():
            if like[name].dtype != step.out.dtype:
                like[name] = like[name].astype(np.float32)
        for name, leaf in call(base, models).items():
            merged[name] = np.asarray(leaf).astype(steps[name].out.dtype)
    return merged


def _read(checkpoint, names):
    return {name: np.asarray(checkpoint.read(name)) for name in names}
