"""How much faster than mergekit is `jaxmerge merge`, and in how much memory?

    python benchmarks/mergekit.py [--methods linear ties] [--repeats 3] [--hidden 1024]
        [--place DIR]

Both tools merge the same files with the same method, as whole commands in turn:
`mergekit-yaml`, and `jaxmerge merge` without and with what an earlier run compiled. A
program that reads the inputs once and writes as much as the output is the bound.
mergekit runs in an environment of its own. That and the checkpoints are made at the
first run and kept in `--place`, which takes 10 GB for 1024 hidden units. The tables are
written to benchmarks/results/mergekit.md and mergekit_memory.md; the exit status says
whether all that is promised there holds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama
import numpy as np
from common import machine, write_table
from processes import Run, measure

from jaxmerge.analysis import compare_checkpoints
from jaxmerge.checkpoints import open_checkpoint

PACKAGES = ("torch==2.13.0", "mergekit==0.1.5")
MEGABYTE = 1e6


class Method(NamedTuple):
    """A method, as both tools spell it.

    Attributes:
        theirs: parameters of mergekit's method.
        each: those that mergekit wants with every model.
        ours: the name of our method.
        options: its options, which mean the same.
        start: whether task vectors are measured from the base.
        models: how many it takes, None for any.
        bounds: how many times faster than mergekit it is at least, cold and warm.
        copies: how many times as long as a copy it takes at most.
    """

    theirs: Mapping[str, Any]
    each: Mapping[str, Any]
    ours: str
    options: Mapping[str, Any]
    start: bool = True
    models: int | None = None
    bounds: tuple[float, float] | None = None
    copies: float | None = None


ELEMENTWISE = {"bounds": (2, 2), "copies": 2.5}
SELECTING = {"bounds": (5, 10)}
SIGNS = {"tie": "positive", "divisor": "signed_weights"}
HALF = {"weight": 1.0, "density": 0.5}

METHODS = {
    "linear": Method({}, {"weight": 1.0}, "average", {}, start=False, **ELEMENTWISE),
    "task_arithmetic": Method(
        {"lambda": 0.3},
        {"weight": 1.0},
        "task_arithmetic",
        {"scale": 0.3},
        **ELEMENTWISE,
    ),
    "slerp": Method({"t": 0.5}, {}, "slerp", {"t": 0.5}, start=False, models=2),
    "ties": Method({}, HALF, "ties", {"density": 0.5, **SIGNS}, **SELECTING),
    "dare_ties": Method(
        {},
        HALF,
        "dare",
        {"density": 0.5, "rescale": "l1", "elect": True, "aggregate": "sum", **SIGNS},
        **SELECTING,
    ),
    "della": Method(
        {},
        {**HALF, "epsilon": 0.15},
        "della",
        {"density": 0.5, "half_width": 0.15, "rescale": "l1", **SIGNS},
        **SELECTING,
    ),
    "breadcrumbs": Method(
        {},
        {**HALF, "gamma": 0.01},
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.01},
        **SELECTING,
    ),
    "sce": Method(
        {"select_topk": 0.1},
        {},
        "sce",
        {"density": 0.1, "mask_values": True},
        **SELECTING,
    ),
    "model_stock": Method({}, {}, "model_stock", {"clip": False}),
    "karcher": Method({}, {}, "karcher", {}, start=False),
}
MODELS, LAYERS = 4, 12
MORE_MODELS, MORE_LAYERS = 12, 24
MOST_MEMORY, MOST_GROWTH = 700 * MEGABYTE, 1.1

COPY = """
import os, sys
first, *others, out = sys.argv[1:]
buffer = bytearray(2**23)
with open(out, "wb") as target:
    for path in (first, *others):
        with open(path, "rb", buffering=0) as source:
            while size := source.readinto(buffer):
                if path == first:
                    target.write(memoryview(buffer)[:size])
    target.flush()
    os.fsync(target.fileno())
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    place = Path(tempfile.gettempdir()) / "jaxmerge-benchmark"
    parser.add_argument("--place", type=Path, default=place)
    args = parser.parse_args()
    program = mergekit(args.place / "environment")

    few = llama.checkpoints(args.place, args.hidden, LAYERS, MORE_MODELS)
    deep = llama.checkpoints(args.place, args.hidden, MORE_LAYERS, MODELS)
    times, memory, promises = [], [], {}
    with tempfile.TemporaryDirectory(dir=args.place) as scratch:
        bench = Bench(Path(scratch), program)
        bench.warm_up(few)
        for name in args.methods:
            method = METHODS[name]
            models = few[: 1 + (method.models or MODELS)]
            race = bench.race(name, models, args.repeats)
            grown = [] if method.models else [few, deep]
            peaks = [bench.anonymous(name, paths) for paths in grown]
            times.append([name, *race.times()])
            memory.append([name, *race.memory(peaks)])
            promises[name] = race.promises(method, peaks)
            print(name, *promises[name], sep="\n- ", flush=True)
    report(args, times, memory, promises)


