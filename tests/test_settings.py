"""Settings refuse values of another type, wherever they come from."""
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple, Union

import pytest

from timm_robust.errors import InputError
from timm_robust.settings import check_types, from_mapping, setting, to_mapping


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = setting(10, 'number of steps')
    weight: float = setting(.5, 'weight')
    eps: Union[str, float] = setting('8/255', 'size')
    name: str = setting('', 'name')
    fast: bool = setting(False, 'whether')
    seed: Optional[int] = setting(None, 'seed')
    scale: Tuple[float, float] = setting((.1, 1.), 'range')
    epochs: Tuple[float, ...] = setting((), 'epochs')
    dirs: List[str] = setting([], 'folders')
    kwargs: Dict[str, str] = setting({}, 'more')

    def __post_init__(self):
        check_types(self)


@dataclass(frozen=True)
class Required:
    steps: int
    inner: Optional[Settings] = None
    rows: Tuple[Settings, ...] = ()

    def __post_init__(self):
        check_types(self)


@pytest.mark.parametrize('name,value,expected', [
    ('steps', True, 'a whole number, not true or false'), ('steps', 2.5, 'a whole number, not a number'),
    ('steps', '3', 'a whole number, not text'),
    ('steps', None, 'a whole number'), ('weight', '0.5', 'a number'), ('weight', False, 'a number'),
    ('fast', 'false', 'true or false'), ('fast', 0, 'true or false'), ('name', 3, 'text'),
    ('eps', [1], 'text or a number'), ('seed', 1.5, 'a whole number'), ('scale', [.1], 'a list, each a number'),
    ('scale', .1, 'a list, each a number'), ('dirs', 'here', 'a list, each text'), ('dirs', [1], 'a list, each text'),
    ('kwargs', [], 'a mapping'),
])
def test_values_of_another_type_are_refused(name, value, expected):
    with pytest.raises(InputError, match=f'must be {expected}') as error:
        Settings(**{name: value})
    assert error.value.argument == name and error.value.value == value


def test_numbers_and_lists_take_the_type_of_their_field():
    settings = Settings(weight=1, scale=[0, 1], epochs=[50, 90.5], eps=1, seed=3)
    assert settings.weight == 1. and type(settings.weight) is float
    assert settings.scale == (0., 1.) and type(settings.scale[0]) is float
    assert settings.epochs == (50., 90.5)
    assert settings.eps == 1 and settings.seed == 3


def test_a_mapping_and_back():
    settings = Settings(steps=3, scale=(.2, .9), dirs=['a'])
    assert from_mapping(Settings, to_mapping(settings)) == settings
    with pytest.raises(InputError, match='steps: is missing in Required'):
        from_mapping(Required, {})
    with pytest.raises(InputError, match='stepz=3: unknown setting of Settings; choose from .*steps'):
        from_mapping(Settings, {'stepz': 3})


def test_settings_inside_of_settings():
    whole = Required(3, Settings(steps=4), (Settings(scale=(.3, 1.)),))
    content = to_mapping(whole)
    assert content['inner']['steps'] == 4 and content['rows'][0]['scale'] == [.3, 1.]
    assert from_mapping(Required, content) == whole == Required(**content)
    with pytest.raises(InputError, match="steps='x': must be a whole number"):
        from_mapping(Required, {'steps': 1, 'rows': [{'steps': 'x'}]})


def test_defaults_are_not_shared():
    assert Settings().dirs is not Settings().dirs
