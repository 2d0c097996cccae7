"""Tests of records: what is of a form is read, everything else is one clause; and only one module reads JSON."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from pydantic import Json

from ldm.records import (
    BadRecord,
    Count,
    Line,
    Prose,
    Record,
    is_record,
    load_json,
    load_record,
    parse_json,
    read_record,
)
from ldm.util import UserError

OWN_JSON = {"scripts/retrieval/answer.py",    # entries of a stream of unknown length, halves of letters and all
            "ldm/saving.py",                  # the header it has just written
            "scripts/benchmarks/cases.py"}         # what its own child printed


class Thing(Record):
    """A form with everything a form may have."""

    name: Line
    text: Prose = ""
    count: Count = 0
    share: float = 0.5
    inner: Json[list[int]] = []


@pytest.mark.parametrize(("content", "fault"), [
    ("{}", "'name' is missing"), ("[]", "should be an object"), ('"a"', "should be an object"),
    ("", "EOF"), ("{", "EOF"), ("[" * 100_000, "recursion limit"), ("9" * 10_000, "number out of range"),
    ('{"name": 7}', "'name' should be a valid string"), ('{"name": "a\\u001b[2J"}', "'name' is too long or holds"),
    ('{"name": "a\\nb"}', "'name' is too long or holds"), ('{"name": "\\ud83d"}', "hex escape"),
    (json.dumps({"name": "a" * 10_001}), "'name' is too long"),
    ('{"name": "a", "text": "\\u0000"}', "'text' is too long"),
    ('{"name": "a", "count": -5}', "'count' should be greater than or equal to 0"),
    ('{"name": "a", "count": 1e3}', "'count' should be a valid integer"),
    ('{"name": "a", "count": "3"}', "'count' should be a valid integer"),
    ('{"name": "a", "count": true}', "'count' should be a valid integer"),
    ('{"name": "a", "count": 99999999999999999999}', "'count' should be less than"),
    ('{"name": "a", "share": NaN}', "'share' should be a finite number"),
    ('{"name": "a", "share": 1e999}', "'share' should be a finite number"),
    ('{"name": "a", "inner": "[1, x]"}', "'inner' Invalid JSON"),
    ('{"name": "a", "inner": "[[1]]"}', "'inner.0' should"),
    (b"\xff\xfe", "expected value"), ({"name": b"a"}, "'name' should be a valid string"),
    ({7: 8}, "'name' is missing")])
def test_what_is_of_another_form_is_told_in_a_clause(content: object, fault: str) -> None:
    with pytest.raises(BadRecord) as refused:
        read_record(Thing, content)
    assert fault.lower() in str(refused.value).lower() and len(str(refused.value)) < 120, refused.value


def test_what_is_of_a_form_is_read_and_further_entries_are_passed_over() -> None:
    table = {"name": "caf\u00e9 \U0001f431", "text": "one\ntwo\t", "count": 2 ** 63 - 1, "share": 1, "inner": "[1, 2]"}
    for content in (table, table | {"further": {"deep": [1]}}, json.dumps(table), json.dumps(table).encode()):
        found = read_record(Thing, content)
        assert found.model_dump() == table | {"inner": [1, 2]}


def test_files_of_records_are_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"name": "a"}', encoding="utf-8-sig")
    assert load_record(Thing, path, "thing", "make it again").name == "a" and is_record(Thing, path)
    assert load_json(path, "thing") == {"name": "a"}
    path.write_text('{"name": 7}')
    with pytest.raises(UserError, match=r"^thing '.*' is damaged \('name' should be a valid string\); make it again.$"):
        load_record(Thing, path, "thing", "make it again")
    assert not is_record(Thing, path) and not is_record(Thing, tmp_path / "absent.json")
    path.write_text("{")
    with pytest.raises(UserError, match=r"^thing '.*a.json' is no JSON \(EOF .*\); correct it.$"):
        load_json(path, "thing")


@pytest.mark.parametrize("text", ['"\\ud800"', '"\ud800"', "[" * 1000, "1" * 5000, "{'a': 1}", "", b"\xff"])
def test_json_is_bounded_and_text(text: str | bytes) -> None:
    with pytest.raises(BadRecord):
        parse_json(text)


def test_no_other_module_reads_json() -> None:
    readers = {str(path.relative_to(ROOT)) for folder in ("ldm", "scripts") for path in (ROOT / folder).rglob("*.py")
               if re.search(r"json\.loads?\(|from_json\(", path.read_text("utf-8"))}
    stages = {name for name in readers if name.startswith("scripts/pretrain/")}      # read back what they wrote
    assert readers - stages == OWN_JSON | {"ldm/records.py"}
