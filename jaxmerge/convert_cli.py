"""The command line of conversion: `jaxmerge convert`."""

import argparse
from typing import Any

from jaxmerge.console import readable_size, show_progress

# Commands import what they need themselves, so that `--help` does not wait for it.


def add_to(commands: Any) -> None:
    """Adds `convert` to the commands of a parser."""
    help = "Write a checkpoint in another format, with other names or another dtype"
    parser = commands.add_parser("convert", help=help, description=f"{help}.")
    parser.set_defaults(command=_convert)
    parser.add_argument("source", metavar="SRC", help="checkpoint to read")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument(
        "--to", metavar="FORMAT", required=True, help="safetensors, orbax or msgpack"
    )
    parser.add_argument("--dtype", help="of floating-point leaves, such as bfloat16")
    parser.add_argument(
        "--names",
        metavar="RULES",
        help="rules for names and axes: bert, llama or vit, from Hugging Face to flax, "
        "or a YAML file",
    )
    parser.add_argument("--inverse", action="store_true", help="undo the rules")
    parser.add_argument(
        "--keep-rest", action="store_true", help="keep leaves that no rule matches"
    )
    parser.add_argument(
        "--stack", metavar="LAYERS", help="stack layers of names such as layers_{}"
    )
    parser.add_argument(
        "--unstack", metavar="LAYERS", help="take layers apart into such names, first"
    )


def _convert(arguments: argparse.Namespace) -> None:
    from jaxmerge.checkpoints import open_checkpoint
    from jaxmerge.conversion import convert

    with show_progress() as progress:
        convert(
            arguments.source,
            arguments.out,
            arguments.to,
            names=arguments.names,
            inverse=arguments.inverse,
            keep_rest=arguments.keep_rest,
            unstack=arguments.unstack,
            stack=arguments.stack,
            dtype=arguments.dtype,
            progress=progress,
        )
    written = open_checkpoint(arguments.out).leaves.values()
    size = readable_size(sum(info.nbytes for info in written))
    print(f"Wrote {arguments.out}: {len(written)} leaves, {size}, as {arguments.to}.")
