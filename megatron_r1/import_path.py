"""A user's own function, named in the settings as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from megatron_r1.errors import ConfigError


def is_import_path(name: str) -> bool:
    """Whether a setting names a function to import, and not one of ours."""
    return ":" in name


def import_function(
    path: str, key: str, arguments: tuple[str, ...], named: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Import the function and check that it can be called.

    Args:
        path: "package.module:function". Python must find the module: it is installed, or its folder is on PYTHONPATH.
        key: the setting that holds the path, for the error.
        arguments: names of the arguments that the function is called with, by position.
        named: arguments that the function is called with by name.
        optional: further ones by name, for a function that has parameters of these names.

    Raises:
        ConfigError: the path is malformed, the module cannot be imported, it holds no such function, or the function does not
            take these arguments.
    """
    module_name, _, name = path.partition(":")
    if not (all(part.isidentifier() for part in module_name.split(".")) and name.isidentifier()):
        raise ConfigError(f"{key}={path} is no import path: write package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001 - the module is a user's and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{key}={path}: {module_name} cannot be imported ({reason}): correct the path, or put the module's folder on PYTHONPATH"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}={path}: {module_name} holds no function {name}: correct the name")
    try:
        signature = inspect.signature(function)
        named += tuple(argument for argument in optional if argument in signature.parameters)
        signature.bind(*arguments, **dict.fromkeys(named))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}={path} is called as {name}({', '.join((*arguments, *(f'{a}=...' for a in named)))}), "
            f"which its signature does not allow ({error}): change it"
        ) from None
    return function
