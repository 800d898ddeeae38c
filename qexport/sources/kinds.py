"""The kind of a graph input by its name and type."""

_BY_NAME = {"mask": "mask", "token_type": "token_types", "segment": "token_types", "position": "position_ids"}


def kind_of(name: str, dtype: str) -> str:
    """One of token_ids, mask, token_types, position_ids, continuous, boolean, integer: see `InputSpec`."""
    if dtype == "bool":
        return "boolean"
    if not dtype.startswith(("int", "uint")):
        return "mask" if "mask" in name.lower() else "continuous"
    for part, kind in _BY_NAME.items():
        if part in name.lower():
            return kind
    return "token_ids" if "ids" in name.lower() or "token" in name.lower() else "integer"
