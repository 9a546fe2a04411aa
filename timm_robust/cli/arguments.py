"""Parsers of the commands: errors are one line, flags are settings, and a YAML file can hold them."""
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
    '--plugin MODULE (once for each), or --device-modules MODULE ... as in timm: import modules of your own first. The '
    'attacks, objectives, norms and models they register are then known by name, and their settings are flags.')


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help texts in which the names of attacks stay whole."""

    def _split_lines(self, text: str, width: int) -> List[str]:
        return textwrap.wrap(' '.join(text.split()), width, break_on_hyphens=False)


class _ShowAll(argparse.Action):
    """--help-all."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.first = ()
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and an `InputError`.

    Args:
        examples: Command lines for the end of the help text.
        first: The flags that --help shows; --help-all shows the others too. By default --help shows all.
        **kwargs: Of `argparse.ArgumentParser`.
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
    """A parser of settings classes: their fields are flags, and names in the YAML file of -c.

    Args:
        *classes: The settings classes.
        data: Take --data-dir as a positional argument too.
        **kwargs: Of `Parser`.
    """

    def __init__(self, *classes: Any, data: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        if data:
            self.add_argument('data', nargs='?', metavar='DIR', help='path to dataset (root dir), same as --data-dir')
        self.add_argument('-c', '--config', metavar='FILE', help='YAML file with values for these flags')
        for cls in classes:
            add_flags(self, cls)

    def given(self, argv: Sequence[str]) -> Dict[str, Any]:
        """The values on a command line, without the defaults of other flags."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        try:
            values = vars(self.parse_args(argv, namespace))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            self.error(f'{error}: of several values each is NAME=VALUE')  # of timm's ParseKwargs
        return {name: value for name, value in values.items() if value is not absent}

    def read(self, argv: Sequence[str]) -> Dict[str, Any]:
        """The values on a command line and in its YAML file, for `from_flat` to check; flags win over the file.

        Raises:
            InputError: On a flag or a name in the file that does not exist, and if the file cannot be read.
        """
        values = self.given(argv)
        path = values.pop('config', None)
        content = {} if path is None else read_yaml(path)
        data = values.pop('data', None)
        if data is not None:
            if 'data_dir' in values:
                raise InputError('the folder of the data is there twice', argument='data_dir', value=values['data_dir'])
            values['data_dir'] = data
        flags = {action.dest for action in self._actions if action.option_strings} - {'help', 'config'}
        for name in content:
            if name not in flags:
                raise InputError(
                    f'{name!r} is no flag of this command', f'{self.prog} --help lists them', argument='config',
                    value=path)
        return {**content, **values}


def start_logging() -> None:
    """Log to the terminal as timm does, without chatter about every checkpoint and every request."""
    for handler in [h for h in logging.root.handlers if isinstance(h.formatter, FormatterNoInfo)]:
        logging.root.removeHandler(handler)  # of an earlier command in this process
    setup_default_logging()
    for name in ('timm', 'httpx', 'httpx2', 'matplotlib'):
        logging.getLogger(name).setLevel(logging.WARNING)