class Race(NamedTuple):
    """What all runs of one method took.

    Attributes:
        runs: by side: "copy", "mergekit", "cold" and "warm".
        inside: seconds that each warm run counted itself, without its start.
        cosine: of the task vectors of both results.
    """

    runs: Mapping[str, Sequence[Run]]
    inside: Sequence[float]
    cosine: float

    def median(self, side: str, what: str) -> float:
        return float(np.median([getattr(run, what) for run in self.runs[side]]))

    def faster(self, side: str, what: str = "wall") -> float:
        return self.median("mergekit", what) / self.median(side, what)

    def copies(self) -> float:
        return float(np.median(self.inside)) / self.median("copy", "wall")

    def peak(self, what: str, *sides: str) -> int:
        return max(getattr(run, what) for side in sides for run in self.runs[side])

    def times(self) -> list[str]:
        """A row of the table of times, after the name."""
        cells = []
        for what in ("wall", "cpu"):
            sides = (self.median(side, what) for side in ("mergekit", "cold", "warm"))
            cells += [f"{seconds:.1f}" for seconds in sides]
            cells += [f"{self.faster(side, what):.1f}" for side in ("cold", "warm")]
        inside, copied = np.median(self.inside), self.median("copy", "wall")
        cells += [f"{inside:.1f}", f"{copied:.1f}", f"{self.copies():.1f}"]
        return [*cells, f"{self.cosine:.3f}"]

    def memory(self, peaks: Sequence[int]) -> list[str]:
        """A row of the table of memory, after the name."""
        sizes = [
            self.peak(what, *sides)
            for what in ("resident", "anonymous")
            for sides in (("mergekit",), ("cold", "warm"))
        ]
        cells = [f"{size / MEGABYTE:.0f}" for size in (*sizes, *peaks)]
        return cells + ["-"] * (2 - len(peaks))

    def promises(self, method: Method, peaks: Sequence[int]) -> list[str]:
        """What was promised, with a word on whether it holds."""
        checks = []
        if method.bounds is not None:
            for side, bound in zip(("cold", "warm"), method.bounds, strict=True):
                times = self.faster(side)
                said = (
                    f"{times:.1f} times as fast as mergekit, {side}; {bound} promised"
                )
                checks.append((times >= bound, said))
        if method.copies is not None:
            said = f"{self.copies():.1f} times a copy; at most {method.copies} promised"
            checks.append((self.copies() <= method.copies, said))
        peak = self.peak("anonymous", "cold", "warm")
        said = (
            f"{peak / MEGABYTE:.0f} MB; at most {MOST_MEMORY / MEGABYTE:.0f} promised"
        )
        checks.append((peak < MOST_MEMORY, said))
        labels = (f"{MORE_MODELS} models", f"{MORE_LAYERS} layers")
        for label, other in zip(labels, peaks, strict=False):
            growth = other / self.peak("anonymous", "cold")
            said = f"{growth:.2f} times the memory with {label}; at most {MOST_GROWTH}"
            checks.append((growth <= MOST_GROWTH, f"{said} promised"))
        return [f"{'holds' if holds else 'FAILS'}: {said}" for holds, said in checks]


