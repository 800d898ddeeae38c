"""The JSON documents that the commands print with --json: making and reading them."""

import json
import math
from contextlib import contextmanager

from qexport.arguments import as_path
from qexport.errors import QexportError

VERSION = 1  # of every schema


def make_document(name: str, content: dict) -> dict:
    """The document qexport.`name` as JSON has it: the keys that say what it is, then `content`, its figures finite."""
    return finite({"schema": f"qexport.{name}", "schema_version": VERSION, **content})


def finite(value):
    """`value` with every float that is NaN or infinite replaced by None, in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def load_document(path) -> dict:
    """The JSON object of a file.

    Raises:
        QexportError: no such file, or not a JSON object.
    """
    path = as_path("report", path)
    try:
        document = json.loads(path.read_bytes())  # in UTF-8, or as PowerShell writes it, in UTF-16
    except OSError as error:
        reason = error.strerror or error
        raise QexportError(f"{path}: cannot be read ({reason}); give what a command printed with --json") from None
    except ValueError:  # of the encoding, too
        raise QexportError(f"{path}: not a JSON document; give what a command printed with --json") from None
    if not isinstance(document, dict):
        raise QexportError(f"{path}: holds no JSON object; give what a command printed with --json")
    return document


def parts_of(document: dict, path) -> dict[str, dict]:
    """The documents in a document by their schema without "qexport.": itself, and those inside it.

    Raises:
        QexportError: none of them has a schema, or its version is a newer one.
    """
    found = {}

    def visit(value: dict) -> None:
        schema = value.get("schema")
        if isinstance(schema, str) and schema.startswith("qexport."):
            if value.get("schema_version") != VERSION:
                raise QexportError(
                    f"{path}: {schema} has schema_version {value.get('schema_version')}, this qexport reads {VERSION}; "
                    "make the file again with this version"
                )
            found.setdefault(schema.removeprefix("qexport."), value)
        for inner in value.values():
            if isinstance(inner, dict):
                visit(inner)

    visit(document)
    if not found:
        raise QexportError(f'{path}: no report of qexport (it has no "schema"); give what a command printed with --json')
    return found


@contextmanager
def well_formed(what: str):
    """Context that reads a document's figures: what is not there, or is something else, becomes one line about `what`.

    Raises:
        QexportError: the document has not the form that docs/json_schema.md describes.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
        raise QexportError(f"{what} {missing}; make the file again") from error
