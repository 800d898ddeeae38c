"""docs/api.md, from the signatures and docstrings of the public API: python docs/api.py > docs/api.md"""

import inspect
import re
import textwrap
import types
import typing
from importlib import import_module

# Title, module and its public names; what a function returns is described behind it.
SECTIONS = (
    ("Converting and using bundles", "qexport", None),
    ("Torch modules", "qexport.nn", None),
    ("Noise", "qexport.noise.model", ("NoiseModel", "parse_noise")),
    ("Measured rows", "qexport.noise.measured", ("MeasuredNoise", "measured")),
    (
        "Mitigation",
        "qexport.noise.mitigation",
        (
            *("Mitigation", "ReadoutInversion", "ZeroNoiseExtrapolation", "ErrorCancellation", "RepetitionCode"),
            *("parse_mitigation", "mitigated", "Experiment"),
        ),
    ),
    ("Mitigation side by side", "qexport.noise.comparison", ("compare_mitigation", "MitigationError")),
    ("Rows of attention as circuits", "qexport.hardware", None),
    ("Measured by Qiskit", "qexport.hardware.qiskit", ("QiskitBackend",)),
    ("Measured by PennyLane", "qexport.hardware.pennylane", ("PennyLaneBackend",)),
    ("Memory", "qexport.memory", None),
    ("Recipes", "qexport.recipe", ("Recipe", "LayerRecipe", "make_recipe", "load_recipe")),
    ("Nodes by hand", "qexport.ops.proto", ("make_node", "function_proto", "register_schemas")),
)
# Parts of a docstring that are lists of `name: what it is`.
LISTS = ("Args", "Attributes", "Raises")
WIDTH = 100


def _type(annotation) -> str:
    """An annotation as one would write it, without the validators of Annotated."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _type(typing.get_args(annotation)[0])
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return " | ".join(map(_type, typing.get_args(annotation)))
    if annotation is types.NoneType:
        return "None"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"(?:\w+\.)+(?=\w)", "", text)  # names without their modules


def _signature(name: str, found) -> str:
    """`name(parameters) -> type`, one parameter a line where it is long."""
    signature = inspect.signature(found)
    parameters, kinds = [], [p.kind for p in signature.parameters.values()]
    for p in signature.parameters.values():
        if p.name == "self":
            continue
        if p.kind is p.KEYWORD_ONLY and "*" not in parameters and p.VAR_POSITIONAL not in kinds:
            parameters.append("*")
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        text += "" if p.annotation is p.empty else f": {_type(p.annotation)}"
        if p.default is not p.empty:
            default = "..." if "<" in repr(p.default) else repr(p.default)  # a factory has no literal
            text += f"{'=' if p.annotation is p.empty else ' = '}{default}"
        parameters.append(text)
    result = "" if signature.return_annotation in (signature.empty, None) else f" -> {_type(signature.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {p}," for p in parameters), f"){result}"])


def _paragraph(block: str) -> str:
    return " ".join(textwrap.dedent(block).split())


def _item(text: str) -> str:
    """`names: what they are` as a line of a list."""
    names, _, doc = text.partition(":")
    return f"* {', '.join(f'`{name.strip()}`' for name in names.split(','))}: {_paragraph(doc)}"


def _body(text: str) -> list[str]:
    """A docstring of Google's style as Markdown."""
    lines = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        head, _, rest = block.partition("\n")
        title = head.removesuffix(":")
        if title in (*LISTS, "Returns") and head.endswith(":"):
            rest = textwrap.dedent(rest)
            items = [_item(item) for item in re.split(r"\n(?=\S)", rest)] if title in LISTS else [_paragraph(rest)]
            lines += [f"**{title}**", "", *items, ""]
        elif block.startswith("    "):
            lines += ["```python", textwrap.dedent(block), "```", ""]
        else:
            lines += [_paragraph(block), ""]
    return lines


def _public_methods(found: type):
    """Methods and properties that the class itself defines and describes."""
    for name, value in vars(found).items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, value


def _class(name: str, found: type) -> list[str]:
    if issubclass(found, Exception):
        bases = ", ".join(base.__name__ for base in found.__bases__)
        lines = [f"### {name}({bases})", "", *_body(found.__doc__)]
    else:
        lines = [f"### {name}", "", "```python", _signature(name, found), "```", "", *_body(found.__doc__)]
    if "__init__" in vars(found) and found.__init__.__doc__ and not hasattr(found, "__dataclass_fields__"):
        lines += _body(found.__init__.__doc__)
    for method, value in _public_methods(found):
        if isinstance(value, property):
            lines += [f"#### {name}.{method}", "", *_body(value.fget.__doc__)]
        else:
            bound = getattr(found, method)
            lines += [f"#### {name}.{method}", "", "```python", _signature(method, bound), "```", "", *_body(bound.__doc__)]
    return lines


def _returned(found):
    """The class of this package that a function is annotated to return, or None."""
    result = inspect.signature(found).return_annotation
    return result if inspect.isclass(result) and result.__module__.startswith("qexport") else None


def markdown_page() -> str:
    """docs/api.md."""
    lines = ["# Python API", "", "Made by `python docs/api.py` from the docstrings.", ""]
    seen = set()
    for title, module_name, names in SECTIONS:
        module = import_module(module_name)
        lines += [f"## {title}: `{module_name}`", ""]
        todo = [name for name in names or module.__all__ if not name.startswith("__")]
        for name in todo:
            found = getattr(module, name)
            if name in seen:
                continue
            seen.add(name)
            if inspect.isclass(found):
                lines += _class(name, found)
                continue
            lines += [f"### {name}", "", "```python", _signature(name, found), "```", "", *_body(found.__doc__)]
            result = _returned(found)
            if result is not None and result.__name__ not in (*seen, *todo):
                seen.add(result.__name__)
                lines += _class(result.__name__, result)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown_page(), end="")
