"""Command-line parsers: one-line errors, flags from settings classes, and values from a YAML file."""
import argparse
import logging
import textwrap
from typing import Any, Collection, Dict, List, NoReturn, Sequence

from timm.utils import setup_default_logging
from timm.utils.log import FormatterNoInfo

from ..errors import InputError
from ..inputs import read_yaml
from .flags import add_flags

__all__ = ['Parser', 'SettingsParser', 'start_logging']

_PLUGINS = (
    '--plugin MODULE (repeatable), or --device-modules MODULE ... as in timm, imports your own modules first. The '
    'attacks, objectives, norms and models they register are then available by name, with their settings as flags.')


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps help texts without breaking attack names at hyphens."""

    def _split_lines(self, text: str, width: int) -> List[str]:
        return textwrap.wrap(' '.join(text.split()), width, break_on_hyphens=False)


class _ShowAll(argparse.Action):
    """The flag --help-all, which prints the help text with all flags."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.first = ()
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one-line `InputError`s.

    Args:
        examples: Command lines for the end of the help text.
        first: The flags that --help shows; --help-all shows the others too. By default --help shows all.
        **kwargs: Passed to `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: Sequence[str] = (), first: Collection[str] = (), **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self.examples, self.first = examples, first
        self.description = textwrap.fill(self.description or '', 79)
        if first:
            self.add_argument('--help-all', action=_ShowAll, help='show all flags and exit')

    def format_help(self) -> str:
        """The help text."""
        shown = (*self.first, 'help', argparse.SUPPRESS)
        hidden = [(action, action.help) for action in self._actions
                  if self.first and action.option_strings and action.dest not in shown]
        ending = [f'--help-all lists {len(hidden)} more flags.'] if hidden else []
        self.epilog = '\n\n'.join([
            *(['\n  '.join(['examples:', *self.examples])] if self.examples else []),
            *(textwrap.fill(text, 79, break_on_hyphens=False) for text in [_PLUGINS, *ending])])
        try:
            for action, _ in hidden:
                action.help = argparse.SUPPRESS
            return super().format_help()
        finally:
            for action, text in hidden:
                action.help = text

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message} ({self.prog} --help lists the flags)')


class SettingsParser(Parser):
    """A parser for settings classes: their fields are flags, and keys in the YAML file of -c.

    Args:
        *classes: The settings classes.
        data: Accept --data-dir as a positional argument too.
        **kwargs: Passed to `Parser`.
    """

    def __init__(self, *classes: Any, data: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if data:
            self.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (root dir), same as --data-dir')
        self.add_argument('-c', '--config', metavar='FILE', help='YAML file with values for these flags')
        for cls in classes:
            add_flags(self, cls)

    def given(self, argv: Sequence[str]) -> Dict[str, Any]:
        """The values given on a command line, without defaults."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        try:
            values = vars(self.parse_args(argv, namespace))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            self.error(f'{error}: write each value as NAME=VALUE')  # from timm's ParseKwargs
        return {name: value for name, value in values.items() if value is not absent}

    def read(self, argv: Sequence[str]) -> Dict[str, Any]:
        """The values on a command line and in its YAML file, for `from_flat` to check; flags override the file.

        Raises:
            InputError: On unknown flags or names in the file, and if the file cannot be read.
        """
        values = self.given(argv)
        path = values.pop('config', None)
        content = {} if path is None else read_yaml(path)
        data = values.pop('data', None)
        if data is not None:
            if 'data_dir' in values:
                raise InputError('the data folder is given twice', argument='data_dir', value=values['data_dir'])
            values['data_dir'] = data
        flags = {action.dest for action in self._actions if action.option_strings} - {'help', 'config'}
        for name in content:
            if name not in flags:
                raise InputError(
                    f'{name!r} is not a flag of this command', f'{self.prog} --help lists them', argument='config',
                    value=path)
        return {**content, **values}


def start_logging() -> None:
    """Log to the terminal as timm does, without a line for every checkpoint and request."""
    for handler in [h for h in logging.root.handlers if isinstance(h.formatter, FormatterNoInfo)]:
        logging.root.removeHandler(handler)  # from an earlier command in this process
    setup_default_logging()
    for name in ('timm', 'httpx', 'httpx2', 'matplotlib'):
        logging.getLogger(name).setLevel(logging.WARNING)
