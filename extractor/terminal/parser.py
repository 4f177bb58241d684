"""The command line of ``extract``: fields of dataclasses to argparse, and words to values."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from extractor.errors import UsageError
from extractor.flags import Flag, Option, option, options_in
from extractor.options import DEFAULT_MODEL, GROUPS, INPUT, MODEL, RUN, Options
from extractor.terminal import environment
from extractor.version import __version__

__all__ = [
    "EXIT_CODES",
    "Command",
    "CommandOptions",
    "Parser",
    "build_parser",
    "command_options",
    "parse",
]

USAGE = "extract [--model NAME] INPUT... [--out OUT] [options]"

DESCRIPTION = """\
Turn images into embeddings. extract loads a pretrained timm or torchvision backbone, replaces its
classifier with nn.Identity, embeds folders of images, and writes a store of plain .npy files in
which row i belongs to image i.
"""

EXIT_CODES = {
    "0": "every image is in the store",
    "1": "the run failed and added nothing to the store",
    "2": "usage error",
    "3": "the store is complete, but some images failed",
    "130, 143": "interrupted; run the same command to resume",
}

EPILOG = """\
examples:
  extract images/                                   timm's resnet50 -> features/resnet50/
  extract -m torchvision:vgg16 images/ -o vgg/      another model and another output folder
  extract -m resnet50 --weights mine.pth images/    your own weights
  extract -m resnet50 --layer layer3 --pool gem images/       an inner layer, pooled
  extract -m resnet50 -m vit_base_patch16_224 images/         two stores, each image read once
  extract -m resnet50+vit_base_patch16_224 images/            both embeddings in one vector
  find images -name '*.jpg' | extract --list -      any list of files

other commands (write a folder of the same name as ./models):
  extract models [GLOB]                             list models
  extract models show NAME                          show one model and its layers
  extract download NAME...                          download weights for an offline machine
  extract info STORE                                show how a store was made
  extract verify STORE                              check every byte of a store
  extract compact STORE                             remove rows of images that changed or went
  extract evaluate STORE                            measure how well a store tells classes apart
  extract compare -m A -m B images/                 compare models, layers or stores
  extract export STORE --to PATH                    write a store for another tool
  extract transform STORE -o OUT                    normalize, project or whiten the rows of a store
  extract map STORE -o map.png                      draw a map of a store
  extract search STORE QUERY...                     find the nearest images in a store
  extract index STORE                               make an index for faster search
  extract view STORE [OTHER]                        look at a store in the browser
  extract duplicates STORE                          find images that are there twice
  extract outliers STORE                            find odd images and wrong labels
  extract doctor                                    check packages, devices, caches and OUT

Environment variables set options, too: EXTRACTOR_BATCH_SIZE=64 is --batch-size 64.

exit codes:
{exit_codes}
"""


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """Options that only the command has; the library takes them in another form."""

    inputs: Sequence[str] = option(
        (),
        Flag(
            "INPUT",
            "a folder, which is searched recursively, or an image",
            INPUT,
            metavar="INPUT",
        ),
    )
    image_list: str | None = option(
        None,
        Flag(
            "--list",
            "read image paths from a file, one per line; - reads standard input",
            INPUT,
            metavar="FILE",
        ),
    )
    out: str | None = option(
        None,
        Flag(
            "-o/--out",
            "folder of the store, or of several stores",
            INPUT,
            metavar="OUT",
            unset="features/<model>",
        ),
    )
    model: Sequence[str] = option(
        (DEFAULT_MODEL,),
        Flag(
            "-m/--model",
            "timm:NAME, torchvision:NAME, or NAME, which prefers timm; hf-hub:ORG/NAME, "
            "local-dir:PATH or FILE.py:FUNCTION; NAME=WEIGHTS has its own weights; A+B joins two "
            "models; repeat it to fill one store per model",
            MODEL,
            metavar="NAME",
        ),
    )
    quiet: bool = option(
        False, Flag("--quiet", "print errors only: no progress bar and no summary", RUN)
    )
    log_json: bool = option(
        False,
        Flag(
            "--log-json",
            "print one JSON object per line on standard error instead of a progress bar",
            RUN,
            advanced=True,
        ),
    )


@dataclass(frozen=True)
class Command:
    """One parsed command line.

    Attributes:
        own: Options that only the command has.
        options: Options of the library call.
        warnings: One sentence for each environment variable that is no option.
    """

    own: CommandOptions
    options: Options
    warnings: tuple[str, ...]


class Parser(argparse.ArgumentParser):
    """Parser that takes options anywhere, and suggests one where an option is mistyped.

    Attributes:
        others: Further options to suggest, which another parser has taken before.
    """

    others: Sequence[str] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words; options may also stand between those that name inputs, stores or queries."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest and not any(word.startswith("-") for word in rest):
            return self.parse_intermixed_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print a usage error and exit with 2."""
        if message.startswith("unrecognized arguments: "):
            words = [*self._option_string_actions, *self.others]
            known = [word for word in words if word.startswith("--")]
            typed = (word.partition("=")[0] for word in message.split() if word.startswith("--"))
            close = [difflib.get_close_matches(word, known, 1) for word in typed]
            if found := [words[0] for words in close if words]:
                message += f"; did you mean {', '.join(dict.fromkeys(found))}?"
        super().error(message)


