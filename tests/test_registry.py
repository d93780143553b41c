import inspect

import numpy as np
from task_statistics import statistics_of

from jaxmerge import registry
from jaxmerge.registry import methods


def test_methods_describe_themselves():
    ties = methods()["ties"]
    assert ties.needs_base
    assert not ties.needs_key
    assert not ties.needs_statistics
    assert ties.scopes == ("leaf", "model")
    assert ties.file == "jaxmerge/methods/trimming.py"
    density = ties.parameters["density"]
    assert density.default == 0.2
    assert density.description.startswith("the share of entries kept, in (0, 1]")
    assert methods()["dare"].parameters["key"].required
    assert methods()["slerp"].max_models == 2
    assert not methods()["slerp"].needs_base


def test_descriptions_are_plain_text():
    for method in methods().values():
        for parameter in method.parameters.values():
            assert not set(parameter.description) & set("$\\\n")


def test_a_registered_function_stays_itself(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})

    @registry.register(paper="A paper", link="https://example.org", max_models=3)
    def halfway(models, *, t=0.5):
        """Goes half the way."""
        return models, t

    assert inspect.signature(halfway).parameters["t"].default == 0.5
    method = registry._METHODS["halfway"]
    assert (method.summary, method.max_models) == ("Goes half the way.", 3)
    assert method.scopes == ()


def test_methods_get_the_statistics_that_they_need():
    base, models = {"w": np.zeros(2, np.float32)}, [{"w": np.ones(2, np.float32)}] * 2
    statistics = [statistics_of(m, fisher={"w": np.ones(2)}) for m in models]
    for name in ("fisher_average", "gradient_matching"):
        method = methods()[name]
        assert method.needs_statistics
        assert not {"statistics", "base_statistics"} & set(method.options)
        call = method.bind({"weights": [0.5, 0.5]}, 0, ["a", "b"], statistics)
        np.testing.assert_allclose(call(base, models)["w"], 1)
