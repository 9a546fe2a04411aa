"""What holds for every registered objective, and one made outside of the package."""
import dataclasses
import inspect
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from helpers import TinyNet

from timm_robust.errors import InputError, check_range
from timm_robust.settings import default_of, flat_names, setting
from timm_robust.tasks import AWP, OBJECTIVES, Objective, RobustTask, TrainingAttack, create_task, register_objective
from timm_robust.tasks.objective import objective_from_dict, objective_from_flat, objective_to_flat

# other values than the defaults, for the round trips
OTHER = {
    'weight': .25, 'beta': 3., 'tau_epochs': (1., 2.5), 'gamma': .5, 'terms': 4, 'noise2net': True, 'epsilon': .2,
    'groups': 2, 'ratio': .5}
RUN = dict(epochs=5, batch_size=8, opt='sgd', mixup=0., cutmix=0., cutmix_minmax=None, grad_checkpointing=False,
           no_prefetcher=False, eval_metric='top1')


def other(cls):
    """Settings that are not the defaults."""
    names = {f.name for f in dataclasses.fields(cls)} - {'deepaug_dirs'}
    assert names <= set(OTHER), 'give the new setting another value than its default here'
    return cls(**{name: OTHER[name] for name in names})


@pytest.mark.parametrize('name', OBJECTIVES)
def test_settings_go_to_a_dict_and_back(name):
    for settings in (OBJECTIVES[name](), other(OBJECTIVES[name])):
        assert objective_from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
        assert objective_from_flat(json.loads(json.dumps(objective_to_flat(settings)))) == settings
        assert dataclasses.replace(settings) == settings
    assert not dataclasses.fields(OBJECTIVES[name]) or OBJECTIVES[name]() != other(OBJECTIVES[name])


@pytest.mark.parametrize('name', OBJECTIVES)
def test_settings_are_frozen_documented_and_checked_by_type(name):
    cls = OBJECTIVES[name]
    for field in dataclasses.fields(cls):
        assert field.metadata['help'] and field.kw_only
        with pytest.raises(InputError) as error:
            cls(**{field.name: object()})
        assert error.value.argument == field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), field.name, default_of(field))
    with pytest.raises(TypeError):
        cls(no_such_setting=1)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_task_alone_has_the_defaults_of_its_settings(name):
    task_class = OBJECTIVES[name]().task_class()
    model = OBJECTIVES[name]().prepare_model(TinyNet(norm=name in ('mbnat', 'apart')).train())
    task = task_class(model, verbose=False)
    made = create_task(OBJECTIVES[name](), model, verbose=False)
    assert type(made) is task_class
    for field, value in OBJECTIVES[name]().task_kwargs().items():
        for t in (task, made):
            found = {'groups': lambda t: t.perturbation.groups, 'tau_epochs': lambda t: tuple(t.tau_steps)}.get(
                field, lambda t, f=field: getattr(t, f))(t)
            assert found == value, field
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    result = task(x, y)
    result['loss'].backward()
    assert torch.isfinite(result['loss']) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_setting_reaches_its_task(name):
    settings = other(OBJECTIVES[name])
    model = settings.prepare_model(TinyNet(norm=name in ('mbnat', 'apart')).train())
    task = create_task(settings, model, attack=TrainingAttack(steps=3, eps='2/255'), awp=AWP(gamma=.01),
                       steps_per_epoch=10, seed=3, verbose=False)
    if settings.crafts:
        assert (task.attack.steps, task.awp.gamma, task.steps_per_epoch, task.seed) == (3, .01, 10, 3)
    for field, value in settings.task_kwargs().items():
        found = {'groups': lambda t: t.perturbation.groups, 'tau_epochs': lambda t: t.tau_steps}.get(
            field, lambda t, f=field: getattr(t, f))(task)
        assert found == (value if field != 'tau_epochs' else [10, 25])


@pytest.mark.parametrize('name', [n for n, c in OBJECTIVES.items() if c.crafts])
def test_whole_signatures(name):
    cls = OBJECTIVES[name]
    task_class = cls().task_class()
    known = {}
    for part in task_class.__mro__[:-1]:
        if '__init__' in part.__dict__ and issubclass(part, RobustTask):
            known = {**inspect.signature(part.__init__).parameters, **known}
    for field, value in cls().task_kwargs().items():
        assert known[field].default in (value, cls.weight if field == 'weight' else value)
    assert {'attack', 'awp', 'space', 'steps_per_epoch', 'seed'} <= set(known)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_runs_it_cannot_work_under(name):
    settings = OBJECTIVES[name]()
    settings.check_run(SimpleNamespace(**RUN))
    refused = {
        'mixup': name in ('fat', 'trades_fat', 'nofrost_star'), 'no_prefetcher': name == 'nofrost_star',
        'grad_checkpointing': name in ('mbnat', 'apart'), 'opt': name == 'apart', 'eval_metric': name == 'mbnat'}
    values = {'mixup': .2, 'no_prefetcher': True, 'grad_checkpointing': True, 'opt': 'adahessian',
              'eval_metric': 'robust_top1'}
    for argument, value in values.items():
        run = SimpleNamespace(**{**RUN, argument: value})
        if not refused[argument]:
            settings.check_run(run)
            continue
        with pytest.raises(InputError) as error:
            settings.check_run(run)
        assert error.value.argument == argument


