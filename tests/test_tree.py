import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge import task_vector
from jaxmerge.tree import check_alike, first_match, leaf_paths, named_leaves, rebuild


def test_paths_join_keys_and_indices_with_slashes():
    tree = {"layers": [{"kernel": 1}, {"kernel": 2}], "head": {"bias": 3}}
    assert leaf_paths(tree) == ["head/bias", "layers/0/kernel", "layers/1/kernel"]


def test_paths_of_nnx_state_and_tuples():
    from flax import nnx

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert leaf_paths({"linear": state}) == ["linear/bias", "linear/kernel"]
    assert leaf_paths((1, [2])) == ["0", "1/0"]


def test_two_leaves_with_one_path_are_refused():
    with pytest.raises(ValueError, match="Two leaves have the path 'a/b'"):
        named_leaves({"a/b": 1, "a": {"b": 2}})


def test_rebuild_finds_leaves_by_path_in_any_order():
    like = {"a": 0, "b": [0, 0]}
    assert rebuild(like, {"b/1": 3, "b/0": 2, "a": 1}) == {"a": 1, "b": [2, 3]}


def test_first_rule_that_matches_the_whole_path_wins():
    rules = {"mlp": 1, "mlp/.*": 2, ".*/bias": 3}
    assert first_match(rules, "mlp/bias") == 2
    assert first_match(rules, "attention/bias") == 3
    with pytest.raises(KeyError):
        first_match(rules, "head/kernel")


def test_all_differences_are_listed_at_once():
    base = {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(1)}
    model = {"a": np.zeros((2, 1)), "b": np.zeros(3, int), "d": np.zeros(1)}
    with pytest.raises(ValueError, match="not alike") as caught:
        check_alike(base, [model], names=["base", "models[0]"])
    message = str(caught.value)
    assert "models[0] leaf 'a' has shape (2, 1), base has (2,)" in message
    assert "models[0] leaf 'b' has dtype int64, base has float64" in message
    assert "only base has leaf 'c', models[0] has not" in message
    assert "only models[0] has leaf 'd', base has not" in message


def test_shapes_alone_are_enough_to_compare():
    base = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    check_alike(base, [{"a": np.zeros(2)}], names=["base", "model"])


@pytest.mark.parametrize("dtype", [np.complex64, jnp.float8_e4m3fn])
def test_numbers_that_no_method_can_merge_are_refused(dtype):
    with pytest.raises(ValueError, match=f"base leaf 'a' is {np.dtype(dtype)}, wh"):
        check_alike({"a": np.zeros(1, dtype)}, [], names=["base"])


def test_task_vector_of_bfloat16_keeps_small_updates():
    base = {"w": jnp.ones(4, jnp.bfloat16), "step": jnp.array(3)}
    model = {"w": jnp.full(4, 1.001, jnp.float32), "step": jnp.array(4)}
    delta = task_vector(base, model)
    np.testing.assert_allclose(delta["w"], 0.001, rtol=1e-3)
    assert delta["w"].dtype == jnp.float32
    assert delta["step"].size == 0
