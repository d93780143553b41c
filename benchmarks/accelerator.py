"""How near do merges come to the bandwidth of a GPU's memory, and SVDs to PyTorch?

    python benchmarks/accelerator.py [bandwidth] [svd] [--entries 2**30] ...

`bandwidth`: models of a few large stacks of layers, merged by methods that look at every
entry. What such a merge must move, its inputs once and its output once, over the time
that it takes, is its bandwidth; a plain copy of the same machine is what it is measured
by. `svd`: methods on task matrices beside the same methods written in PyTorch, which must
be installed, on the same GPU and the same data. The tables go to
benchmarks/results/accelerator_*.md.
"""

import argparse
import ast
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, ratio, times_in_turn, write_table

import jaxmerge

LEAVES, LAYERS = 4, 16

METHODS = {
    "average": lambda base, models: jaxmerge.average(models),
    "task_arithmetic": jaxmerge.task_arithmetic,
    "ties": jaxmerge.ties,
    "dare": functools.partial(jaxmerge.dare, key=0),
    "tall_masks": jaxmerge.tall_masks,
}


def product(text):
    """A whole number, or a product or power of whole numbers."""
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.BinOp):
        by_type = {ast.Mult: operator.mul, ast.Pow: operator.pow}
        sides = map(ast.unparse, (node.left, node.right))
        return by_type[type(node.op)](*map(product, sides))
    return ast.literal_eval(node)


@functools.partial(jax.jit, static_argnames=("side", "dtype"))
def draw(key, *, side, dtype):
    shape = (LAYERS, side, side)
    keys = jax.random.split(key, LEAVES)
    return {
        f"{i}/kernel": jax.random.normal(k, shape, dtype) for i, k in enumerate(keys)
    }


@jax.jit
def tune(base, key):
    """A model whose task vector has a twentieth of the size of its weights."""
    moved = draw(key, side=base["0/kernel"].shape[-1], dtype=base["0/kernel"].dtype)
    return jax.tree.map(lambda b, m: b + 0.05 * m, base, moved)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bandwidth(args):
    side = math.isqrt(args.entries // (LEAVES * LAYERS))
    rows = []
    for dtype in ("bfloat16", "float32"):
        first, *others = jax.random.split(jax.random.key(0), args.models + 1)
        base = draw(first, side=side, dtype=dtype)
        models = [tune(base, key) for key in others]
        copy = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree))
        seconds = times_in_turn({"copy": lambda: copy(base)}, args.repeats)["copy"]  # noqa: B023
        copied = 2 * nbytes(base) / np.median(seconds)
        rows.append(
            [
                dtype,
                "copy",
                f"{1e3 * np.median(seconds):.2f}",
                f"{copied / 1e9:.0f}",
                "",
            ]
        )
        for name, method in METHODS.items():
            inputs = models if name == "average" else [base, *models]
            result = jax.eval_shape(method, base, models)
            moved = nbytes(inputs) + sum(
                math.prod(leaf.shape) * leaf.dtype.itemsize
                for leaf in jax.tree.leaves(result)
            )
            run = functools.partial(method, base, models)
            times = times_in_turn({name: run}, args.repeats)[name]
            speed = moved / np.median(times)
            rows.append(
                [
                    dtype,
                    name,
                    f"{1e3 * np.median(times):.2f}",
                    f"{speed / 1e9:.0f}",
                    f"{100 * speed / copied:.0f}",
                ]
            )
            print(*rows[-1], flush=True)
    write_table(
        "accelerator_bandwidth",
        f"Merges of {args.models} models of {LEAVES * LAYERS * side**2:,} parameters in "
        f"{LEAVES} stacks of {LAYERS} layers",
        ["dtype", "merge", "ms", "GB/s", "% of copy"],
        rows,
        "GB/s: inputs read once and output written once, over the time of the call, which "
        "was compiled before; a copy reads and writes as much as one model has. "
        f"Median of {args.repeats} runs. {machine()}",
    )


