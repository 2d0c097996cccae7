"""Records: JSON and tables that others may have written, checked against a declared form before anything uses them."""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from ldm.text import read_text
from ldm.util import UserError
from ldm.words import is_line

F = TypeVar("F", bound="Record")


def _line(text: str) -> str:
    if not is_line(text):
        raise PydanticCustomError("line", "Input is too long or holds control characters")
    return text


def _prose(text: str) -> str:
    _line(re.sub(r"[\t\r\n]", " ", text))
    return text


Line = Annotated[str, AfterValidator(_line)]
Prose = Annotated[str, AfterValidator(_prose)]                      # line ends and tabs too
Count = Annotated[int, Field(ge=0, lt=2 ** 63)]


class Record(BaseModel):
    """A form: its fields are of their kinds and nothing else, numbers are finite; further entries are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", arbitrary_types_allowed=True,
                              allow_inf_nan=False)


class BadRecord(ValueError):
    """Why a record is not of its form, worded to stand in brackets: "'step' should be a valid integer"."""


def read_record(form: type[F], content: str | bytes | Mapping[str, Any]) -> F:
    """Reads a record from JSON, or from a table whose values somebody else has read.

    Raises:
        BadRecord: it is none of this form.
    """
    try:
        if isinstance(content, (str, bytes)):
            return form.model_validate_json(content)
        return form.model_validate(content)
    except ValidationError as error:
        raise BadRecord(_first_fault(error)) from None


def _first_fault(error: ValidationError) -> str:
    """Words the first of a record's faults, without what stands there."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"'{place}' is missing"
    message = re.sub(r"^\w+ (?=should|is )", "", fault["msg"])         # "Input should be ...", "String should have ..."
    return f"'{place}' {message}" if place else message


def parse_json(text: str | bytes) -> Any:
    """Reads JSON; depth and digits are bounded, halves of letters are refused.

    Raises:
        BadRecord: it is none.
    """
    try:
        return from_json(text)
    except (TypeError, ValueError) as error:      # TypeError: a text that is not Unicode
        raise BadRecord(str(error)) from None


def load_json(path: Path, what: str) -> Any:
    """Reads a JSON file; `what` it is begins the error's sentence.

    Raises:
        UserError: as `read_text` does, or it is no JSON.
    """
    try:
        return parse_json(read_text(path, what))
    except BadRecord as error:
        raise UserError(f"{what} '{path}' is no JSON ({error}); correct it.") from error


def load_record(form: type[F], path: Path, what: str, remedy: str) -> F:
    """Reads a JSON file of a form; `what` it is begins the error's sentence, and `remedy` ends it.

    Raises:
        UserError: as `read_text` does, or it is none of this form.
    """
    try:
        return read_record(form, read_text(path, what))
    except BadRecord as error:
        raise UserError(f"{what} '{path}' is damaged ({error}); {remedy}.") from error


def is_record(form: type[Record], path: Path) -> bool:
    """Says whether a file is there that holds a record of this form."""
    try:
        load_record(form, path, "file", "")
    except UserError:
        return False
    return True
