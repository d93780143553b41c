"""The command line of stores: `jaxmerge store create`, `add`, `extract` and others."""

import argparse
from collections.abc import Callable
from typing import Any

from jaxmerge.console import (
    CommandError,
    print_table,
    readable_size,
    short_names,
    show_progress,
)

# Commands import what they need themselves, so that `--help` does not wait for it.

OPTIONS = ("threshold", "multi_task", "scope", "rank", "bits", "shared_bits")
"""The options of stores that have a flag."""


def add_to(commands: Any) -> None:
    """Adds `store` and its commands to those of a parser."""
    help = "Keep many models in little more than the space of two"
    store = commands.add_parser("store", help=help, description=f"{help}.")
    parsers = store.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[..., None], help: str) -> Any:
        added = parsers.add_parser(name, help=help, description=f"{help}.")
        added.set_defaults(command=command)
        return added

    create = add("create", _create, "Put models that share a base into a new store")
    create.add_argument("base", metavar="BASE", help="checkpoint of the start")
    create.add_argument(
        "models", metavar="MODEL", nargs="+", help="checkpoint, or LoRA adapter to BASE"
    )
    create.add_argument(
        "--out", metavar="STORE", required=True, help="directory to create"
    )
    create.add_argument(
        "--as",
        dest="kind",
        metavar="KIND",
        default="tall",
        help="what is kept of each model: tall (default) or emr, a bit per weight; "
        "tsv, low rank; tvq, rtvq or bitdelta, few bits per weight",
    )
    _add_threshold(create)
    create.add_argument(
        "--multi-task", metavar="HOW", help="tall: task_arithmetic or ties"
    )
    create.add_argument(
        "--scope", help="tall, with ties: what ranks weights, leaf (default) or model"
    )
    create.add_argument(
        "--rank", type=int, help="tsv: singular triplets of each matrix"
    )
    create.add_argument("--bits", type=int, help="tvq, rtvq: bits per weight, up to 8")
    create.add_argument(
        "--shared-bits", type=int, help="rtvq: bits per weight of what models share"
    )

    extract = add("extract", _extract, "Write one model of a store as a checkpoint")
    extract.add_argument("store", metavar="STORE")
    extract.add_argument("task", metavar="TASK")
    extract.add_argument("out", metavar="OUT", help="directory to create")

    added = add("add", _add, "Add a model to a store")
    added.add_argument("store", metavar="STORE")
    added.add_argument("model", metavar="MODEL", help="checkpoint, or LoRA adapter")
    added.add_argument("--name", help="of the task; default: that of the checkpoint")
    _add_threshold(added)

    listed = add("list", _list, "List the tasks of a store")
    listed.add_argument("store", metavar="STORE")

    verify = add("verify", _verify, "Read all of a store and find what is damaged")
    verify.add_argument("store", metavar="STORE")


def _add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold", type=float, help="tall: larger ones give sparser masks"
    )


def _create(arguments: argparse.Namespace) -> None:
    from jaxmerge.compression import create_store, open_store

    names = _task_names(arguments.models)
    options = {
        name: value
        for name in OPTIONS
        if (value := getattr(arguments, name)) is not None
    }
    models = dict(zip(names, arguments.models, strict=True))
    with show_progress() as progress:
        create_store(
            arguments.out,
            arguments.base,
            models,
            kind=arguments.kind,
            progress=progress,
            **options,
        )
    sizes = open_store(arguments.out).sizes()
    print(
        f"Wrote {arguments.out}: {len(names)} tasks in {readable_size(sizes.store)}; "
        f"apart they take {readable_size(sizes.apart)}."
    )


def _task_names(paths: list[str]) -> list[str]:
    names = short_names("store create", paths)
    if taken := [name for name in names if "/" in name]:
        raise CommandError(
            f"store create: models have the same name, such as {taken[0]}; rename a "
            "directory, as tasks are called by these names"
        )
    return names


def _extract(arguments: argparse.Namespace) -> None:
    from jaxmerge.compression import open_store

    store = open_store(arguments.store)
    with show_progress() as progress:
        store.extract(arguments.task, arguments.out, progress=progress)
    print(f"Wrote {arguments.out}.")


def _add(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from jaxmerge.compression import add_task

    name = arguments.name or Path(arguments.model).name
    with show_progress() as progress:
        add_task(
            arguments.store,
            name,
            arguments.model,
            threshold=arguments.threshold,
            progress=progress,
        )
    print(f"Added {name} to {arguments.store}.")


def _list(arguments: argparse.Namespace) -> None:
    from jaxmerge.compression import open_store

    store = open_store(arguments.store)
    sizes = store.sizes()
    rows = [
        (task, str(len(store.files.task(task).entries)), readable_size(nbytes))
        for task, nbytes in sizes.tasks.items()
    ]
    print_table(["Task", "Leaves changed", "Size"], rows)
    chosen = store.files.document["options"].items()
    options = ", ".join(f"{name} {value}" for name, value in chosen)
    print(f"Kind: {store.kind}{f' ({options})' if options else ''}")
    print(
        f"{len(rows)} tasks in {readable_size(sizes.store)}; apart they take "
        f"{readable_size(sizes.apart)}."
    )


def _verify(arguments: argparse.Namespace) -> None:
    from jaxmerge.compression import open_store

    store = open_store(arguments.store)
    store.verify()
    leaves, tasks = len(store.files.leaves), len(store.tasks)
    print(f"{arguments.store} is undamaged: {leaves} leaves, {tasks} tasks.")
