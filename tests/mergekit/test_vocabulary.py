"""Tokenizers that differ: which tokens the output has, and their embeddings."""

import json

import cases
import numpy as np
import pytest
from cases import carried_out

from jaxmerge.checkpoints import CheckpointError
from jaxmerge.mergekit import embeddings, parse_mergekit
from jaxmerge.mergekit.embeddings import Remapped, Rows
from jaxmerge.mergekit.resolving import resolve
from jaxmerge.mergekit.tokens import read_tokenizer, united, with_tokens
from jaxmerge.recipe_syntax import RecipeError

EMBEDDINGS = "model.embed_tokens.weight"
WORDS = {
    "base": (["a", "b", "c"], []),
    "x": (["a", "c", "b"], ["<x>", "<xy>"]),
    "y": (["b", "d", "a"], ["<xy>"]),
}


def table(model):
    """Rows that tell the model and the number of the token."""
    rows = sum(map(len, WORDS[model]))
    start = 100 * list(WORDS).index(model)
    return np.float32([[start + i, -start - i] for i in range(rows)])


def row(model, token):
    words, added = WORDS[model]
    return table(model)[[*words, *added].index(token)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for model, (words, added) in WORDS.items():
        leaves = {EMBEDDINGS: table(model), "norm": np.ones(3, np.float32)}
        config = {"vocab_size": len(leaves[EMBEDDINGS])}
        cases.write_model(path / model, leaves, config)
        cases.write_tokenizer(path / model, words, added)
    return path


def plan(directory, tail, method="linear", base=None, names=("x", "y")):
    listed = ", ".join(f"{{model: {name}}}" for name in names)
    text = f"merge_method: {method}\nmodels: [{listed}]\nparameters: {{weight: 1}}\n"
    if base:
        text += f"base_model: {base}\n"
    return resolve(parse_mergekit(text + tail, directory=directory))


def ids(files):
    file = files["tokenizer.json"]
    document = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    return document["model"]["vocab"] | added


def test_union_has_the_tokens_of_the_first_and_then_those_of_others(models):
    first, second = (read_tokenizer(models / name) for name in ("x", "y"))
    both = united(first, [second])
    assert list(both.ids) == ["a", "c", "b", "<x>", "<xy>", "d"]
    assert both.rows == 6
    assert both.added["<xy>"]["special"]
    assert not both.added["d"]["special"]
    assert united(second, [first]).added["<x>"] == {
        "id": 5,
        "content": "<x>",
        "special": True,
    }
    assert with_tokens(first, ["a", "new"]).ids["new"] == 5


def test_embeddings_follow_their_tokens_and_lacking_ones_are_made(models):
    made = plan(models, "tokenizer_source: union\nchat_template: chatml")
    merged = carried_out(made)[EMBEDDINGS]
    numbers = ids(made.sidecars)
    assert merged.shape == (6, 2)
    for token in ("a", "b", "<xy>"):
        mean = (row("x", token) + row("y", token)) / 2
        np.testing.assert_array_equal(merged[numbers[token]], mean)
    # A token of one model alone is that of this model in all.
    np.testing.assert_array_equal(merged[numbers["<x>"]], row("x", "<x>"))
    np.testing.assert_array_equal(merged[numbers["d"]], row("y", "d"))
    np.testing.assert_array_equal(merged[numbers["c"]], row("x", "c"))
    assert json.loads(made.sidecars["config.json"])["vocab_size"] == 6
    settings = json.loads(made.sidecars["tokenizer_config.json"])
    assert settings["eos_token"] == "</s>"
    assert "<|im_start|>" in settings["chat_template"]


def test_what_a_model_lacks_comes_from_the_base_or_is_the_mean(models):
    # <xy> is in both models, but not in the base: mean; c is in base and x: base.
    made = plan(models, "tokenizer_source: union", "task_arithmetic", "base")
    (part,) = made.parts
    numbers = ids(made.sidecars)
    base = part.inputs.base.read(EMBEDDINGS)
    y = part.inputs.models["y"].read(EMBEDDINGS)
    mean = (row("x", "<xy>") + row("y", "<xy>")) / 2
    np.testing.assert_array_equal(base[numbers["<xy>"]], mean)
    np.testing.assert_array_equal(y[numbers["c"]], row("base", "c"))
    np.testing.assert_array_equal(y[numbers["<xy>"]], row("y", "<xy>"))


def test_tokens_may_be_given_by_hand(models):
    made = plan(
        models,
        """
tokenizer:
  source: base
  pad_to_multiple_of: 4
  tokens:
    a: {source: y, force: true}
    d: {source: {kind: model_token, model: x, token_id: 1}}
    new: {source: {kind: model_token, model: x, token: <x>}}
    none: {source: {kind: zero}}
""",
        base="x",
    )
    (part,) = made.parts
    numbers = ids(made.sidecars)
    x, y = (part.inputs.models[name].read(EMBEDDINGS) for name in ("x", "y"))
    assert x.shape == y.shape == (8, 2)
    assert numbers == {
        "a": 0,
        "c": 1,
        "b": 2,
        "<x>": 3,
        "<xy>": 4,
        "d": 5,
        "new": 6,
        "none": 7,
    }
    np.testing.assert_array_equal(x[0], row("y", "a"))
    np.testing.assert_array_equal(x[5], table("x")[1])
    np.testing.assert_array_equal(y[5], row("y", "d"))
    np.testing.assert_array_equal([x[6], y[6]], [row("x", "<x>")] * 2)
    np.testing.assert_array_equal([x[7], y[7]], np.zeros((2, 2)))


GOLDEN = dict(np.load(cases.FOLDER / "vocabulary.npz"))
VOCABULARY = json.loads((cases.FOLDER / "vocabulary.json").read_text())


@pytest.mark.parametrize("case", VOCABULARY["cases"])
def test_embeddings_are_those_of_mergekit(case, tmp_path):
    for model, (words, added) in VOCABULARY["models"].items():
        leaf = GOLDEN[f"inputs/{model}"]
        config = {"vocab_size": len(leaf)}
        cases.write_model(tmp_path / model, {EMBEDDINGS: leaf}, config)
        cases.write_tokenizer(tmp_path / model, words, added)
    golden, want = VOCABULARY["cases"][case], GOLDEN[case]
    made = resolve(parse_mergekit(golden["recipe"], directory=tmp_path))
    merged = carried_out(made)[EMBEDDINGS]
    numbers = ids(made.sidecars)
    # New tokens come in another order there, by a hash.
    assert sorted(numbers) == sorted(golden["tokens"])
    order = [numbers[token] for token in golden["tokens"]]
    order += range(len(order), len(want))
    np.testing.assert_allclose(merged[order], want, rtol=1e-5, atol=1e-6)


def test_padding_is_the_mean_and_parts_are_parts_of_the_whole(models):
    made = plan(models, "tokenizer: {pad_to_multiple_of: 10}")
    view = made.parts[0].inputs.models["x"]
    whole = view.read(EMBEDDINGS)
    assert whole.shape == view.leaves[EMBEDDINGS].shape == (10, 2)
    np.testing.assert_array_equal(whole[6:], [whole[:6].mean(0)] * 4)
    for index in ((slice(2, 9),), (slice(None), slice(1, 2)), (slice(None, None, 3),)):
        np.testing.assert_array_equal(view.read(EMBEDDINGS, index), whole[index])


def test_slices_read_the_rows_they_need_and_padding_the_table_once(monkeypatch):
    monkeypatch.setattr(embeddings, "_BLOCK_BYTES", 24)
    table = np.arange(60, dtype=np.float32).reshape(20, 3)
    order = np.r_[4:14, 19, -1, 2, 3]
    read = []

    def counted(index):
        part = table[index]
        read.append(part.size)
        return part

    how = Remapped(order, {}, 6, table.dtype)
    whole = how.read(table.__getitem__, table, ...)
    np.testing.assert_array_equal(whole[:11], table[order[:11]])
    how = Remapped(order, {}, 6, table.dtype)
    np.testing.assert_array_equal(
        how.read(counted, table, (slice(8, 13),)), whole[8:13]
    )
    assert sum(read) == 4 * 3
    read.clear()
    for start in range(12, 20):
        index = slice(start, start + 1), slice(1)
        np.testing.assert_array_equal(how.read(counted, table, index), whole[index])
    # The table once, of which no row is zero but the one that none gives; two rows.
    assert sum(read) == 13 * 3 + 2
    assert max(read) <= 2 * 3


def test_rows_of_parts_are_those_of_the_whole():
    array = np.arange(12).reshape(6, 2)
    read = array.__getitem__
    rows = Rows(4)
    for index in (..., (slice(1, None),), (slice(3, 9), slice(1)), ()):
        want = array[:4][index]
        np.testing.assert_array_equal(rows.read(read, array, index), want)


def test_means_of_bfloat16_are_taken_in_float32():
    table = np.asarray([[256.0], [1.0], [1.0]], "bfloat16")
    how = Remapped(np.arange(3), {}, 1, table.dtype)
    got = how.read(table.__getitem__, table, ...)
    np.testing.assert_array_equal(got[3], np.asarray([86.0], "bfloat16"))


def test_without_a_tokenizer_embeddings_are_cut(models):
    (part,) = plan(models, "").parts
    assert {m.leaves[EMBEDDINGS].shape for m in part.inputs.models.values()} == {(4, 2)}
    made = plan(models, "", "task_arithmetic", "base", ["x"])
    assert made.parts[0].inputs.models["x"].read(EMBEDDINGS).shape == (3, 2)
    with pytest.raises(RecipeError, match=r"3 rows in .*base, fewer than the 5 of"):
        plan(models, "", "task_arithmetic", "x", ["base"])


def test_files_that_would_contradict_the_tokenizer_are_left_out(models, tmp_path):
    for name in ("x", "y"):
        path = tmp_path / name
        path.mkdir()
        for file in (models / name).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        for file in ("vocab.json", "generation_config.json", "chat_template.jinja"):
            (path / file).write_text("{}")
    files = plan(tmp_path, "tokenizer_source: union").sidecars
    assert "vocab.json" not in files
    assert {"generation_config.json", "chat_template.jinja"} <= files.keys()
    files = plan(tmp_path, "tokenizer_source: y\nchat_template: auto").sidecars
    assert files["vocab.json"] == tmp_path / "y" / "vocab.json"
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{}"
    assert "chat_template.jinja" not in files


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("{tokens: {q: {source: y}}}", "y is to give .* 'q', which it has not got"),
        ("{tokens: {d: {source: base}}}", "base .* 'd', but is not merged here"),
        (
            "{tokens: {d: {source: {kind: model_token, model: x, token_id: 9}}}}",
            "x is to give the embedding of the token 9",
        ),
    ],
)
def test_tokens_that_cannot_be_given(tail, message, models):
    with pytest.raises(CheckpointError, match=message):
        plan(models, f"tokenizer: {tail}")


def test_tokenizers_that_cannot_be_read(models, tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Save it as a fast tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="no tokenizer of the library"):
        read_tokenizer(tmp_path)
    pairs = {"added_tokens": [], "model": {"vocab": [["a", -1.0], ["b", -2.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(pairs))
    assert read_tokenizer(tmp_path).ids == {"a": 0, "b": 1}


def test_a_tokenizer_needs_tokens(root):
    text = (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: inputs/ft2}]\n"
    )
    with pytest.raises(RecipeError, match=r"ft2 has no tokenizer\.json"):
        resolve(parse_mergekit(text + "tokenizer_source: union", directory=root))
