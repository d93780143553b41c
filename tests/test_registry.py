import inspect

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
