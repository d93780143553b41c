"""Plans of merges: what they say beside what merges do, and all that they refuse."""

import json
import math
import re

import jax
import numpy as np
import pytest
import yaml
from counting import count_bytes
from jax.sharding import PartitionSpec as P

from jaxmerge import streaming
from jaxmerge.checkpoints import save
from jaxmerge.checkpoints.safetensors import SafetensorsFile
from jaxmerge.cli import main
from jaxmerge.forecast import plan_merge
from jaxmerge.machines import MACHINES
from jaxmerge.merging import merge_checkpoints
from jaxmerge.planning import MergeError
from jaxmerge.recipes import Recipe
from jaxmerge.registry import methods

NAMES = ("math", "code")
LITTLE = 20_000
"""Of the matrices below, some tenths fit at a time."""


def make_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed.weight": (96, 16),
        **{f"layers.{i}.up.weight": (64, 16) for i in range(2)},
        **{f"layers.{i}.norm.weight": (16,) for i in range(2)},
    }
    tree = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return tree | {"steps": np.array(seed, np.int32)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for i, name in enumerate(("base", *NAMES)):
        save(directory / name, make_tree(i))
    return directory


@pytest.fixture
def unread(monkeypatch):
    def fail(*arguments):
        raise AssertionError("a value was read")

    monkeypatch.setattr(SafetensorsFile, "read", fail)


def recipe_for(runs, method, **fields):
    base = runs / "base" if methods()[method].needs_base else None
    return Recipe(method, {n: runs / n for n in NAMES}, base=base, **fields)


def by_name(plan):
    return {group.name: group for group in plan.groups}


@pytest.mark.parametrize(
    ("method", "memory", "fields"),
    [
        ("average", 10**9, {}),
        ("average", LITTLE, {"dtype": "bfloat16"}),
        ("task_arithmetic", LITTLE, {"take": {".*norm.*": "base", "steps": "skip"}}),
        ("ties", LITTLE, {}),
        ("slerp", LITTLE, {}),
        ("iso_c", LITTLE, {}),
    ],
)
def test_bytes_and_slices_are_those_of_the_merge(
    runs, tmp_path, monkeypatch, method, memory, fields
):
    recipe = recipe_for(runs, method, **fields)
    plan = plan_merge(recipe, memory=memory)
    totals, writes = count_bytes(monkeypatch)
    merge_checkpoints(recipe, tmp_path / "out", memory=memory)
    assert [plan.totals.read, plan.totals.written] == totals
    if methods()[method].gathers:
        return  # What is computed whole may be written by rows.
    slices = {name: group.cost.slices for group in plan.groups for name in group.names}
    assert writes == {n: max(k, 1) for n, k in slices.items() if n in writes}


def test_leaves_that_are_alike_are_together(runs, unread):
    options = {
        "weights": [1.0, {".*norm.*": 0.0, ".*": 0.5}],
        "scale": {".*up.*": 0.3, ".*": 1.0},
    }
    take = {r"layers\.1\.norm.*": "first"}
    plan = plan_merge(recipe_for(runs, "task_arithmetic", options=options, take=take))
    groups = by_name(plan)
    assert groups.keys() == {
        *("embed.weight", "layers.*.up.weight", "steps"),
        *("layers.0.norm.weight", "layers.1.norm.weight"),
    }
    up = groups["layers.*.up.weight"]
    assert up.names == ["layers.0.up.weight", "layers.1.up.weight"]
    assert (up.shape, up.treatment) == ((64, 16), "merged")
    assert up.options["weights"] == [1.0, 0.5]
    assert up.options["scale"] == 0.3
    norm = groups["layers.0.norm.weight"]
    assert (norm.options["weights"], norm.options["scale"]) == ([1.0, 0.0], 1.0)
    assert groups["layers.1.norm.weight"].treatment == "taken: first"
    assert groups["steps"].treatment == "copied: integer"


def test_leaves_that_are_no_matrices(runs, unread):
    plan = plan_merge(recipe_for(runs, "tsv_merge"))
    groups = by_name(plan)
    assert groups["layers.*.up.weight"].treatment == "merged"
    assert groups["layers.*.norm.weight"].treatment == "no matrix: average"
    assert groups["layers.*.up.weight"].cost.operations.factorising > 0
    assert groups["layers.*.norm.weight"].cost.operations.factorising == 0


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_memory_grows_with_what_is_allowed(runs, unread, method):
    recipe = recipe_for(runs, method)
    plans = [plan_merge(recipe, memory=m) for m in (LITTLE, 3 * LITTLE, 10**9)]
    hosts = [plan.totals.host for plan in plans]
    assert hosts == sorted(hosts)
    assert hosts[0] < hosts[-1]
    slices = [by_name(plan)["embed.weight"].cost.slices for plan in plans]
    assert slices == sorted(slices, reverse=True)
    assert slices[-1] == 1
    # The result of the largest leaf is there, and a method without barriers stays
    # within its limit.
    assert hosts[-1] >= 96 * 16 * 4
    if method == "task_arithmetic":
        assert hosts[0] <= LITTLE


def test_methods_that_rank_all_leaves_together_are_planned_without_values(runs, unread):
    plan = plan_merge(recipe_for(runs, "ties", options={"scope": "model"}))
    assert plan.totals.operations.flops > 0
    assert plan.totals.written == sum(x.nbytes for x in make_tree(0).values())


def collectives(method, kind):
    """The bytes of all collectives of a kind, in what is compiled for 8 devices."""
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    names = [f"layers.{i}.up.weight" for i in range(2)]
    trees = [{name: make_tree(i)[name] for name in names} for i in range(3)]
    trees = jax.device_put(trees, where)
    known = methods()[method]
    arguments = (trees[0], trees[1:]) if known.needs_base else (trees[1:],)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda *a: known.function(*a)).lower(*arguments).compile()
    results = re.findall(rf"= (.*) {kind}\(", compiled.as_text())
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(results))
    return sum(4 * math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


@pytest.mark.parametrize("method", ["average", "slerp", "iso_c"])
def test_what_devices_send_is_what_is_compiled_for_them(runs, method, optimised):
    group = by_name(plan_merge(recipe_for(runs, method), mesh={"x": 8}))
    sent = 2 * group["layers.*.up.weight"].sent
    # Of what a device has, it keeps an eighth; of a sum, it sends each part twice.
    moved = collectives(method, "all-to-all") + 2 * collectives(method, "all-reduce")
    assert sent == pytest.approx(7 / 8 * moved)
    assert (sent > 0) == (method != "average")
    assert collectives(method, "all-gather") == 0


@pytest.mark.parametrize("method", ["average", "slerp", "ties"])
def test_leaves_on_a_mesh_are_planned_whole_however_large(runs, method, monkeypatch):
    plan = plan_merge(recipe_for(runs, method), mesh={"x": 8})
    monkeypatch.setattr(streaming, "_AT_ONCE", 1000)
    assert plan_merge(recipe_for(runs, method), mesh={"x": 8}).groups == plan.groups
    assert all(group.cost.slices == 1 for group in plan.groups if "." in group.name)


def test_equal_matrices_are_the_work_of_a_device_each(runs, unread):
    recipe = recipe_for(runs, "tsv_merge")
    alone = plan_merge(recipe)
    spread = plan_merge(recipe, mesh={"x": 8})
    # Neither leaf fits beside the other: all devices work on the same matrix.
    little = plan_merge(recipe, mesh={"x": 8}, memory=LITTLE)
    # Of two processes, each has half of the values in its memory.
    shared = plan_merge(recipe, mesh={"x": 8}, memory=3 * LITTLE, hosts=2)
    groups = [by_name(plan) for plan in (alone, spread, little, shared)]
    up = [x["layers.*.up.weight"] for x in groups]
    assert [(x.together, x.share) for x in up] == [(1, 1), (2, 0.5), (1, 1), (2, 0.5)]
    assert [x.working for x in up] == [up[0].cost.working] * 4
    assert [x["layers.*.norm.weight"].share for x in groups] == [1, *[1 / 8] * 3]
    factorising = MACHINES["cpu"]._replace(factorise=1.0, flops=1e30, memory=1e30)
    seconds = [
        plan_merge(recipe, mesh={"x": 8}, memory=m, machine=factorising).totals.seconds
        for m in (10**9, LITTLE)
    ]
    assert seconds[0].compute == pytest.approx(seconds[1].compute / 2)


def test_rules_say_how_leaves_lie_on_the_mesh(runs, unread):
    recipe, mesh = recipe_for(runs, "average"), {"x": 4, "y": 2}
    plan = plan_merge(recipe, mesh=mesh, rules={r"layers\.0.*": P("y"), "e.*": P()})
    shares = {n: g.share for g in plan.groups for n in g.names}
    assert shares["layers.0.up.weight"] == shares["layers.0.norm.weight"] == 1 / 2
    assert shares["layers.1.up.weight"] == 1 / 8
    assert shares["embed.weight"] == 1
    with pytest.raises(MergeError, match="rule 'nothing' matches no leaf"):
        plan_merge(recipe, mesh=mesh, rules={"nothing": P()})
    with pytest.raises(MergeError, match=r"'steps' of shape .* cannot be sharded"):
        plan_merge(recipe, mesh=mesh, rules={"steps": P("x")})


def test_time_follows_the_rates(runs, unread):
    recipe = recipe_for(runs, "average")
    machine = MACHINES["cpu"]
    slow = plan_merge(recipe, machine=machine._replace(read=1e3)).totals
    assert slow.seconds.read == slow.inputs / 1e3
    two = plan_merge(recipe, mesh={"x": 4}, hosts=2, machine=machine).totals
    one = plan_merge(recipe, mesh={"x": 4}, machine=machine).totals
    assert two.seconds.write == one.seconds.write / 2


def test_all_errors_at_once(runs, tmp_path):
    tree = make_tree(5)
    tree["embed.weight"] = tree["embed.weight"][:90]
    save(tmp_path / "odd", tree)
    models = {"math": runs / "math", "odd": tmp_path / "odd"}
    options = {"density": {".*up.*": 2.0, ".*": 0.5}, "scale": {".*norm.*": 1.0}}
    recipe = Recipe("ties", models, base=runs / "base", options=options)
    with pytest.raises(MergeError) as caught:
        plan_merge(recipe, out=tmp_path)
    message = str(caught.value)
    assert f"{tmp_path} exists already" in message
    assert "of different shapes" in message
    assert "density of leaf 'layers.0.up.weight' is 2" in message
    assert re.search("scale of leaf '.*up.weight': no rule matches", message)


def test_inputs_that_are_missing_are_all_named(runs, tmp_path):
    models = {name: tmp_path / name for name in ("law", "art")}
    with pytest.raises(MergeError, match=r"law does not exist(.|\n)*art does not"):
        plan_merge(Recipe("average", models))


def test_a_full_disk(runs, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 5})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(MergeError, match="has only 5 free"):
        plan_merge(recipe_for(runs, "average"), out=tmp_path / "out")


