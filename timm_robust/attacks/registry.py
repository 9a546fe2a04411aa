"""The registry of attacks, and parsing of lists such as 'clean,pgd20,apgd-ce,autoattack'."""
import dataclasses
import re
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Type, TypeVar, Union

from typing_extensions import dataclass_transform

from ..errors import InputError
from ..settings import from_mapping
from .base import Attack

__all__ = ['ATTACKS', 'attack_from_dict', 'attack_names', 'parse_attack', 'parse_attacks', 'register_attack']

ATTACKS: Dict[str, Type[Attack]] = {}
_NAMES: Dict[str, Tuple[Type[Attack], Mapping[str, Any]]] = {}  # every accepted name, with the settings it implies

_Class = TypeVar('_Class', bound=Type[Attack])


@dataclass_transform(frozen_default=True, kw_only_default=True)
def register_attack(cls: _Class) -> _Class:
    """Class decorator: turn an attack into a frozen dataclass and register its names.

    Raises:
        InputError: If one of its names is invalid or taken.
    """
    if '__dataclass_fields__' not in cls.__dict__:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)  # modifies the class in place
    names: Dict[str, Mapping[str, Any]] = {cls.name: {}, **dict.fromkeys(cls.aliases, {}), **cls.variants}
    for name in names:
        if not name or name != _normal(name) or ',' in name:
            raise InputError(
                'is not a valid attack name', "use lowercase letters, digits and hyphens, such as 'pgd-targeted'",
                argument='name', value=name)
        taken = _NAMES.get(name, (cls,))[0]
        if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f'is taken by {taken.__module__}.{taken.__qualname__}', argument='name', value=name)
    ATTACKS[cls.name] = cls
    _NAMES.update((name, (cls, settings)) for name, settings in names.items())
    return cls


def attack_names() -> str:
    """The names of all registered attacks and variants, for display."""
    return ', '.join(sorted(name for cls in ATTACKS.values() for name in (cls.name, *cls.variants)))


def _normal(name: str) -> str:
    return name.strip().lower().replace('_', '-')


def _split(name: str) -> Tuple[str, str]:
    """Split 'pgd20' into name and number; the longest name wins, since 'cw-l2' itself ends in a digit."""
    normal = _normal(name)
    fits = [n for n in _NAMES if re.fullmatch(rf'{re.escape(n)}[0-9]*', normal)]
    if not fits:
        raise InputError(
            'unknown attack', f"choose from {', '.join(_NAMES)}, with steps as in pgd20", argument='attacks',
            value=name)
    longest = max(fits, key=len)
    return longest, normal[len(longest):]


def parse_attack(attack: Union[str, Attack], **settings: Any) -> Attack:
    """Parse an attack such as 'pgd20': a case-insensitive name, with '_' or '-', and optionally steps or queries.

    Args:
        attack: Name, or an `Attack`, which is returned unchanged.
        **settings: Fields of the attack.

    Raises:
        InputError: On an unknown name, or a number or setting that the attack does not take.
    """
    if isinstance(attack, Attack):
        return attack
    if not isinstance(attack, str):
        raise InputError('is neither a name nor an attack', argument='attacks', value=attack)
    name, number = _split(attack)
    cls, implied = _NAMES[name]
    values = {**implied, **settings}
    if number:
        if cls.budget is None:
            raise InputError('takes no number', f'write {name}', argument='attacks', value=attack)
        if int(number) < 1:
            raise InputError(f'the number of {cls.budget} must be at least 1', argument='attacks', value=attack)
        if settings.get(cls.budget, int(number)) != int(number):
            raise InputError(
                f'contradicts {attack}', f'leave it out, or write {name}', argument=cls.budget,
                value=settings[cls.budget])
        values[cls.budget] = int(number)
    return from_mapping(cls, values)


def parse_attacks(attacks: Union[str, Attack, Sequence[Union[str, Attack]]], **settings: Any) -> List[Attack]:
    """Parse a list such as 'clean,fgsm,pgd20,apgd-ce,square1000,autoattack'.

    A number sets the steps, or the queries of square and rays. By default, PGD and its variants take 20 steps; other
    attacks have their own defaults.

    Args:
        attacks: Comma-separated names, or a list of names and attack objects.
        **settings: Settings of every named attack that has such a field: restarts, step_size, num_targets. None keeps
            the default. Attack objects keep their own settings.

    Raises:
        InputError: On an unknown name, a number an attack does not take, or a setting that no listed attack takes.
    """
    listed = [attacks] if isinstance(attacks, Attack) else attacks
    items = listed.split(',') if isinstance(listed, str) else list(listed)
    parsed, unused = [], {name: value for name, value in settings.items() if value is not None}
    shared = dict(unused)
    for item in items:
        if isinstance(item, Attack) or not isinstance(item, str):
            parsed.append(parse_attack(item))
        elif item.strip():
            known = {field.name for field in dataclasses.fields(_NAMES[_split(item)[0]][0])}
            parsed.append(parse_attack(item.strip(), **{k: v for k, v in shared.items() if k in known}))
            unused = {k: v for k, v in unused.items() if k not in known}
    if not parsed:
        raise InputError('names no attack', 'for example clean,fgsm,pgd20', argument='attacks', value=attacks)
    for name, value in unused.items():
        takers = [n for n, cls in ATTACKS.items() if name in {f.name for f in dataclasses.fields(cls)}]
        raise InputError(
            f"{', '.join(map(str, parsed))} {'have' if len(parsed) > 1 else 'has'} no such setting",
            f"{', '.join(takers)} {'have' if len(takers) > 1 else 'has'} it" if takers else 'no attack has it',
            argument=name, value=value)
    return parsed


def attack_from_dict(content: Mapping[str, Any]) -> Attack:
    """Rebuild an attack from `Attack.to_dict`.

    Raises:
        InputError: On an unknown attack or setting.
    """
    name = content.get('attack')
    if name not in ATTACKS:
        raise InputError('unknown attack', f"choose from {', '.join(ATTACKS)}", argument='attack', value=name)
    return from_mapping(ATTACKS[name], {k: v for k, v in content.items() if k != 'attack'})