def torch_methods(torch):
    """The methods in PyTorch, of task matrices (T, layers, m, n), as their authors do."""

    def polar(x):
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        return u @ vt

    def svds(deltas):
        return torch.linalg.svd(deltas, full_matrices=False)

    def iso_c(deltas):
        u, s, vt = torch.linalg.svd(deltas.sum(0), full_matrices=False)
        return s.mean(-1)[..., None, None] * (u @ vt)

    def tsv_merge(deltas):
        u, s, vt = torch.linalg.svd(deltas, full_matrices=False)
        rank = s.shape[-1] // len(deltas)
        left = polar(torch.cat(list(u[..., :rank]), dim=-1))
        right = polar(torch.cat(list(vt[..., :rank, :]), dim=-2))
        return (left * torch.cat(list(s[..., :rank]), dim=-1)[..., None, :]) @ right

    return {"SVDs": svds, "iso_c": iso_c, "tsv_merge": tsv_merge}


def svd(args):
    import torch

    @jax.jit
    def svds(base, models):
        deltas = jnp.stack([model["kernel"] - base["kernel"] for model in models])
        return jnp.linalg.svd(deltas, full_matrices=False)

    ours = {
        "SVDs": svds,
        "iso_c": functools.partial(jaxmerge.iso_c, stack_axes=1),
        "tsv_merge": functools.partial(jaxmerge.tsv_merge, stack_axes=1),
    }
    rows = []
    for layers, m, n in args.shapes:
        rng = np.random.default_rng(0)
        base, *moved = (
            rng.standard_normal((layers, m, n), np.float32)
            for _ in range(args.models + 1)
        )
        models = [{"kernel": jnp.asarray(base + 0.05 * x)} for x in moved]
        start = {"kernel": jnp.asarray(base)}
        deltas = torch.stack(
            [torch.as_tensor(np.asarray(m["kernel"]) - base) for m in models]
        ).cuda()
        for name, theirs in torch_methods(torch).items():

            def in_torch(theirs=theirs, deltas=deltas):
                result = theirs(deltas)
                torch.cuda.synchronize()
                return result

            def in_jax(name=name, start=start, models=models):
                return ours[name](start, models)

            off = ""
            if name != "SVDs":
                here = np.asarray(in_jax()["kernel"]) - base
                there = in_torch().cpu().numpy()
                off = f"{np.linalg.norm(here - there) / np.linalg.norm(there):.0e}"
            times = times_in_turn({"jax": in_jax, "torch": in_torch}, args.svd_repeats)
            rows.append(
                [
                    f"{layers} of {m} x {n}",
                    name,
                    *(f"{np.median(times[side]):.3f}" for side in ("jax", "torch")),
                    f"{ratio(times['torch'], times['jax']):.2f}",
                    off,
                ]
            )
            print(*rows[-1], flush=True)
    write_table(
        "accelerator_svd",
        f"Methods on float32 matrices of {args.models} tasks, beside PyTorch {torch.__version__}",
        [
            "matrices",
            "",
            "jaxmerge, s",
            "PyTorch, s",
            "PyTorch / jaxmerge",
            "difference",
        ],
        rows,
        "Difference: the norm of it, over that of the merged task matrix. Median of "
        f"{args.svd_repeats} runs in turn, ratios run by run. {machine()}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["bandwidth", "svd"])
    parser.add_argument("--entries", type=product, default=2**30)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--svd-repeats", type=int, default=3)
    parser.add_argument(
        "--shapes",
        type=lambda text: tuple(map(int, text.split("x"))),
        nargs="+",
        default=[(16, 256, 256), (8, 1024, 1024), (2, 1024, 4096), (1, 4096, 4096)],
    )
    args = parser.parse_args()
    for part in args.parts:
        {"bandwidth": bandwidth, "svd": svd}[part](args)


if __name__ == "__main__":
    main()
