"""Checkpoints in the shape of a small Llama: a start, and models tuned from it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

import jaxmerge


def checkpoints(place: Path, hidden: int, layers: int, models: int) -> list[Path]:
    """Directories in Hugging Face layout, the base first; made unless they are there.

    Weights are normal with a deviation of 0.02, task vectors with one of 0.001, half of
    whose variance they share. They are the same in every run, and stored in bfloat16.
    With 1024 for `hidden`, 12 layers are 220 million parameters.
    """
    family = place / f"llama-{hidden}x{layers}"
    family.mkdir(parents=True, exist_ok=True)
    config = family / "config.json"
    config.write_text(json.dumps(_config(hidden, layers)))
    paths = [family / "base", *(family / f"model-{i}" for i in range(models))]
    for number, path in enumerate(paths):
        if not path.exists():
            leaves = {
                name: _leaf(shape, i, number)
                for i, (name, shape) in enumerate(_shapes(hidden, layers).items())
            }
            jaxmerge.save(path, leaves, sidecars=[config])
    return paths


def _leaf(shape: tuple[int, ...], leaf: int, model: int) -> np.ndarray:
    def normal(deviation: float, stream: int) -> np.ndarray:
        rng = np.random.default_rng([leaf, stream])
        return np.float32(deviation) * rng.standard_normal(shape, np.float32)

    base = normal(0.02, 0).astype(ml_dtypes.bfloat16)
    if model == 0:
        return base
    moved = base.astype(np.float32) + normal(0.0007, 1) + normal(0.0007, 1 + model)
    return moved.astype(ml_dtypes.bfloat16)


def _config(hidden: int, layers: int) -> dict:
    heads = max(1, hidden // 64)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": _inner(hidden),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": _vocabulary(hidden),
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def _inner(hidden: int) -> int:
    return hidden * 11 // 4


def _vocabulary(hidden: int) -> int:
    return hidden * 125 // 4


def _shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    inner, vocabulary = _inner(hidden), _vocabulary(hidden)
    block = {
        **{f"self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"},
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
        **{
            f"model.layers.{i}.{name}": shape
            for i in range(layers)
            for name, shape in block.items()
        },
    }
