"""Parsers of the commands: errors are one line, flags are settings, and a YAML file can hold them."""
import argparse
import logging
from typing import Any, Dict, NoReturn, Sequence

from timm.utils import setup_default_logging
from timm.utils.log import FormatterNoInfo

from ..errors import InputError
from ..inputs import read_yaml
from .flags import add_flags

__all__ = ['Parser', 'SettingsParser', 'start_logging']

_PLUGINS = (
    '--plugin MODULE (once for each), or --device-modules MODULE ... as in timm: import modules of your own first. The '
    'attacks, objectives, norms and models they register are then known by name, and their settings are flags.')


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and an `InputError`."""

    def __init__(self, *, epilog: str = '', **kwargs: Any):
        super().__init__(allow_abbrev=False, epilog=f'{epilog} {_PLUGINS}'.lstrip(), **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message} ({self.prog} --help lists the flags)')


class SettingsParser(Parser):
    """A parser of settings classes: their fields are flags, and names in the YAML file of -c.

    Args:
        *classes: The settings classes.
        **kwargs: Of `argparse.ArgumentParser`.
    """

    def __init__(self, *classes: Any, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_argument('-c', '--config', metavar='FILE', help='YAML file with values for these flags')
        for cls in classes:
            add_flags(self, cls)

    def given(self, argv: Sequence[str]) -> Dict[str, Any]:
        """The values on a command line, without the defaults of other flags."""
        absent = object()
        namespace = argparse.Namespace(**{action.dest: absent for action in self._actions})
        return {name: value for name, value in vars(self.parse_args(argv, namespace)).items() if value is not absent}

    def read(self, argv: Sequence[str]) -> Dict[str, Any]:
        """The values on a command line and in its YAML file, for `from_flat` to check; flags win over the file.

        Raises:
            InputError: On a flag or a name in the file that does not exist, and if the file cannot be read.
        """
        values = self.given(argv)
        path = values.pop('config', None)
        content = {} if path is None else read_yaml(path)
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
    for name in ('timm', 'httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.WARNING)