def test_methods_that_hold_the_model_need_the_memory(runs):
    recipe = recipe_for(runs, "tatr", options={"scope": "model"})
    with pytest.raises(MergeError, match="needs all leaves of all models in memory"):
        plan_merge(recipe, memory=1000)


def test_hosts_share_the_devices(runs):
    with pytest.raises(MergeError, match="cannot be spread over 3 hosts"):
        plan_merge(recipe_for(runs, "average"), mesh={"x": 4}, hosts=3)


@pytest.fixture
def recipe_file(runs, tmp_path):
    def write(**changes):
        recipe = {
            "method": "ties",
            "base": str(runs / "base"),
            "models": [str(runs / name) for name in NAMES],
            "options": {"density": 0.3},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes))
        return str(path)

    return write


def test_the_command(recipe_file, unread, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "plan.json"
    words = ["plan", recipe_file(), "--mesh", "data=2,model=4", "--hosts", "2"]
    assert main([*words, "--machine", "v5e", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"layers\.\*\.up\.weight +2 +64x16 +float32 +merged", printed)
    assert re.search(r"^Options of all merged leaves: density \S*0.3", printed, re.M)
    assert "Options " not in printed.splitlines()[0]
    assert "ties of 2 models on 8 devices of 2 hosts." in printed
    assert "An estimate of the time" in printed
    content = json.loads(out.read_text())
    assert content["plan"]["devices"] == 8
    assert content["plan"]["totals"]["written"] > 0
    assert content["machine"]["memory"] == MACHINES["v5e"].memory


def test_the_command_fails_with_all_errors(recipe_file, tmp_path, capsys):
    path = recipe_file(options={"density": 7, "scale": 1.0}, seed=3)
    assert main(["plan", path]) == 1
    assert "seed has no effect" in capsys.readouterr().err
    path = recipe_file(options={"density": 7})
    assert main(["plan", path, "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "exists already" in message
    assert "density" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "8"], "is no axis such as data=2"),
        (["--shard", ".*=data"], "--shard needs a --mesh"),
        (["--machine", "v5"], "unknown machine 'v5'; did you mean 'v5e'?"),
        (["--rates", "read=fast"], "write a rate such as read=2GB/s"),
        (["--memory", "much"], "write a size such as 5GB"),
    ],
)
def test_words_that_mean_nothing(recipe_file, capsys, words, message):
    assert main(["plan", recipe_file(), *words]) == 1
    assert message in capsys.readouterr().err
