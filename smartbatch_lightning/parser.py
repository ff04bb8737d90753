"""The command line's parser: help that fits on a screen, and one-line errors that suggest the nearest option."""

import argparse
import os
import re
import sys
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from smartbatch_lightning.errors import QUOTE_NAMES, did_you_mean, nearest

# jsonargparse's messages for an unknown option, at three levels.
_NOT_ACCEPTED = re.compile(r"(?:Group '(?P<group>.+)' does not accept o|does not accept o|O)ption '(?P<name>[^']+)'")
# jsonargparse's message for a value that has none of several types: the types, why each does not fit, and the value.
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(?P<types>.*?)\]\n"
    r"\s+Errors:\s+- (?P<first>[^\n]*)\n.*?Given value: ",
    re.DOTALL,
)
# Text among the types in a message, and a value that YAML does not read as text, alone or in a list.
_TEXT = re.compile(r"list\[str\]|(?<![\w\[])str\b")
_NAMES_OR_CLASSES = ("--model.lr_scheduler", "--model.init_args.lr_scheduler")
_FIRST = {"data": "dataset", "model": "pretrained"}
_NOT_TEXT = re.compile(r"Got value: (\[.+\]|[\d+-][\w.+-]*|True|False|None|datetime\..*)$")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with the most used options in `--help` and all of them in `--help_all`.

    Args:
        args: Positional arguments of jsonargparse's parser.
        classes: Default class of each key that takes a `class_path`; its options are shown, unlike in jsonargparse.
        most_used: Options to show in `--help`, such as `data.dataset`; all of them if empty.
        more_commands: Commands with their own parser, to list with the others.
        options: Other arguments of jsonargparse's parser.
    """

    def __init__(
        self,
        *args: Any,
        classes: dict[str, type] | None = None,
        most_used: tuple[str, ...] = (),
        more_commands: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(*args, allow_abbrev=False, **options)
        self.classes = classes or {}
        self.most_used = most_used
        self.more_commands = more_commands
        if most_used:
            self.add_argument("--help_all", action=_HelpAll, help="show all options and exit")

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """The parsed arguments, with `~/` expanded to the home folder, which a shell does not do after a `=`."""
        given = sys.argv[1:] if args is None else args
        try:
            return _in_home_folder(super().parse_args(_as_class_paths(given), *others, **options))
        except UnicodeDecodeError as error:
            self.error(f"--config: {error}. Save the file as UTF-8.", error)

    def parse_object(self, *args: Any, **options: Any) -> Any:
        """Like `parse_args`, for a dictionary."""
        return _in_home_folder(super().parse_object(*args, **options))

    def options(self) -> dict[str, argparse.Action]:
        """All options by name, including those of subcommands, without help flags and keys that only group others."""
        found: dict[str, argparse.Action] = {}
        for action in self._actions:
            if isinstance(action.choices, dict):
                for command in action.choices.values():
                    found |= command.options()
            elif action.option_strings and action.default is not argparse.SUPPRESS:
                found[action.dest] = action
        for key, of in self.classes.items():
            parser = Parser()
            parser.add_class_arguments(of, key)
            found |= parser.options()
        return {name: action for name, action in found.items() if not isinstance(action.default, Namespace)}

    def format_help(self, *args: Any) -> str:
        """The text of `--help`."""
        if not self.most_used:
            return super().format_help(*args)
        command = self.prog.replace(" [options]", "")
        keys = " and ".join(f"{command} --{key}.help" for key in self.classes)
        short = argparse.ArgumentParser(
            command,
            "%(prog)s [options]",
            self.description,
            f"These are the options that most runs need. All options: {command} --help_all, and {keys}.",
        )
        options = self.options()
        for name in filter(options.__contains__, self.most_used):
            option = options[name]
            described = " ".join((option.help or "").replace("`", "").split()).partition(". ")[0].rstrip(".")
            default = "" if option.default is None else f" (default: {option.default})"
            metavar = name.rpartition(".")[2].upper()
            short.add_argument(f"--{name}", metavar=metavar, help=(described + default).replace("%", "%%"))
        return short.format_help()

    def format_help_all(self) -> str:
        """The text of `--help_all`."""
        return super().format_help()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with the message in one line, or raises it when parsing a class."""
        super().error(self._one_line(message) if self.exit_on_error else message, ex)

    def _one_line(self, message: str) -> str:
        """The problem in terms of the command line; jsonargparse would list why a value does not fit each type."""
        if command := re.match(r"argument subcommand: invalid choice: '(.*?)' \(choose from (.+)\)", message):
            commands = [*re.findall(r"\w+", command[2]), *self.more_commands]
            meant = did_you_mean(nearest(command[1], commands))
            return f"There is no command {command[1]!r}.{meant} The commands are {', '.join(commands)}."
        if unexpected := re.match(r"Unexpected config: ?([^\n]*)", message):
            what = repr(unexpected[1][:60]) if unexpected[1] else "nothing"
            return f"--config: a config holds groups of options, as in 'data: {{batch_size: 8}}', but here is {what}."
        if missing := re.match(r"the following arguments are required: (.+)", message):
            names = [f"--{name.strip().rpartition('.')[2]}" for name in missing[1].split(",")]
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} required."
        if without := re.match(r"argument --([\w.]+): expected one argument", message):
            option = without[1] if without[1] in self.options() else f"{without[1]}.OPTION"
            return f"an option has no value; write --{option}=VALUE."
        if unrecognized := re.match(r"unrecognized arguments: --([\w.]+)", message):
            return self._unknown(unrecognized[1])
        if alone := re.match("unrecognized arguments: ([^ ]+)", message):
            value = alone[1]
            option = "config=" if value.endswith((".yaml", ".yml")) else "" if value.startswith("-") else "OPTION="
            return f"{value!r} is not an option. Write --{option}{value.lstrip('-')}, and quotes around spaces."
        keys, inner = re.findall(r'Parser key "(.+?)"', message), message.rpartition('Parser key "')[2]
        if unknown := _NOT_ACCEPTED.search(inner):
            return self._unknown(".".join([*keys, *filter(None, unknown.groups())]))
        if not keys:
            return " ".join(message.split()).replace(' in "<unicode string>",', ":")
        if len(keys) > 1:  # the rest is about the class that holds the option
            inner = inner.partition("- Expected a <class 'NoneType'>\n  Given value")[0]
        problem = re.search(r"Problem with given class_path '.+?':\s+.+?(?=\n\s+- |\Z)", inner, re.DOTALL)
        described = problem[0] if problem else inner.partition('":')[2]
        described = re.sub(r"\s+- Expected a path but .*? either not accessible or invalid\s+- ", "", described)
        described = _UNION.sub(_expected, described)
        described = re.sub(r"typing\.Literal\[(.+?)\]", r"\1", described)  # only the values
        described = (
            re.sub(r"<class '([\w.]+)'>", r"\1", described)
            .replace("NoneType", "null")
            .replace("Expected a ", "expected ")
        )
        if keys[-1] in self.classes:
            if "subclass of" in described:
                described += ". For other classes call SmartBatchCLI(MyModel, MyData) in a script of your own"
            elif "dot import path" in described:  # a value of its first option, the data set or the model
                described = f"expected a class, or options such as --{keys[-1]}.{_FIRST.get(keys[-1], 'OPTION')}=..."
        line = " ".join(f"--{'.'.join(keys)}: {described}".split())
        return f"{line}. {QUOTE_NAMES}" if _TEXT.search(line) and _NOT_TEXT.search(line) else line

    def _unknown(self, name: str) -> str:
        name = name.replace("init_args.", "")
        options = list(self.options())
        if name in options:  # of a command, but given before it
            return f"--{name} is an option of a command. Write it, or the --config that holds it, after the command."
        last = name.rpartition(".")[2]
        same = [option for option in options if option.rpartition(".")[2] == last]
        near = same or nearest(name, options) or [option for option in options if _is_short_for(last, option)][:2]
        return f"There is no option --{name}.{did_you_mean(f'--{option}' for option in near)}"


