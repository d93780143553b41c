"""Directives that show what the registry of methods says, so that no page goes stale.

`methods-table` lists all methods; `method-facts` says what one of them needs. The table
refers to a label `method-NAME` for each: a registered method without a section of its
own is a warning, and so an error.
"""

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from jaxmerge.registry import Method, methods


class _Markdown(SphinxDirective):
    """A directive that writes Markdown."""

    def parsed(self, lines: list[str]) -> list[nodes.Node]:
        parent = nodes.container()
        self.state.nested_parse(StringList(lines, self.get_location()), 0, parent)
        return parent.children


class MethodsTable(_Markdown):
    """All registered methods, with what each needs beside the models."""

    def run(self) -> list[nodes.Node]:
        rows = [
            f"| {{ref}}`{m.name} <method-{m.name}>` | {m.summary} | "
            f"{', '.join(_needs(m)) or 'nothing'} | [{m.paper}]({m.link}) |"
            for m in methods().values()
        ]
        head = ["| method | what it does | needs beside models | paper |"]
        return self.parsed([*head, "|---|---|---|---|", *rows])


class MethodFacts(_Markdown):
    """What one registered method needs, takes and promises."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        method = methods().get(self.arguments[0])
        if method is None:
            raise self.error(f"no registered method {self.arguments[0]!r}")
        return self.parsed(
            [
                f"- **Paper:** [{method.paper}]({method.link})",
                f"- **Needs:** {', '.join(['models', *_needs(method)])}",
                f"- **Options:** {_options(method)}; {{func}}`jaxmerge.{method.name}` "
                "says what they mean",
                f"- **Promises:** {'; '.join(_promises(method))}",
            ]
        )


def _needs(method: Method) -> list[str]:
    needs = {
        "their base": method.needs_base,
        "statistics": method.needs_statistics,
        "a random key": method.needs_key,
    }
    return [name for name, needed in needs.items() if needed]


def _options(method: Method) -> str:
    shown = [
        f"`{name}`" if option.required else f"`{name}={option.default!r}`"
        for name, option in method.parameters.items()
    ]
    return ", ".join(shown)


def _promises(method: Method) -> list[str]:
    if method.identity is None:
        alone = "a single model changes too"
    elif method.identity:
        at = ", ".join(f"`{name}={x!r}`" for name, x in method.identity.items())
        alone = f"a single model comes back as it is at {at}"
    else:
        alone = "a single model comes back as it is"
    promises = [alone]
    if method.max_models == 1:
        promises.append("takes one model beside the base")
    elif method.max_models is not None:
        promises.append(f"takes at most {method.max_models} models")
    if method.symmetric and method.max_models != 1:
        promises.append("the order of the models does not matter")
    if method.gathers:
        promises.append("on a mesh, rows or whole matrices come together")
    else:
        promises.append("on a mesh, no leaf is gathered")
    return promises


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("methods-table", MethodsTable)
    app.add_directive("method-facts", MethodFacts)
    return {"parallel_read_safe": True}
