"""Tests of LiveCodeBench as its files hold them: public ones as JSON, private ones as JSON or packed."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any, NoReturn

from megatron_r1.data.record_files import take_text
from megatron_r1.errors import DataError

_MAX_BYTES = 1 << 30  # unpacked


class _TextUnpickler(pickle.Unpickler):
    """Reads a pickled text and nothing else: the packed tests are the pickle of a JSON text."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, tests are text")


def contest_day(record: dict[str, Any], where: str) -> str:
    """The day of a problem's contest as YYYY-MM-DD."""
    date = record.get("contest_date")
    text = date.isoformat() if hasattr(date, "isoformat") else take_text(record, "contest_date", where)  # Parquet has dates
    return text[:10]


def contest_tests(record: dict[str, Any], where: str) -> dict[str, Any]:
    """All tests of a problem in the form of `rewards.code.forms`.

    Raises:
        DataError: a field that is missing or cannot be read.
    """
    tests = _read_tests(record, "public_test_cases", where) + _read_tests(record, "private_test_cases", where)
    if not tests:
        raise DataError(f"{where}: fields 'public_test_cases' and 'private_test_cases' hold no test")
    inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
    kinds = {test.get("testtype") == "functional" for test in tests}
    if len(kinds) > 1:
        raise DataError(f"{where}: some tests call a function and some run a program ('testtype'): a problem has one kind")
    if kinds == {False}:
        return {"inputs": inputs, "outputs": outputs}
    try:
        function = json.loads(take_text(record, "metadata", where))["func_name"]
        arguments = [[json.loads(line) for line in text.split("\n") if line.strip()] for text in inputs]
        values = [json.loads(text) for text in outputs]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: the tests call a function, and it or its values cannot be read ({error})") from error
    return {"inputs": arguments, "outputs": values, "fn_name": function, "exact": True}


def _read_tests(record: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    text = record.get(field)
    if not isinstance(text, str):  # not by `take_text`, which looks at every character: some tests are tens of megabytes
        raise DataError(f"{where}: field {field!r} is missing or not text")
    try:
        tests = json.loads(text if text.startswith("[") else _unpack(text))
    except (ValueError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, RecursionError) as error:
        raise DataError(f"{where}: field {field!r} cannot be read ({str(error)[:200]})") from error
    is_list = isinstance(tests, list) and all(isinstance(test, dict) for test in tests)
    if not is_list or not all(isinstance(test.get(name), str) for test in tests for name in ("input", "output")):
        raise DataError(f"{where}: field {field!r} is no list of tests with 'input' and 'output'")
    return tests


def _unpack(text: str) -> str:
    packed = zlib.decompressobj()
    content = packed.decompress(base64.b64decode(text, validate=True), _MAX_BYTES)
    if packed.unconsumed_tail:
        raise ValueError(f"more than {_MAX_BYTES >> 30} GiB")
    tests = _TextUnpickler(io.BytesIO(content)).load()
    if not isinstance(tests, str):
        raise pickle.UnpicklingError(f"a pickled {type(tests).__name__}, expected text")
    return tests
