"""Errors know argument, value, problem and remedy; Python callers read of arguments, the command line of flags."""
import pickle

import pytest

from timm_robust.cli.flagged import flagged
from timm_robust.errors import InputError, check_at_least, check_choice, check_range


@pytest.mark.parametrize('error,python,flags', [
    (InputError('must be positive', argument='attack_steps', value=0),
     'attack_steps=0: must be positive', '--attack-steps 0: must be positive'),
    (InputError('unknown', 'choose one of a, b', argument='norm', value='l7'),
     "norm='l7': unknown; choose one of a, b", '--norm l7: unknown; choose one of a, b'),
    (InputError('no CUDA device is available', "pass `device='cpu'`", argument='device', value='cuda'),
     "device='cuda': no CUDA device is available; pass `device='cpu'`",
     '--device cuda: no CUDA device is available; pass --device cpu'),
    (InputError('`worst_case=True` and `attack_eps` exclude each other'),
     '`worst_case=True` and `attack_eps` exclude each other', '--worst-case and --attack-eps exclude each other'),
    (InputError('has no effect', argument='use_ema', value=False),
     'use_ema=False: has no effect', '--no-use-ema: has no effect'),
    (InputError('missing', argument='data_dir'), 'data_dir: missing', '--data-dir: missing'),
    (InputError('must be one value', argument='mean', value=(.5, .4)),
     'mean=(0.5, 0.4): must be one value', '--mean 0.5 0.4: must be one value'),
])
def test_one_error_two_readers(error, python, flags):
    assert str(error) == python
    assert flagged(error) == flags


def test_another_argument_keeps_problem_and_remedy():
    error = InputError('is no number', 'write it as 8/255', argument='eps', value='x').about('attack_eps', 'x')
    assert (error.argument, error.value, error.remedy) == ('attack_eps', 'x', 'write it as 8/255')


@pytest.mark.parametrize('value', [0, -1, 1.5, True, '2', None, float('nan')])
def test_counts_are_whole_numbers(value):
    check_at_least('steps', 1)
    with pytest.raises(InputError, match='steps=.*whole number of at least 1'):
        check_at_least('steps', value)


@pytest.mark.parametrize('value', [-.1, 1.1, float('nan'), 'x', True, None])
def test_ranges_have_ends(value):
    check_range('weight', 0, 0, 1)
    check_range('weight', 1., 0, 1)
    with pytest.raises(InputError, match=r'weight=.*in \[0, 1\]'):
        check_range('weight', value, 0, 1)


def test_ranges_without_an_upper_end_refuse_infinity():
    check_range('beta', 1e9, 0)
    with pytest.raises(InputError, match='beta=inf: must be a number of at least 0'):
        check_range('beta', float('inf'), 0)
    with pytest.raises(InputError, match=r'ratio=0: must be a number in \(0, 1\]'):
        check_range('ratio', 0, 0, 1, open_low=True)


def test_unknown_choices_name_the_known():
    with pytest.raises(InputError, match="norm='l7': unknown; choose one of linf, l2"):
        check_choice('norm', 'l7', ('linf', 'l2'))


def test_errors_survive_processes():
    error = pickle.loads(pickle.dumps(InputError('unknown', 'choose', argument='norm', value='x')))
    assert error.explanation == 'unknown; choose'
