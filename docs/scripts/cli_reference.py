"""The options of the command line as a page, from its parser."""

import inspect
import re
from argparse import Action
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from smartbatch_lightning.cli import _WITHOUT_MODEL, SmartBatchCLI
from smartbatch_lightning.parser import Parser
from smartbatch_lightning.trainer import SmartBatchTrainer

_INTRODUCTION = """# Command line

`smartbatch COMMAND [options]`. Options are flags, or keys of YAML files that `--config` names; later ones replace
earlier ones, and `--print_config` prints all of them. Lists and dictionaries are written as in YAML:
`--data.text_columns='[premise, hypothesis]'`. This page is made from the parser itself.

| command | |
| --- | --- |
"""
_SECTIONS = {
    "data": "Data and batches: `--data`",
    "model": "Model, optimizer, loss, metrics: `--model`",
    "checkpoint": "Which weights are kept: `--checkpoint`",
    "early_stopping": "Early stopping: `--early_stopping`",
    "predictions": "Predictions: `--predictions`",
    "evaluation": "Evaluation: `--evaluation`",
    "export_model": "Export at the end of `fit`: `--export_model`",
    "memory_check": "Memory: `--memory_check`",
    "stop_on_signal": "Signals: `--stop_on_signal`",
    "trainer": "Lightning's Trainer: `--trainer`",
}


class _ParsedError(Exception):
    """Ends the command line when its parser is complete."""


class _ParserOnly(SmartBatchCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _ParsedError(self._subcommand_parsers)


def cli_reference() -> str:
    """The page: commands, the options that they share by section, and what a command has besides."""
    try:
        _ParserOnly(args=[])
    except _ParsedError as parsed:
        [parsers] = parsed.args
    by_section: dict[str, list[Action]] = {name: [] for name in _SECTIONS}
    for option in parsers["fit"].options().values():
        if "." in option.dest:
            by_section.setdefault(option.dest.split(".")[0], []).append(option)
    text = _INTRODUCTION
    for command in parsers:
        text += f"| [`{command}`](#{command}) | {_first_sentence(getattr(SmartBatchTrainer, command))} |\n"
    for command, function in (alone := _commands_without_model()).items():
        text += f"| [`{command}`](#{_anchor(command)}) | {_first_sentence(function)} |\n"
    for name, options in by_section.items():
        if options:
            text += f"\n## {_SECTIONS.get(name, name)}\n\n" + _list(options)
    for command, parser in parsers.items():
        own = [option for name, option in parser.options().items() if "." not in name]
        text += f"\n## `{command}` {{#{command}}}\n\nThe options above, and\n\n" + _list(own)
    for command, function in alone.items():
        parser = Parser()
        parser.add_function_arguments(function)
        text += f"\n## `{command}` {{#{_anchor(command)}}}\n\nHas these options alone:\n\n" + _list(
            parser.options().values()
        )
    return text


def _commands_without_model() -> dict[str, Callable[..., None]]:
    """Functions by command, such as `evaluate` and `cache list`."""
    found = {}
    for name, given in _WITHOUT_MODEL.items():
        functions = given if isinstance(given, dict) else {"": given}
        found.update({f"{name} {function}".strip(): one for function, one in functions.items()})
    return found


def _anchor(command: str) -> str:
    return command.replace(" ", "-")


def _list(options: Iterable[Action]) -> str:
    """A list rather than a table, which narrow screens would cut off."""
    return "".join(
        f"- `{_name(option)}`{_default(option.default)}: {_one_line(option.help or '')}\n" for option in options
    )


def _name(option: Action) -> str:
    return next(name for name in option.option_strings if name.startswith("--"))


def _default(value: Any) -> str:
    return "" if value is None else f" (default `{str(value).lower() if isinstance(value, bool) else value}`)"


def _one_line(text: str) -> str:
    """One line of Markdown, with the roles of reStructuredText in Lightning's docstrings taken out."""
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", text).replace("``", "`")
    return re.sub(r"\s+", " ", text).strip()


def _first_sentence(of: Any) -> str:
    return re.split(r"(?<=\.)\s", _one_line(inspect.getdoc(of) or ""))[0]
