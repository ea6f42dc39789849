"""What all sections of the configuration have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what would be right."""


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys, and `true` or "8" for a number, are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def _named(path: Any) -> Any:
    if isinstance(path, str) and (not path or "\0" in path):
        raise ValueError("must name a file or folder")
    return path


FROM_JSON = Field(strict=False)  #: texts become paths, lists tuples; their items stay strict
Place = Annotated[Path, FROM_JSON, BeforeValidator(_named)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[tuple[float, float], FROM_JSON]
Decays = Annotated[tuple[Fraction, Fraction], FROM_JSON]
Triple = Annotated[tuple[int, int, int], FROM_JSON]
