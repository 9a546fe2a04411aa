"""Settings as dataclass fields with help texts; Python, YAML and the command line build the same object.

A settings class is a keyword-only dataclass whose fields are made by `setting` and whose `__post_init__` begins with
`check_types(self)`. cli/ turns the fields into flags.
"""
import dataclasses
from dataclasses import MISSING
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Type,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import InputError

__all__ = ['check_types', 'flat_names', 'from_flat', 'from_mapping', 'setting', 'to_flat', 'to_mapping']


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[Dict[str, 'dataclasses.Field[Any]']]


T = TypeVar('T', bound=_Dataclass)
_NAMES = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}


def setting(
        default: Any,
        help: Union[str, Callable[[], str]],
        *,
        short: Optional[str] = None,
        metavar: Optional[str] = None,
        group: Optional[str] = None,
        flat: Optional[str] = None,
        const: Optional[str] = None,
) -> Any:
    """A field of a settings class.

    Args:
        default: Default value; a list or dict is copied for each object.
        help: What the setting does, as the help text of its flag. A function if the text lists registered names.
        short: Short flag, such as '-b'.
        metavar: Name of the value in help texts.
        group: Heading of the flag in help texts; by default that of the previous field.
        flat: Name of its flag and its key in flat YAML files, see `flat_names`.
        const: Value of its flag if the flag is given without one.
    """
    metadata = dict(help=help, short=short, metavar=metavar, group=group, flat=flat, const=const)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _describe(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Union:
        return ' or '.join(_describe(i) for i in inner if i is not type(None))
    if origin in (list, tuple):
        return 'a list' if inner[0] is Any else f'a list, each {_describe(inner[0])}'
    return 'a mapping' if origin is dict else _NAMES.get(hint, getattr(hint, '__name__', str(hint)))


def _converted(value: Any, hint: Any) -> Tuple[bool, Any]:
    """Whether a value fits a type, and the value converted to it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True, value
    if origin is Union:
        tries = [_converted(value, i) for i in inner]
        exact = [new for fits, new in tries if fits and type(new) is type(value)]
        return next(((True, new) for new in exact), next((t for t in tries if t[0]), (False, value)))
    if origin in (list, tuple):
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            return False, value
        if origin is tuple and inner[-1] is not Ellipsis and len(inner) != len(value):
            return False, value
        hints = inner if origin is tuple and inner[-1] is not Ellipsis else [inner[0]] * len(value)
        tries = [_converted(v, i) for v, i in zip(value, hints)]
        return all(fits for fits, _ in tries), origin(new for _, new in tries)
    if origin is dict:
        return isinstance(value, dict), value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return True, from_mapping(hint, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if hint in (int, float) and isinstance(value, bool):
        return False, value
    return isinstance(value, hint), value


def check_types(settings: Any) -> None:
    """Refuse values of the wrong type: `worst_case='false'` is text, not a bool.

    Whole numbers become floats, lists become tuples, mappings become settings; nothing else is converted.

    Raises:
        InputError: Naming the field and its value.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        fits, new = _converted(value, hints[field.name])
        if not fits:
            found = f', not {_NAMES[type(value)]}' if type(value) in _NAMES else ''
            raise InputError(f'must be {_describe(hints[field.name])}{found}', argument=field.name, value=value)
        if new is not value:
            object.__setattr__(settings, field.name, new)


def from_mapping(cls: Type[T], values: Mapping[str, Any]) -> T:
    """A settings object from the content of a YAML or JSON file.

    Raises:
        InputError: On unknown names, missing fields without a default, and bad values.
    """
    fields = [field for field in dataclasses.fields(cls) if field.init]
    known = {field.name for field in fields}
    for name in values:
        if name not in known:
            raise InputError(f'unknown setting of {cls.__name__}', f"choose from {', '.join(sorted(known))}",
                             argument=str(name), value=values[name])
    for field in fields:
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f'is missing in {cls.__name__}', argument=field.name)
    return cls(**values)


def to_mapping(settings: Any) -> Dict[str, Any]:
    """Every field with its value, for a YAML or JSON file: `from_mapping` reads it back."""
    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_mapping(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {f.name: plain(getattr(settings, f.name)) for f in dataclasses.fields(settings) if f.init}


def flat_names(cls: Any, prefix: str = '') -> Dict[str, str]:
    """The name of each field in flags and flat YAML files: prefix and field name, or `flat` of `setting`."""
    return {f.name: f.metadata.get('flat') or (f'{prefix}_{f.name}' if prefix else f.name)
            for f in dataclasses.fields(cls) if f.init}


def from_flat(cls: Type[T], values: Mapping[str, Any], prefix: str = '') -> T:
    """A settings object from the flat names among `values`; other names are ignored.

    Raises:
        InputError: On bad values, naming the flat name.
    """
    names = flat_names(cls, prefix)
    try:
        return cls(**{name: values[flat] for name, flat in names.items() if flat in values})
    except InputError as error:
        raise error.renamed(names) from error


def to_flat(settings: Any, prefix: str = '') -> Dict[str, Any]:
    """The inverse of `from_flat`."""
    names = flat_names(settings, prefix)
    return {names[name]: value for name, value in to_mapping(settings).items()}


def default_of(field: 'dataclasses.Field[Any]') -> Any:
    """The default value of a field."""
    return field.default_factory() if field.default_factory is not MISSING else field.default
