"""Looking things up by name: an entry of an open registry, a user's own object by its import path, or an argument."""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import TypeVar

from smartbatch_lightning.errors import UsageError, join_quoted

_Entry = TypeVar("_Entry")


def look_up(name: str, registry: Mapping[str, _Entry], argument: str) -> _Entry:
    """Returns an entry by its name, or imports it by its path.

    Args:
        name: A key of the registry, or an import path such as `ours.by_topic`.
        registry: The entries by name.
        argument: The name of the argument, for the message.

    Raises:
        ValueError: There is no such name, or nothing to import at the path.
    """
    if name in registry:
        return registry[name]
    module, dot, attribute = str(name).rpartition(".")
    if not dot:
        raise UsageError(
            f"{argument} is {name!r}; choose one of {join_quoted(registry)}, or give an import path such as "
            "package.module.name."
        )
    try:
        entry: _Entry = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        names = f", or choose one of {join_quoted(registry)}" if registry else ""
        raise UsageError(
            f"{argument} is {name!r}, which cannot be imported: {error}. Check the path{names}."
        ) from error
    return entry


def takes_argument(of: type, name: str) -> bool:
    """Whether the constructor of a class takes an argument, or any."""
    parameters = inspect.signature(of).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
