"""The command line: `jaxmerge merge`, `plan`, `convert`, `store` and others."""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxmerge import convert_cli, meshes, plan_cli, store_cli
from jaxmerge.console import (
    CommandError,
    parse_size,
    print_table,
    readable_size,
    short_names,
    show_progress,
)

# Commands import what they need themselves, so that `--help` does not wait for it.
if TYPE_CHECKING:
    from jaxmerge.analysis import Comparison, Statistics
    from jaxmerge.checkpoints import Checkpoint
    from jaxmerge.checkpoints.peft_files import PeftAdapter
    from jaxmerge.registry import Method


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: its words; by default those the program was called with.

    Returns:
        The exit status: 0; 1 for errors in what was asked for; 130 if interrupted; 141
        if nobody reads what it prints.
    """
    arguments = _parser().parse_args(argv)

    from jaxmerge.checkpoints import CheckpointError
    from jaxmerge.recipe_syntax import MergeError, RecipeError

    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # As `head` does, which has seen enough: what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        hint = "a merge goes on where it was when it is run again"
        print(f"jaxmerge: interrupted; {hint}", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(_explain(error))
    except (RecipeError, CheckpointError, MergeError, CommandError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"jaxmerge: {message}", file=sys.stderr)
    return 1


def _explain(error: OSError) -> str:
    """What went wrong, without the number that only programs understand."""
    if error.strerror is None:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}"


def _parser() -> argparse.ArgumentParser:
    import jaxmerge

    parser = argparse.ArgumentParser(prog="jaxmerge", description=jaxmerge.__doc__)
    parser.add_argument("--version", action="version", version=jaxmerge.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., None], help: str) -> Any:
        added = commands.add_parser(name, help=help, description=f"{help}.")
        added.set_defaults(command=command)
        return added

    merge = add("merge", _merge, "Merge checkpoints as a recipe says")
    merge.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="YAML file, also of mergekit"
    )
    merge.add_argument("out", metavar="OUT", help="directory to create")
    merge.add_argument(
        "--memory", metavar="SIZE", default="1GB", help="for values (default: 1GB)"
    )
    merge.add_argument(
        "--from-report",
        metavar="FILE",
        help="in place of RECIPE: do again what a report says",
    )
    merge.set_defaults(usage=merge.error)
    meshes.add_to(merge)

    plan_cli.add_to(commands)

    methods = add("methods", _methods, "List the merge methods, or describe one")
    methods.add_argument("name", metavar="NAME", nargs="?")

    inspect = add("inspect", _inspect, "List the leaves of a checkpoint or adapter")
    inspect.add_argument("checkpoint", metavar="CKPT", help="file or directory")

    compare = add("compare", _compare, "Measure how models differ from their base")
    compare.add_argument("base", metavar="BASE", help="checkpoint of the start")
    compare.add_argument(
        "models", metavar="MODEL", nargs="+", help="checkpoint, or LoRA adapter to BASE"
    )
    compare.add_argument("--csv", metavar="FILE", help="also write a row per leaf")

    convert_cli.add_to(commands)
    store_cli.add_to(commands)

    demo = add("demo", _demo, "Train, merge and compare small models")
    demo.add_argument("--out", metavar="DIR", default="jaxmerge-demo")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _merge(arguments: argparse.Namespace) -> None:
    from jaxmerge.recipe_files import load_recipe, recipe_of_report

    if (arguments.recipe is None) == (arguments.from_report is None):
        arguments.usage("give a RECIPE and OUT, or --from-report FILE and OUT")
    memory = parse_size("--memory", arguments.memory)
    blake3 = None
    if arguments.from_report is None:
        recipe = load_recipe(arguments.recipe)
    else:
        recipe, blake3 = recipe_of_report(arguments.from_report)

    # What is wrong with a recipe is said before the rest is loaded.
    from jaxmerge.merging import merge_checkpoints

    meshes.join_hosts(arguments)
    meshes.keep_compiled_code()
    with show_progress() as progress:
        report = merge_checkpoints(
            recipe,
            arguments.out,
            memory=memory,
            mesh=meshes.mesh_of(arguments),
            rules=meshes.rules_of(arguments),
            blake3=blake3,
            progress=progress,
        )
    totals = report["totals"]
    leaves = ", ".join(f"{n} {kind}" for kind, n in totals["treatments"].items())
    print(f"Leaves: {leaves}.")
    if totals["base_norm"] is not None:
        print(
            f"Norm over merged leaves: {totals['task_vector_norm']:.4g} for the task "
            f"vector, {totals['base_norm']:.4g} for the base."
        )
    print(f"Wrote {arguments.out} in {totals['seconds']:.1f} s.")


def _methods(arguments: argparse.Namespace) -> None:
    from jaxmerge.recipe_syntax import unknown
    from jaxmerge.registry import methods

    known = methods()
    if arguments.name is None:
        rows = [(m.name, m.summary, m.paper) for m in known.values()]
        print_table(["Method", "What it does", "Paper"], rows)
    elif arguments.name in known:
        _describe(known[arguments.name])
    else:
        raise CommandError(unknown("method", arguments.name, list(known)))


def _describe(method: "Method") -> None:
    models = method.max_models
    needs = ["a base"] if method.needs_base else []
    needs += ["models" if models is None else f"at most {models} models"]
    needs += ["a seed"] if method.needs_key else []
    needs += ["statistics of data"] if method.needs_statistics else []
    print(f"{method.name}: {method.summary}")
    print(f"{method.paper}, {method.link}")
    print(f"Needs {', '.join(needs)}.")
    if method.scopes:
        print(f"Works by {' or '.join(method.scopes)}.")
    rows = [
        (
            parameter.name,
            "required" if parameter.required else repr(parameter.default),
            parameter.description,
        )
        for parameter in method.options.values()
    ]
    print_table(["Option", "Default", "Meaning"], rows)


def _inspect(arguments: argparse.Namespace) -> None:
    import math
    from pathlib import Path

    from jaxmerge.checkpoints import is_adapter, open_adapter, open_checkpoint

    if is_adapter(Path(arguments.checkpoint)):
        _describe_adapter(open_adapter(Path(arguments.checkpoint)))
        return
    checkpoint = open_checkpoint(arguments.checkpoint)
    rows = [
        (name, str(list(info.shape)), str(info.dtype), readable_size(info.nbytes))
        for name, info in checkpoint.leaves.items()
    ]
    print_table(["Leaf", "Shape", "Dtype", "Size"], rows)
    infos = checkpoint.leaves.values()
    entries = sum(math.prod(info.shape) for info in infos)
    dtypes = ", ".join(dict.fromkeys(str(info.dtype) for info in infos))
    size = readable_size(sum(info.nbytes for info in infos))
    print(f"{len(rows)} leaves, {entries:,} entries, {size}, {dtypes}")
    print(f"Format: {_format(checkpoint)}")


def _describe_adapter(adapter: "PeftAdapter") -> None:
    rows = [
        (name, str(list(adapter.product_shape(name))), str(f.rank), f"{f.scaling:g}")
        for name, f in adapter.factors.items()
    ]
    rows += [
        (name, str(list(adapter.whole_shape(name))), "whole", "-")
        for name in adapter.whole
    ]
    print_table(["Leaf of the base", "Outputs, inputs", "Rank", "Scaling"], rows)
    print(f"{len(adapter.names)} leaves changed, of the base {adapter.base_name!r}")
    print("Format: PEFT LoRA adapter, which adds scaling * B @ A")


def _format(checkpoint: "Checkpoint") -> str:
    from jaxmerge.checkpoints.huggingface import HuggingFaceDirectory
    from jaxmerge.checkpoints.msgpack import MsgpackFile
    from jaxmerge.checkpoints.orbax import OrbaxDirectory

    if isinstance(checkpoint, HuggingFaceDirectory):
        return "safetensors, directory in Hugging Face layout"
    if isinstance(checkpoint, OrbaxDirectory):
        return "Orbax"
    return "flax msgpack" if isinstance(checkpoint, MsgpackFile) else "safetensors"


def _compare(arguments: argparse.Namespace) -> None:
    from jaxmerge.analysis import compare_checkpoints
    from jaxmerge.checkpoints import open_checkpoint

    paths = dict(
        zip(short_names("compare", arguments.models), arguments.models, strict=True)
    )
    base = open_checkpoint(arguments.base)
    result = compare_checkpoints(
        base, {name: open_checkpoint(path, base) for name, path in paths.items()}
    )
    total, names = result.total, result.names
    rows = [
        (name, f"{norm:.4g}", f"{ratio:.3%}", *(f"{c:.3f}" for c in cosines))
        for name, norm, ratio, cosines in zip(
            names, total.norms, total.relative_norms, total.cosines, strict=True
        )
    ]
    print_table(["Task vector", "Norm", "Of base", *(f"cos {n}" for n in names)], rows)
    header = ["Layer", "Entries", *(f"norm {n}" for n in names), *_MEASURES]
    layers = [_row(layer, part) for layer, part in result.layers.items()]
    print_table(header, [*layers, _row("all", total)])
    if result.left_out:
        left_out = ", ".join(result.left_out[:10])
        more = f" and {len(result.left_out) - 10} more" if result.left_out[10:] else ""
        print(f"Left out, as not alike in all: {left_out}{more}")
    if arguments.csv is not None:
        _write_csv(arguments.csv, result)


_MEASURES = ("mean cos", "conflicts")


def _row(name: str, part: "Statistics") -> list[str]:
    norms = [f"{norm:.4g}" for norm in part.norms]
    shares = [f"{_mean_cosine(part):.3f}", f"{part.sign_conflict:.1%}"]
    if len(norms) == 1:
        shares = ["-", "-"]  # There is nothing to agree with.
    return [name, f"{part.entries:,}", *norms, *shares]


def _mean_cosine(part: "Statistics") -> float:
    """The mean over pairs of different models; NaN for a single one."""
    models = len(part.norms)
    pairs = models * (models - 1)
    total = float(part.cosines.sum() - part.cosines.trace())
    return total / pairs if pairs else float("nan")


def _write_csv(path: str, result: "Comparison") -> None:
    with open(path, "x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        norms = [f"norm {name}" for name in result.names]
        writer.writerow(["leaf", "entries", "base norm", *norms, *_MEASURES])
        for name, part in result.leaves.items():
            shares = [_mean_cosine(part), part.sign_conflict]
            writer.writerow([name, part.entries, part.base_norm, *part.norms, *shares])


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from jaxmerge.demo import run

        run.main(arguments.out, seed=arguments.seed)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the demo needs {error.name}; install it with: "
            'pip install "jaxmerge[demo]"'
        ) from error