def test_batches_apart_cannot_divide():
    apart = OBJECTIVES['apart']
    for settings, argument in ((apart(groups=3), 'objective.groups'), (apart(ratio=.1), 'objective.ratio')):
        with pytest.raises(InputError, match='`batch_size=8`') as error:
            settings.check_run(SimpleNamespace(**RUN))
        assert error.value.argument == argument


@pytest.mark.parametrize('values,argument,message', [
    ({'objective': 'trade'}, 'objective', "objective='trade': unknown; choose one of .*nofrost"),
    ({'objective': 'trades', 'adv_weight': .3}, 'adv_weight', 'is for `objective` sat, nofrost, mbnat, fat'),
    ({'objective': 'sat', 'fat_tau_epochs': [3.]}, 'fat_tau_epochs', 'is for `objective` fat, trades_fat, not sat'),
    ({'objective': 'nofrost', 'noise2net': True}, 'noise2net', 'is for `objective` nofrost_star, not nofrost'),
    ({'objective': 'nofrost_star', 'star_terms': 4}, 'star_terms', 'star_terms=4: needs deeply augmented images'),
    ({'objective': 'trades', 'trades_beta': '6'}, 'trades_beta', "trades_beta='6': must be a number"),
    ({'objective': 'apart', 'apart_groups': 2.}, 'apart_groups', 'apart_groups=2.0: must be a whole number'),
    ({'objective': 'fat', 'adv_weight': 2}, 'adv_weight', 'adv_weight=2.0: must be a number in'),
])
def test_flat_values_are_refused_by_their_flat_names(values, argument, message):
    with pytest.raises(InputError, match=message) as error:
        objective_from_flat(values)
    assert error.value.argument == argument


def test_flat_values_at_their_default_say_nothing():
    values = {'apart_ratio': 1., 'trades_beta': 6., 'deepaug_dirs': [], 'fat_tau_epochs': [], 'mbnat_gamma': None}
    assert objective_from_flat({'objective': 'sat', **values}) == OBJECTIVES['sat']()


def test_one_flat_name_is_one_kind_of_setting():
    kinds = {}
    for cls in OBJECTIVES.values():
        names = flat_names(cls, cls.flat_prefix())
        for field in dataclasses.fields(cls):
            kinds.setdefault(names[field.name], set()).add(field.type)
    assert all(len(found) == 1 for found in kinds.values())


class ToyTask(RobustTask):
    def __init__(self, model, criterion=None, *, strength=.5, **kwargs):
        super().__init__(model, criterion, **kwargs)
        self.strength = strength

    def loss(self, input, adv, target):
        output = self.trainable_module(adv)
        return {'loss': self.criterion(output, target) + self.strength * output.square().mean(), 'output': output}


@dataclass(frozen=True, kw_only=True)
class Toy(Objective):
    """L(x*) and the size of its logits."""
    name: ClassVar[str] = 'toy'

    strength: float = setting(.5, 'weight of the size of logits')

    def __post_init__(self):
        super().__post_init__()
        check_range('strength', self.strength, 0)

    def task_class(self):
        return ToyTask


def test_an_objective_of_ones_own(monkeypatch):
    monkeypatch.delitem(OBJECTIVES, 'toy', raising=False)
    try:
        assert register_objective(Toy) is Toy
        settings = objective_from_flat({'objective': 'toy', 'toy_strength': 2})
        assert settings == Toy(strength=2.) and objective_from_dict(settings.to_dict()) == settings
        task = create_task(settings, TinyNet(), attack=TrainingAttack(steps=1), awp=AWP(gamma=.01), verbose=False)
        assert task.strength == 2
        task(torch.rand(4, 3, 8, 8), torch.arange(4))['loss'].backward()
        with pytest.raises(InputError, match="'toy' is the name of another objective"):
            register_objective(Toy)
    finally:
        OBJECTIVES.pop('toy', None)
    with pytest.raises(InputError, match='has no name'):
        register_objective(type('Nameless', (Objective,), {}))