def command_options() -> list[Option]:
    """Return every option of the command, group by group."""
    declared = [*options_in(CommandOptions).values(), *options_in(Options).values()]
    return sorted(declared, key=lambda each: GROUPS.index(each.flag.group))


def build_parser(*, show_all: bool = False) -> Parser:
    """Return the parser; its namespace holds only what was typed, without defaults.

    Args:
        show_all: Let the help page show the advanced options.
    """
    parser = Parser(
        prog="extract",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG.format(exit_codes=_exit_codes()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    declared = command_options()
    _add_groups(parser, [each for each in declared if not each.flag.advanced], "")
    group = parser.add_argument_group("help")
    group.add_argument("-h", "--help", action="help", help="show the most common options and exit")
    group.add_argument("--help-all", action=_HelpAll, help="show all options and exit")
    group.add_argument(
        "--version",
        action="version",
        version=f"extract {__version__}",
        help="show the version and exit",
    )
    advanced = [each for each in declared if each.flag.advanced]
    _add_groups(parser, advanced, "advanced, ", hidden=not show_all)
    return parser


def _exit_codes() -> str:
    return "\n".join(f"  {code:9} {meaning}" for code, meaning in EXIT_CODES.items())


class _HelpAll(argparse.Action):
    """Print the help page with the advanced options and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **details: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **details)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        build_parser(show_all=True).print_help()
        parser.exit()


def _add_groups(
    parser: argparse.ArgumentParser, chosen: Iterable[Option], prefix: str, *, hidden: bool = False
) -> None:
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in chosen:
        title = each.flag.group
        if title not in groups:
            groups[title] = parser.add_argument_group(prefix + title)
        _add(groups[title], each, hidden=hidden)


def _add(group: argparse._ArgumentGroup, each: Option, *, hidden: bool) -> None:
    details: dict[str, Any] = {"help": argparse.SUPPRESS if hidden else _help(each)}
    if not each.words:
        group.add_argument(each.name, nargs="*", metavar=each.flag.metavar, **details)
        return
    if each.is_switch:
        details |= {"action": "store_const", "const": not each.default}
    elif each.choices:
        details |= {"choices": each.choices}
    else:
        details |= {"type": _typed(each.parse), "metavar": each.flag.metavar}
    if each.is_repeatable:
        details |= {"action": "append"}
    group.add_argument(*each.words, dest=each.name, **details)


def _help(each: Option) -> str:
    default = each.default_text
    text = f"{each.flag.help} (default: {default})" if default else each.flag.help
    return text.replace("%", "%%")


def _typed(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Return a parser of one value whose message argparse shows."""

    def typed(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def parse(
    words: Sequence[str],
    variables: Mapping[str, str] = os.environ,
    verb: argparse.ArgumentParser | None = None,
) -> Command:
    """Parse a command line; an option that is not typed may come from the environment.

    Args:
        words: The command line.
        variables: The environment.
        verb: Parser of the verb that has taken its own options already, for messages.

    Raises:
        UsageError: A value is out of range, or the option cannot take a variable's value.
    """
    declared = command_options()
    parser = build_parser()
    if verb is not None:
        parser.prog, parser.usage = verb.prog, verb.usage
        parser.others = list(verb._option_string_actions)
    typed = vars(parser.parse_args(words))
    from_variables = environment.values(declared, variables)
    values = {**from_variables, **typed}
    if not values.get("inputs"):
        values.pop("inputs", None)  # argparse gives an empty list
    own = {name: values.pop(name) for name in options_in(CommandOptions) if name in values}
    try:
        options = Options(**values)
    except UsageError as error:
        untyped = [each for each in declared if each.name in from_variables.keys() - typed.keys()]
        raise environment.with_variable(error, untyped) from error
    unknown = tuple(environment.unknown(declared, variables))
    return Command(CommandOptions(**own), options, unknown)