def _as_class_paths(args: Any) -> Any:
    """Arguments in which `--A=B --A.c=d` gives A's class as `--A.class_path=B`.

    jsonargparse itself forgets B, unless A can be nothing but a class.
    """
    for option in _NAMES_OR_CLASSES:
        if any(arg.startswith(f"{option}.") for arg in args):
            args = [re.sub(f"^{option}(?==|$)", f"{option}.class_path", arg) for arg in args]
    return args


def _is_short_for(name: str, option: str) -> bool:
    """Whether a name is the end of an option, like `epochs` of `max_epochs`, or its initials, like `lr`."""
    words = option.rpartition(".")[2].split("_")
    return "".join(word[:1] for word in words) == name or "_".join(words).endswith(f"_{name}")


def _expected(union: re.Match[str]) -> str:
    """The accepted types, or what is wrong with the class that a value names."""
    if re.search("subclass|dot import", union["first"]):
        return re.sub(r".*callable class: |\.? Got value: .*", "", union["first"]) + ". Got value: "
    return f"expected one of {union['types']}. Got value: "


def _in_home_folder(value: Any) -> Any:
    """The value, with every text in it that begins with `~/` expanded to a path in the home folder."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~/") else value
    if isinstance(value, Namespace):
        for key, one in list(value.items()):
            value[key] = _in_home_folder(one)
    elif type(value) is dict:
        return {key: _in_home_folder(one) for key, one in value.items()}
    elif type(value) is list:
        return [_in_home_folder(one) for one in value]
    return value


class _HelpAll(argparse._HelpAction):
    """Shows all options; a subclass of the help action, so that jsonargparse does not treat it as a setting."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_help_all(), end="")
        parser.exit()
