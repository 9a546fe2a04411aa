"""Flags from the fields of settings classes; `settings.from_flat` turns their values into settings."""
import argparse
import dataclasses
import re
from typing import Any, Collection, Dict, Iterable, List, Mapping, Type, Union, get_args, get_origin, get_type_hints

from timm.utils import ParseKwargs

from ..attacks import ATTACKS, parse_eps
from ..settings import default_of, flat_names
from ..tasks import AWP, OBJECTIVES, RobustTeacher, TrainingAttack
from .flagged import word

__all__ = ['add_attack_flags', 'add_flags', 'add_objective_flags', 'as_flags']

Flags = Union[argparse.ArgumentParser, argparse._ArgumentGroup]


def number(text: str) -> float:  # argparse's error shows its name
    """A number, or a fraction such as 2/255."""
    try:
        return float(text)  # also nan and inf, which settings refuse
    except ValueError:
        return parse_eps(text)


def _kind(hint: Any, flat: str, const: Any) -> Dict[str, Any]:
    """Arguments of `add_argument` for a value of a type."""
    inner = [i for i in get_args(hint) if i is not type(None)] if get_origin(hint) is Union else [hint]
    hint = str if str in inner else inner[0]
    if hint is bool:
        # e.g. also --no-amp, against a recipe's `amp: true`
        return {'action': 'store_true' if flat.startswith('no_') else argparse.BooleanOptionalAction}
    if get_origin(hint) in (list, tuple):
        own = get_args(hint)
        fixed = get_origin(hint) is tuple and Ellipsis not in own
        return {'type': number if own[0] is float else own[0], 'nargs': len(own) if fixed else '+'}
    if get_origin(hint) is dict:
        return {'action': ParseKwargs, 'nargs': '*'}
    return {'type': number if hint is float else hint, **({'nargs': '?', 'const': const} if const else {})}


def _add(group: Flags, field: 'dataclasses.Field[Any]', hint: Any, flat: str, default: Any, text: str) -> None:
    kind = _kind(hint, flat, field.metadata['const'])
    if 'type' in kind or 'nargs' in kind:
        kind['metavar'] = field.metadata['metavar'] or flat.split('_')[-1].upper()
    short = [field.metadata['short']] if field.metadata['short'] else []
    group.add_argument(
        *short, f"--{flat.replace('_', '-')}", dest=flat, default=default, help=text.replace('%', '%%'), **kind)


def _shown(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return ' '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in default)
    return '' if default is None or isinstance(default, (bool, dict)) else str(default)


def _text(field: 'dataclasses.Field[Any]', default: str = '') -> str:
    text = field.metadata['help']
    text = text() if callable(text) else text
    return f'{text} (default: {default})' if default and '(default' not in text else text


def _group(parser: argparse.ArgumentParser, title: str) -> Flags:
    """The argument group with this heading, added if there is none yet."""
    return next((g for g in parser._action_groups if g.title == title), None) or parser.add_argument_group(title)


def add_flags(
        parser: argparse.ArgumentParser,
        cls: Any,
        prefix: str = '',
        title: str = '',
        without: Collection[str] = (),
) -> None:
    """Add a flag for each field of a settings class that was made by `setting`.

    Args:
        parser: The parser.
        cls: The settings class; fields that are settings classes themselves are left out.
        prefix: Prefix of the flags.
        title: Heading in help texts, for fields that name no group.
        without: Fields that get no flag.
    """
    group: Flags = _group(parser, title) if title else parser
    hints, names = get_type_hints(cls), flat_names(cls, prefix)
    for field in dataclasses.fields(cls):
        if field.metadata.get('group'):
            group = _group(parser, field.metadata['group'])
        if 'help' in field.metadata and field.name in names and field.name not in without:
            default = default_of(field)
            _add(group, field, hints[field.name], names[field.name], default, _text(field, _shown(default)))


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of all registered objectives, and of attack, weight perturbation and teacher in training."""
    group = parser.add_argument_group('Robust training parameters')
    group.add_argument('--objective', default='standard', metavar='NAME',
                       help=f"training objective, one of {', '.join(OBJECTIVES)} (default: standard)")
    _add_union(group, OBJECTIVES.values())
    add_flags(parser, TrainingAttack, TrainingAttack.prefix, 'Training attack parameters')
    add_flags(parser, AWP, AWP.prefix)
    add_flags(parser, RobustTeacher, RobustTeacher.prefix)


def add_attack_flags(parser: argparse.ArgumentParser) -> Dict[str, str]:
    """Add a flag for each setting of the registered attacks; it applies to every chosen attack that has the setting.

    Returns:
        For each setting, the flag's name in the namespace: the setting's name, prefixed with `attack_` if it is taken.
    """
    group = parser.add_argument_group('Attack settings (default: those of each attack)')
    owners: Dict[str, List[Any]] = {}
    for cls in ATTACKS.values():
        for field in dataclasses.fields(cls):
            owners.setdefault(field.name, []).append((cls, field))
    taken = {action.dest for action in parser._actions}
    flags = {name: f'attack_{name}' if name in taken else name for name in owners}
    for name, found in owners.items():
        cls, field = found[0]
        names = ', '.join(own.name for own, _ in found)
        text = re.sub(r' ?\(default: [^)]*\)', '', f'{_text(field)} ({names})')
        _add(group, field, get_type_hints(cls)[name], flags[name], None, text)
    return flags


def _add_union(group: Flags, classes: Iterable[Type[Any]]) -> None:
    """Add a flag for each field of several classes; a shared field is added once, with the default of each class."""
    found: Dict[str, List[Any]] = {}
    for cls in classes:
        for name, flat in flat_names(cls, cls.flat_prefix()).items():
            found.setdefault(flat, []).append((cls, next(f for f in dataclasses.fields(cls) if f.name == name)))
    for flat, owners in found.items():
        cls, field = owners[0]
        by_default: Dict[str, List[str]] = {}
        for owner, own in owners:
            by_default.setdefault(_shown(default_of(own)), []).append(owner.name)
        defaults = [default_of(own) for _, own in owners]
        default = defaults[0] if all(d == defaults[0] for d in defaults) else None
        note = '; '.join(f"{text} in {', '.join(names)}" for text, names in by_default.items() if text)
        if len(by_default) == 1:
            note = next(iter(by_default))
        _add(group, field, get_type_hints(cls)[field.name], flat, default, _text(field, note))


def as_flags(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> List[str]:
    """Command-line words for values by flat name, in the order of the help text."""
    words: List[str] = []
    for action in (a for group in parser._action_groups for a in group._group_actions):
        if action.dest not in values or not action.option_strings:
            continue
        value = values[action.dest]
        negative = isinstance(action, argparse.BooleanOptionalAction) and not value
        words.append(action.option_strings[-1] if negative else next(
            o for o in action.option_strings if o.startswith('--')))
        if isinstance(value, dict):
            words += [f'{k}={v}' for k, v in value.items()]
        elif not isinstance(value, bool):
            words += map(word, value if isinstance(value, (list, tuple)) else [value])
    return words
