"""How a check uses a candidate that runs in another sandbox: what crosses are arguments, results, exceptions and changed arguments.

Both sandboxes see this file as sandbox_remote; it imports only the standard library and values.py. In the check's sandbox a call is
sent out as a list of steps and its answer read. In the program's sandbox the steps are carried out, in a fresh process every time.
A result that is no data (an object, a generator, a function) stays there: the check gets a `Remote`, and whatever the check does
with it is the next step, sent after all those before it, which are carried out again.

A program controls only data: a `Remote` compares with nothing and is neither true nor false, and a program changes a list, dict or
set of the check's only if it returns None, as functions do that work in place, and the check does nothing with the result. Else
`candidate(x) == reference(x)` could be forged by changing x.
"""

from __future__ import annotations

import builtins

import sandbox_values

ROOT = -1  #: target of a step: the candidate itself
_MAX_ITEMS = 1_000_000  #: of something that a check goes through
_MAX_MESSAGE = 1000
_KEPT = ("call", "next", "list")  #: steps that may change what later ones find


def carry_out(candidate, steps):
    """In the program's sandbox: the answer to the last step.

    Args:
        steps: [operation, index of the step whose result it is applied to or `ROOT`, what it needs].

    Returns:
        {"value": encoded, "arguments": as encoded after the call if it changed them and gave None, else None} or
        {"raised": [names of the exception's class and its bases, message]}.
    """
    results = []
    for operation, target, content in steps:
        subject = candidate if target == ROOT else results[target]
        arguments = None
        try:
            if operation == "call":
                arguments = [sandbox_values.decode_value(part) for part in content]
                results.append(subject(*arguments[0], **arguments[1]))
            else:
                results.append(_OPERATIONS[operation](subject, content))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001
            results.append(None)
            if len(results) == len(steps):
                return {"raised": describe_exception(error)}
    changed = None
    if arguments is not None and results[-1] is None:
        changed = [sandbox_values.encode_value(part) for part in arguments]
    return {"value": sandbox_values.encode_value(results[-1]), "arguments": changed if changed != steps[-1][2] else None}


def describe_exception(error):
    """[names of its class and the bases, message], both cut to a bound."""
    names = [cls.__name__[:100] for cls in type(error).__mro__[:20]]
    try:
        return [names, str.__str__(str(error))[:_MAX_MESSAGE]]
    except Exception:  # noqa: BLE001 - the program's own __str__
        return [names, ""]


def _items(subject, _):
    items = []
    for item in subject:
        if len(items) == _MAX_ITEMS:
            raise ValueError("it does not end")
        items.append(item)
    return items


_OPERATIONS = {
    "attribute": getattr,
    "item": lambda subject, key: subject[sandbox_values.decode_value(key)],
    "list": _items,
    "next": lambda subject, _: next(subject),
    "len": lambda subject, _: len(subject),
    "str": lambda subject, _: str(subject),
    "repr": lambda subject, _: repr(subject),
}


class StepLog:
    """In the check's sandbox: the steps so far of one object of the program's, which all that comes of it share."""

    def __init__(self, ask):
        """Args: `ask` sends steps and gives the answer as `carry_out` returns it."""
        self._ask, self._steps = ask, []

    def take(self, operation, target, content, given=None):
        """Take a step; the result as data or as a `Remote`. Raises what the program raised.

        Args:
            given: arguments of a call that may change them.
        """
        steps = [*self._steps, [operation, target, content]]
        answer = self._ask(steps)
        if operation in _KEPT:
            self._steps = steps
        if "raised" in answer:
            raised = _as_exception(*answer["raised"])
            if operation != "next" and isinstance(raised, (StopIteration, StopAsyncIteration)):
                # It would end a loop of the check's: `all(map(candidate, cases))` were true.
                raised = RuntimeError(f"the program raised {type(raised).__name__}")
            raise raised
        if given is not None and answer["value"] is None and answer["arguments"] is not None:
            _change(given, [sandbox_values.decode_value(part) for part in answer["arguments"]])
        try:
            return sandbox_values.decode_value(answer["value"])
        except (TypeError, ValueError):  # no data
            self._steps = steps
            return Remote(self, len(steps) - 1)


def make_candidate(ask):
    """The function that a check calls; its `in_place` may change the arguments."""

    def candidate(*positional, **named):
        return StepLog(ask).take("call", ROOT, _encoded(positional, named))

    def in_place(*positional, **named):
        return StepLog(ask).take("call", ROOT, _encoded(positional, named), [list(positional), named])

    candidate.in_place = in_place
    return candidate


def _encoded(positional, named):
    return [sandbox_values.encode_value(list(positional)), sandbox_values.encode_value(named)]


class Remote:
    """A result that stayed in the program's sandbox."""

    __hash__ = None

    def __init__(self, log, index):
        self.__dict__["_r1"] = (log, index)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._r1_take("attribute", name)

    def __call__(self, *positional, **named):
        log, index = self.__dict__["_r1"]
        return log.take("call", index, _encoded(positional, named))

    def __getitem__(self, key):
        if not isinstance(key, (int, str, tuple)):
            raise TypeError("a check can index an object of the program's with a number, a text or a tuple only")
        return self._r1_take("item", sandbox_values.encode_value(key))

    def __iter__(self):
        items = self._r1_take("list", None)
        return (items[index] for index in range(len(items)))

    def __next__(self):
        return self._r1_take("next", None)

    def __len__(self):
        return self._r1_take("len", None)

    def __str__(self):
        return self._r1_take("str", None)

    def __repr__(self):
        return self._r1_take("repr", None)

    def __setattr__(self, name, value):
        raise TypeError("a check cannot set an attribute of an object of the program's")

    def _r1_take(self, operation, content):
        log, index = self.__dict__["_r1"]
        return log.take(operation, index, content)

    def _r1_refuse(self, *_):
        raise TypeError("a check can compare data only, not an object of the program's")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _r1_refuse


def _as_exception(names, message):
    """The nearest class of Python's own that the program's exception has."""
    for name in names:
        found = getattr(builtins, name, None)
        if isinstance(found, type) and issubclass(found, Exception):
            try:
                return found(message)
            except TypeError:  # it takes further arguments
                continue
    return Exception(message)


def _change(old, new):
    """Give the lists, dicts and sets of one level of `old` the content that those at their place in `new` have."""
    (positional, named), (new_positional, new_named) = old, new
    for before, after in [*zip(positional, new_positional), *((named[key], new_named[key]) for key in named)]:
        _fill(before, after)


def _fill(before, after):
    """Make `before` equal to `after`, and every list within it that stays at its place, too, without replacing it."""
    if type(before) is not type(after):
        return
    if isinstance(before, list):
        for index, item in enumerate(after[: len(before)]):
            if isinstance(item, (list, dict, set)) and type(before[index]) is type(item):
                _fill(before[index], item)
                after[index] = before[index]
        before[:] = after
    elif isinstance(before, (dict, set)):
        before.clear()
        before.update(after)