class Bench(NamedTuple):
    """Where commands run.

    Attributes:
        scratch: a directory for recipes and outputs.
        program: mergekit's.
    """

    scratch: Path
    program: Path

    def warm_up(self, paths: Sequence[Path]) -> None:
        """Brings programs and inputs into the page cache."""
        measure([self.program, "--help"])
        measure([sys.executable, "-m", "jaxmerge", "methods"])
        self._copy(paths)

    def race(self, name: str, paths: Sequence[Path], repeats: int) -> Race:
        runs = {side: [] for side in ("copy", "mergekit", "cold", "warm")}
        inside = []
        for _ in range(repeats):
            runs["copy"].append(self._copy(inputs(METHODS[name], paths)))
            runs["mergekit"].append(self._mergekit(name, paths))
            runs["cold"].append(self._jaxmerge(name, paths, cold=True))
            runs["warm"].append(self._jaxmerge(name, paths))
            report = json.loads(
                (self.scratch / "ours/jaxmerge_report.json").read_text()
            )
            inside.append(report["totals"]["seconds"])
        both = {
            side: open_checkpoint(self.scratch / side) for side in ("theirs", "ours")
        }
        cosines = compare_checkpoints(open_checkpoint(paths[0]), both).total.cosines
        return Race(runs, inside, float(cosines[0, 1]))

    def anonymous(self, name: str, paths: Sequence[Path]) -> int:
        """The peak of anonymous memory of one run that compiles."""
        return self._jaxmerge(name, paths, cold=True).anonymous

    def _copy(self, paths: Sequence[Path]) -> Run:
        files = [file for path in paths for file in sorted(path.glob("*.safetensors"))]
        return measure([sys.executable, "-c", COPY, *files, self.scratch / "copy"])

    def _mergekit(self, name: str, paths: Sequence[Path]) -> Run:
        method, out = METHODS[name], self._free("theirs")
        base, *models = map(str, paths)
        recipe = {
            "merge_method": name,
            "models": [{"model": m, "parameters": method.each} for m in models],
            "parameters": method.theirs,
            "dtype": "bfloat16",
        }
        if method.start:
            recipe["base_model"] = base
        elif method.models == 2:
            recipe["base_model"] = models[0]
        # There is no tokenizer to copy, and nothing to ask the hub for.
        command = [self.program, self._recipe(recipe), out, "--no-copy-tokenizer"]
        return measure([*command, "--quiet"], {"HF_HUB_OFFLINE": "1"})

    def _jaxmerge(self, name: str, paths: Sequence[Path], cold: bool = False) -> Run:
        method, out = METHODS[name], self._free("ours")
        cache = self._free("cache") if cold else self.scratch / "cache"
        recipe = {
            "method": method.ours,
            "models": [str(path) for path in paths[1:]],
            "options": method.options,
        }
        if method.start:
            recipe["base"] = str(paths[0])
        command = [sys.executable, "-m", "jaxmerge", "merge", self._recipe(recipe), out]
        return measure(command, {"JAXMERGE_CACHE_DIR": str(cache)})

    def _recipe(self, recipe: Mapping[str, Any]) -> Path:
        path = self.scratch / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        return path

    def _free(self, name: str) -> Path:
        path = self.scratch / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def inputs(method: Method, paths: Sequence[Path]) -> Sequence[Path]:
    """The checkpoints that a method reads, of a base and models."""
    return paths if method.start else paths[1:]


def mergekit(environment: Path) -> Path:
    """The program of mergekit, in an environment that is made unless it is there."""
    program = environment / "bin" / "mergekit-yaml"
    if not program.exists():
        venv.create(environment, with_pip=True, symlinks=True)
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", *PACKAGES], check=True)
    return program


def report(
    args: argparse.Namespace,
    times: Sequence[Sequence[str]],
    memory: Sequence[Sequence[str]],
    promises: Mapping[str, Iterable[str]],
) -> None:
    models = (
        f"{MODELS} models (slerp: 2) of hidden size {args.hidden} and {LAYERS} layers"
    )
    lines = [f"- {name} {said}" for name, all_ in promises.items() for said in all_]
    where = f"Load average after {os.getloadavg()[0]:.1f}. {', '.join(PACKAGES)}. "
    where += machine()
    write_table(
        "mergekit",
        f"`mergekit-yaml` and `jaxmerge merge` on {models}, bfloat16",
        [
            "method",
            *(
                head
                for what in ("", "CPU ")
                for head in (
                    f"{what}mergekit, s",
                    f"{what}cold, s",
                    f"{what}warm, s",
                    f"{what}ratio, cold",
                    f"{what}ratio, warm",
                )
            ),
            "inside, s",
            "copy, s",
            "copies",
            "cosine",
        ],
        times,
        f"Whole commands, median of {args.repeats} runs in turn, on files in the page "
        "cache; cold: everything is compiled, warm: it was compiled by an earlier run. "
        "Inside: what a warm run counts itself, without the start of Python and JAX; "
        "copy: a program that reads the same inputs once and writes as many bytes as "
        "the output. Both flush what they write to disk, mergekit does not. jaxmerge "
        "computes in float32 and hashes all inputs, mergekit computes in bfloat16. "
        "Cosine: between the task vectors of both results; dare_ties and della draw at "
        f"random.\n\n{chr(10).join(lines)}\n\n{where}",
    )
    write_table(
        "mergekit_memory",
        f"Memory of `mergekit-yaml` and `jaxmerge merge` on {models}, bfloat16",
        [
            "method",
            "mergekit, resident",
            "jaxmerge, resident",
            "mergekit, anonymous",
            "jaxmerge, anonymous",
            f"with {MORE_MODELS} models",
            f"with {MORE_LAYERS} layers",
        ],
        memory,
        "Peaks in MB, sampled every 20 ms: resident with mapped files, anonymous "
        f"without them. {where}",
    )
    broken = [line for line in lines if "FAILS" in line]
    sys.exit("\n".join(broken) or 0)


if __name__ == "__main__":
    main()
