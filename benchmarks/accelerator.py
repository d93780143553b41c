"""How near do merges come to the bandwidth of a GPU's memory, and SVDs to PyTorch?

    python benchmarks/accelerator.py [bandwidth] [svd] [--side 4096] ...

`bandwidth`: models of a few large stacks of layers, merged by methods that look at
every entry. What such a merge must move, its inputs once and its output once, over the
time that it takes, is its bandwidth; that of a plain copy is what it is held against.
`svd`: methods on task matrices, beside the same methods written in PyTorch, which must
be installed, on the same GPU and the same data. The tables go to
benchmarks/results/accelerator_*.md.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, ratio, times_in_turn, write_table

import jaxmerge
from jaxmerge import linalg

LEAVES, LAYERS = 4, 16

ELEMENTWISE = {
    "average": lambda base, models: jaxmerge.average(models),
    "task_arithmetic": jaxmerge.task_arithmetic,
    "ties": jaxmerge.ties,
    "dare": functools.partial(jaxmerge.dare, key=0),
    "tall_masks": jaxmerge.tall_masks,
}


@functools.partial(jax.jit, static_argnames=("side", "dtype"))
def draw(key, *, side, dtype):
    shape = (LAYERS, side, side)
    keys = jax.random.split(key, LEAVES)
    return {
        f"{i}/kernel": jax.random.normal(k, shape, dtype) for i, k in enumerate(keys)
    }


@jax.jit
def tune(base, moved):
    """A model whose task vector has a twentieth of the size of its weights."""
    return jax.tree.map(lambda b, m: b + 0.05 * m, base, moved)


@jax.jit
def negate(tree):
    """A copy of which XLA leaves nothing out."""
    return jax.tree.map(jnp.negative, tree)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bandwidth(args):
    rows = []
    for dtype in ("bfloat16", "float32"):
        new = functools.partial(draw, side=args.side, dtype=dtype)
        first, *others = jax.random.split(jax.random.key(0), args.models + 1)
        base = new(first)
        models = [tune(base, new(key)) for key in others]
        runs = {"copy": functools.partial(negate, base)} | {
            name: functools.partial(method, base, models)
            for name, method in ELEMENTWISE.items()
        }
        seconds, speed = {}, {}
        for name, run in runs.items():
            inputs = {"copy": base, "average": models}.get(name, [base, *models])
            moved = nbytes(inputs) + nbytes(jax.eval_shape(run))
            seconds[name] = np.median(times_in_turn({name: run}, args.repeats)[name])
            speed[name] = moved / seconds[name]
        rows += [
            [
                dtype,
                name,
                f"{1e3 * seconds[name]:.2f}",
                f"{speed[name] / 1e9:.0f}",
                f"{100 * speed[name] / speed['copy']:.0f}",
            ]
            for name in runs
        ]
    parameters = LEAVES * LAYERS * args.side**2
    write_table(
        "accelerator_bandwidth",
        f"Merges of {args.models} models of {parameters:,} parameters in {LEAVES} "
        f"stacks of {LAYERS} layers",
        ["dtype", "merge", "ms", "GB/s", "% of copy"],
        rows,
        "GB/s: inputs read once and output written once, over the time of the call, "
        "which was compiled before; a copy reads and writes as much as one model has. "
        f"Median of {args.repeats} runs. {machine()}",
    )


def torch_methods(torch):
    """The methods in PyTorch, on task matrices (tasks, layers, m, n)."""
    svd = functools.partial(torch.linalg.svd, full_matrices=False)

    def polar(x):
        u, _, vt = svd(x)
        return u @ vt

    def iso_c(deltas):
        u, s, vt = svd(deltas.sum(0))
        return s.mean(-1)[..., None, None] * (u @ vt)

    def tsv_merge(deltas):
        u, s, vt = svd(deltas)
        rank = s.shape[-1] // len(deltas)
        left = polar(torch.cat(list(u[..., :rank]), dim=-1))
        right = polar(torch.cat(list(vt[..., :rank, :]), dim=-2))
        return (left * torch.cat(list(s[..., :rank]), dim=-1)[..., None, :]) @ right

    return {"SVDs": svd, "iso_c": iso_c, "tsv_merge": tsv_merge}


@jax.jit
def svds(base, models):
    return linalg.svd(jnp.stack([m["kernel"] - base["kernel"] for m in models]))


OURS = {
    "SVDs": svds,
    "iso_c": functools.partial(jaxmerge.iso_c, stack_axes=1),
    "tsv_merge": functools.partial(jaxmerge.tsv_merge, stack_axes=1),
}


def svd(args):
    import torch

    rows = []
    for shape in args.shapes:
        rng = np.random.default_rng(0)
        start, *moved = rng.standard_normal((args.models + 1, *shape), np.float32)
        base = {"kernel": jnp.asarray(start)}
        models = [{"kernel": jnp.asarray(start + 0.05 * x)} for x in moved]
        deltas = [np.asarray(m["kernel"] - base["kernel"]) for m in models]
        deltas = torch.as_tensor(np.stack(deltas)).cuda()
        for name, theirs in torch_methods(torch).items():
            ours = functools.partial(OURS[name], base, models)

            def in_torch(theirs=theirs, deltas=deltas):
                result = theirs(deltas)
                torch.cuda.synchronize()
                return result

            off = ""
            if name != "SVDs":
                here, there = np.asarray(ours()["kernel"]) - start, in_torch()
                there = there.cpu().numpy()
                off = f"{np.linalg.norm(here - there) / np.linalg.norm(there):.0e}"
            times = times_in_turn({"jax": ours, "torch": in_torch}, args.svd_repeats)
            rows.append(
                [
                    "{} of {} x {}".format(*shape),
                    name,
                    *(f"{np.median(times[side]):.3f}" for side in ("jax", "torch")),
                    f"{ratio(times['torch'], times['jax']):.1f}",
                    off,
                ]
            )
    write_table(
        "accelerator_svd",
        f"Methods on float32 matrices of {args.models} tasks, beside PyTorch "
        f"{torch.__version__}",
        ["matrices", "", "jaxmerge, s", "PyTorch, s", "PyTorch / jaxmerge", "off by"],
        rows,
        "Off by: the norm of the difference, over that of the merged task matrices. "
        f"Median of {args.svd_repeats} runs in turn, ratios run by run. {machine()}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = {"bandwidth": bandwidth, "svd": svd}
    parser.add_argument("parts", nargs="*", default=[*parts], help=", ".join(parts))
    parser.add_argument("--side", type=int, default=4096)
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
        parts[part](args)


if __name__ == "__main__":
    main()
