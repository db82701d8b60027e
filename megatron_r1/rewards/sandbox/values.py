"""Values that enter or leave a sandbox, as JSON that holds data and nothing else.

Both sides use this file, which the sandbox sees as sandbox_values, so it imports only the standard library. Inside, a result is
encoded; outside, it is read with `json.loads` alone and compared by `compare.agrees`, which builds no set or dict from it. A class
of the program cannot influence a comparison, since only its data leaves the sandbox.

None, bool, str, float, small int and list stand for themselves; everything else is an object with one key, its kind.
"""

from __future__ import annotations

import numbers
import sys

_PLAIN_INT = 1 << 63  #: larger ones are written as hexadecimal, since decimal text takes quadratic time to read
_MAX_NODES = 1_000_000  #: of a linked list or tree that may be a ring


def encode_value(value):
    """The JSON form of a value. An object of an unknown class becomes its type's name, which equals nothing."""
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, numbers.Integral):
        number = int(value)
        return number if -_PLAIN_INT < number < _PLAIN_INT else {"int": hex(number)}
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode_value(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode_value(key), encode_value(item)] for key, item in value.items()]}
    if isinstance(value, (set, frozenset)):
        return {"set": [encode_value(item) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    # Not imported here: a program whose result is one of these has imported its module.
    fractions, decimal = sys.modules.get("fractions"), sys.modules.get("decimal")
    if fractions and isinstance(value, fractions.Fraction):
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    if decimal and isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if type(value).__name__ == "ListNode":
        return {"linked_list": [encode_value(item) for item in _linked_list_values(value)]}
    if type(value).__name__ == "TreeNode":
        return {"binary_tree": [encode_value(item) for item in _level_order(value)]}
    return {"object": type(value).__name__}


def decode_value(encoded):
    """The value of a JSON form, for use inside a sandbox only: it builds sets and dicts from foreign keys."""
    if isinstance(encoded, list):
        return [decode_value(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "int":
        return int(content, 16)
    if kind == "tuple":
        return tuple(decode_value(item) for item in content)
    if kind == "dict":
        return {decode_value(key): decode_value(item) for key, item in content}
    if kind == "set":
        return {_frozen(decode_value(item)) for item in content}
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "fraction":
        return __import__("fractions").Fraction(*(int(part, 16) for part in content))
    if kind == "decimal":
        return __import__("decimal").Decimal(content)
    raise TypeError(f"a check cannot take a {kind}")


def _frozen(item):
    return frozenset(item) if isinstance(item, set) else item


def _linked_list_values(node):
    values = []
    while node is not None:
        if len(values) == _MAX_NODES:
            raise ValueError("the linked list does not end")
        values.append(node.val)
        node = node.next
    return values


def _level_order(root):
    """LeetCode's form: level by level, None for a missing child, nothing below it, no trailing None."""
    values, row = [], [root]
    while row:
        following = []
        for node in row:
            if len(values) >= _MAX_NODES:
                raise ValueError("the tree does not end")
            values.append(None if node is None else node.val)
            if node is not None:
                following += [node.left, node.right]
        row = following
    while values and values[-1] is None:
        values.pop()
    return values
