"""What is wrong with a configuration, in the words of its JSON."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from vimnas_ds.config.section import Section
from vimnas_ds.config.vimnas import VimnasSection


def nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, [str(k) for k in known], n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(sorted(known))}"


#: pydantic's kinds of error that speak of Python, in words of JSON
_JSON_WORDS = {
    "path_type": "must be a path, in quotes",
    "string_type": "must be a text, in quotes",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}


def explain(error: ValidationError, at: tuple[int | str, ...] = ()) -> str:
    """pydantic's findings about the section `at`, one line each, with the nearest valid key for
    unknown ones."""
    lines = []
    for item in error.errors():
        location = (*at, *item["loc"])
        path = ".".join(["vimnas", *map(str, location)])
        if item["type"] == "extra_forbidden":
            fields = _fields_at(location[:-1])
            lines.append(f'unknown key "{path}"{nearest(str(location[-1]), fields)}')
        elif item["type"] == "missing" and isinstance(location[-1], int):
            short = path.rpartition(".")[0]
            lines.append(f"{short}: value {location[-1] + 1} is missing (got {item['input']!r})")
        elif item["type"] == "missing":
            lines.append(f'missing key "{path}"')
        else:
            message = _JSON_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
            given = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            lines.append(f"{path}: {message}{given}")
    return "\n".join(lines)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = VimnasSection
    for part in location:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = _section_type(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_type(annotation: Any) -> Any:
    """The Section inside dict[str, S], S | None, tuple[S, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_type(inner)
        if found:
            return found
    return None
