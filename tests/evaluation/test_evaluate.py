"""`timm_robust.evaluate`: verdicts, forms of models and data, refusals, sweeps, processes, what is written."""
import copy
import dataclasses
import inspect
import logging
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from helpers import TinyNet, make_image_folder, run_distributed
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from timm_robust.attacks import APGD, FGSM, PGD, AutoAttack, InputSpace, Linf
from timm_robust.errors import InputError
from timm_robust.evaluation import (
    EvalConfig,
    EvaluationReport,
    Journal,
    Runner,
    evaluate,
    index_seeds,
    loss_surface,
    make_plan,
)
from timm_robust.evaluation import diagnostics as diagnostics_module
from timm_robust.evaluation.norm_statistics import compare_bn_modes
from timm_robust.evaluation.properties import measure_properties
from timm_robust.evaluation.render import words
from timm_robust.inputs import ImagesConfig, NetworkConfig, weights_sha256
from timm_robust.layers import set_bn_mode
from timm_robust.models import NormalizedModel

THREAT = Linf(8 / 255)
NEAR = Linf(.005)


def data(n=20, classes=4):
    return torch.rand(n, 3, 8, 8), torch.arange(n) % classes


def measured(model, x, y, attacks='clean,fgsm,pgd3', threat=THREAT, **kwargs):
    return evaluate(model, x, y, **{
        'attacks': attacks, 'threat': threat, 'batch_size': 8, 'progress': False, 'save_images': 0, **kwargs})


def undecided_net(x):
    """A network whose logits are centred on these images, so that a perturbation changes some of its verdicts."""
    model = TinyNet().eval()
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
    return model


def labels_of(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def test_verdicts_are_those_of_a_plain_forward_pass():
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    y[::5] = (y[::5] + 1) % 4  # these are wrong when clean, and count as wrong
    report = measured(model, x, y, threat=NEAR)
    clean, fgsm, pgd = report.attacks
    assert clean.correct == tuple((labels_of(model, x) == y).tolist()) and clean.accuracy == 80.
    adv = FGSM()(model, x, y, NEAR)
    expected = (labels_of(model, adv) == y) & torch.tensor(clean.correct)
    assert fgsm.correct == tuple(expected.tolist())
    assert 0 < sum(fgsm.correct) < 16, 'the comparison says nothing'
    assert all(not p or c for p, c in zip(pgd.correct, clean.correct))
    worst = tuple(a and b and c for a, b, c in zip(clean.correct, fgsm.correct, pgd.correct))
    assert report.worst_case == worst and report.data.labels == tuple(y.tolist())
    assert report.data.indices == tuple(range(20)) and report.model.weights_sha256 == weights_sha256(model)
    assert (report.model.name, report.model.num_classes, report.threat.text) == ('TinyNet', 4, 'Linf 0.005')
    assert fgsm.attacked == pgd.attacked == 16 and pgd.attack == PGD(steps=3).to_dict()


def test_outcome_depends_neither_on_batch_size_nor_on_order():
    x, _ = data(24)
    model = undecided_net(x)
    y = labels_of(model, x)
    outcomes = [measured(model, x, y, 'fgsm_rs,pgd2', NEAR, batch_size=b) for b in (1, 7, 24)]
    for other in outcomes[1:]:
        assert [a.correct for a in other.attacks] == [a.correct for a in outcomes[0].attacks]
    order = torch.randperm(24)
    plan, journal = make_plan('fgsm_rs,pgd2', NEAR), Journal()
    Runner(model, plan, journal, 4, 5, torch.device('cpu'), progress=False).run(
        zip(x[order].split(5), y[order].split(5)), order.tolist())
    for outcome in outcomes[0].attacks:
        assert [outcome.correct[i] for i in order] == [
            outcomes[0].attacks[0].correct[i] is not None and journal.correct['clean'][i]
            and journal.correct[outcome.name][i] for i in order.tolist()]
    assert 0 < sum(outcomes[0].attacks[0].correct) < 24, 'the comparison says nothing'


def test_images_in_memory_stay_in_their_order_unless_some_are_chosen():
    x, y = data(24)
    model = TinyNet().eval()
    whole = measured(model, x, y, 'clean')
    some = measured(model, x, y, 'clean', num_examples=8, seed=3)
    assert some.data.num_examples == 8 and sorted(some.data.labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert some['clean'].correct == tuple(whole['clean'].correct[i] for i in some.data.indices)
    assert some.data.indices == measured(model, x, y, 'clean', num_examples=8, seed=3).data.indices
    assert some.data.indices != measured(model, x, y, 'clean', num_examples=8, seed=4).data.indices
    assert (some.data.subset, whole.data.subset) == ('balanced', '')
    assert some.data.sha256 != whole.data.sha256 == measured(model, x, y, 'clean', batch_size=3).data.sha256


def test_a_compiled_network_is_the_one_inside():
    model = timm.create_model('resnet20_cifar', num_classes=4).eval()
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    inside, compiled = (measured(m, x, y, 'clean', allow_chance=True) for m in (model, torch.compile(model)))
    assert compiled.model == inside.model and compiled['clean'].correct == inside['clean'].correct


def test_images_of_a_size_that_the_network_does_not_take():
    model = timm.create_model('vit_tiny_patch16_224', num_classes=4).eval()
    with pytest.raises(InputError, match=r'model: does not take images of shape \(3, 8, 8\) .*; resize them'):
        measured(model, *data(4), 'clean', allow_chance=True)


def test_quick_runs_no_diagnosis():
    x, y = data(8)
    model = undecided_net(x)
    assert not measured(model, x, labels_of(model, x), 'quick', save_images=0).findings


def test_a_torchscript_network_gets_pixels(caplog):
    model = timm.create_model('resnet20_cifar', num_classes=4).eval()
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6) % 4
    measured(torch.jit.trace(model, x), x, y, 'clean', allow_chance=True)
    assert 'A TorchScript network gets pixels in [0, 1]' in caplog.text


def test_a_balanced_choice_from_classes_of_different_sizes_has_a_warning(tmp_path, monkeypatch):
    def warned(sizes, num_examples=8):
        y = torch.repeat_interleave(torch.tensor([0, 1, 3]), torch.tensor(sizes))
        x, network = torch.rand(len(y), 3, 8, 8), TinyNet().eval()
        found = [
            evaluate(network, data, attacks='clean', num_examples=num_examples, allow_chance=True, progress=False,
                     workers=0)
            for data in ((x, y), Subset(TensorDataset(x, y), range(len(y))))]
        assert found[0].data.class_sizes == sizes and found[0].data.subset == 'balanced'
        assert found[1].data.class_sizes == () and found[1].data.subset == 'random'  # labels of tuples are not known
        assert EvaluationReport.from_dict(found[0].to_dict()) == found[0]
        text = f'The images are class-balanced, but classes of the data set have {min(sizes)} to {max(sizes)} images'
        assert (text in str(found[0])) == any(text in t for _, t in words.warnings(found[0]))
        return text in str(found[0])

    # images above the mean of 20 in 60: 3 are 5 %
    assert warned((17, 20, 23)) and not warned((18, 20, 22)) and not warned((17, 20, 23), num_examples=60)
    folder = make_image_folder(tmp_path, ('test',), per_class=6)
    for image in sorted((folder / 'test' / 'b').iterdir())[2:]:
        image.unlink()
    model = timm.create_model('resnet20_cifar', num_classes=2).eval()
    for source in (str(folder / 'test'), ImageFolder(folder / 'test')):
        report = evaluate(model, source, attacks='clean', num_examples=4, allow_chance=True, progress=False, workers=0)
        assert report.data.class_sizes == (6, 2) and 'have 2 to 6 images' in str(report)
    monkeypatch.setattr('timm_robust.evaluation.sources.dataset_labels', lambda dataset: None)
    report = evaluate(model, str(folder / 'test'), attacks='clean', num_examples=4, allow_chance=True, progress=False,
                      workers=0)
    assert report.data.subset == 'random'


def test_batch_dependent_networks_are_attacked_in_whole_batches():
    model = timm.create_model('robustnorm_resnet20_cifar', num_classes=4).eval()
    sizes = []
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    on_pixels = NormalizedModel(set_bn_mode(model, 'batch')).eval()
    on_pixels.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    report = measured(on_pixels, x, y, 'clean,fgsm,pgd3')
    sizes = [size for size in sizes if size > 2]  # two images tell the number of classes
    assert report.settings.batch_dependent and set(sizes) == {8}
    with pytest.raises(InputError, match='pgd-targeted5.*attacks each image separately'):
        measured(on_pixels, x, y, 'pgd_targeted5')
    with pytest.raises(InputError, match='batch_size=1: this network uses batch statistics'):
        measured(on_pixels, x, y, batch_size=1)
    with pytest.raises(InputError, match='worst_case: is not defined'):
        measured(on_pixels, x, y, worst_case=True)
    still = NormalizedModel(set_bn_mode(model, 'population')).eval()
    assert not measured(still, x, y, 'clean').settings.batch_dependent


def test_an_attack_that_cheats_is_caught():
    model, (x, _) = TinyNet().eval(), data()
    y = labels_of(model, x)
    for cheat in (lambda x: (x + 2 * THREAT.eps).clamp(0, 1), lambda x: x + THREAT.eps, lambda x: x * float('nan')):
        class Cheat(FGSM):
            def __call__(self, model, images, labels, threat, cheat=cheat, **how):
                return cheat(images)

        with pytest.raises(RuntimeError, match='fgsm left its threat model'):
            measured(model, x, y, [Cheat()])


@pytest.mark.parametrize('transform', [None, ToTensor()], ids=['pictures', 'tensors'])
def test_classes_of_a_data_set_object_are_those_of_the_network(tmp_path, transform):
    model = timm.create_model('nofrost_resnet20_cifar', pretrained=True)
    names = model.pretrained_cfg['label_names']
    right, missing, renamed = (
        make_image_folder(tmp_path / kind, splits=('test',), classes=classes, per_class=1) / 'test'
        for kind, classes in (('right', names), ('missing', names[1:]), ('renamed', ['a', *names[1:]])))
    report = evaluate(model, ImageFolder(right, transform), attacks='clean', workers=0, progress=False)
    assert report.data.class_names == tuple(names) and report.data.mismatch == ''
    for folder, problem in ((missing, '9 classes, but the network has 10'), (renamed, "class 0 of the data is 'a'")):
        data = ImageFolder(folder, transform)
        for dataset in (data, Subset(data, [3, 1]), ConcatDataset([ImageFolder(right, transform), data])):
            with pytest.raises(InputError, match=problem):
                evaluate(model, dataset, attacks='clean', workers=0, progress=False)
        report = evaluate(
            model, ImageFolder(folder, transform), attacks='clean', workers=0, progress=False,
            allow_class_mismatch=True)
        assert problem in report.data.mismatch and problem in str(report)


def test_what_tensors_and_weights_are_in():
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    wanted = measured(model, x, y, threat=NEAR)
    for images in (x.double(), x.numpy()):
        found = measured(model, images, y.tolist(), threat=NEAR)
        assert [a.correct for a in found.attacks] == [a.correct for a in wanted.attacks]
    for inside in (torch.no_grad(), torch.inference_mode(), torch.autocast('cpu', torch.bfloat16)):
        with inside:
            found = measured(NormalizedModel(model, 0, 1), x.clone(), y, threat=NEAR)
        assert [a.correct for a in found.attacks] == [a.correct for a in wanted.attacks]
    assert 0 < wanted['pgd3'].accuracy < 100
    for low in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(InputError, match='model: has weights in torch.*float32'):
            measured(TinyNet().to(low), x, y)


def test_a_timm_model_that_gets_pixels_is_noticed(caplog):
    inside, (x, y) = timm.create_model('nofrost_resnet20_cifar'), (torch.rand(2, 3, 32, 32), torch.arange(2))
    measured(nn.Sequential(inside), x, y, 'clean')
    assert 'CifarNormFreeNet inside expects normalized images' in caplog.text
    caplog.clear()
    report = measured(NormalizedModel(inside, (.1, .2, .3), .5), x, y, 'clean')
    assert not caplog.text and report.model.mean == (.1, .2, .3) and report.model.std == (.5,)
    with pytest.raises(InputError, match='is already a NormalizedModel'):
        NormalizedModel(NormalizedModel(inside))
    with pytest.raises(InputError, match='mean: is missing'):
        NormalizedModel(TinyNet())


def test_a_network_in_training_mode_is_measured_in_eval_mode_and_put_back():
    x, y = data()
    model = TinyNet(norm=True, drop=.5)
    model.norm.eval()
    model.norm.running_mean.fill_(.1)
    state = copy.deepcopy(model.state_dict())
    report = measured(model, x, labels_of(copy.deepcopy(model).eval(), x), 'clean,pgd2')
    assert report.clean_accuracy == 100
    assert model.training and model.drop.training and not model.norm.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval().drop.train()  # dropout that stays on is part of the network
    assert measured(model, x, labels_of(copy.deepcopy(model).eval(), x), 'clean').clean_accuracy < 100
    assert model.drop.training


class Counting(nn.Module):
    """Counts its passes in training mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer('passes', torch.tensor(0))
        self.seen = False

    def forward(self, x):
        self.passes += self.training
        self.seen = self.seen or self.training
        return x


@pytest.mark.parametrize('form', ['images', 'tensors', 'pictures', 'folder'])
def test_nothing_of_the_caller_is_left_changed(tmp_path, form):
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=2).eval()
    model.stem.add_module('counting', Counting().train())
    folder = make_image_folder(tmp_path, splits=('test',), per_class=3)
    x = torch.rand(6, 3, 32, 32)
    data = {
        'images': (x, torch.arange(6) % 2), 'tensors': TensorDataset(x, torch.arange(6) % 2),
        'pictures': ImageFolder(folder / 'test'), 'folder': folder}[form]
    more = {'images': {}, 'folder': {'workers': 0, 'split': 'test'}}.get(form, {'workers': 0})

    def state():
        return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(),
                [m.training for m in model.modules()], [b.tolist() for b in model.buffers()])

    before = state()
    evaluate(model, data, attacks='clean,fgsm', batch_size=3, progress=False, **more)
    assert state() == before and model.stem.counting.seen, 'a part in training mode was not'


def test_settings_that_would_have_no_effect():
    model, (x, y) = timm.create_model('nofrost_resnet20_cifar', num_classes=4), (torch.rand(4, 3, 32, 32), range(4))
    config = NetworkConfig(model='nofrost_resnet20_cifar', num_classes=4)
    for network, name, settings in (
            (model, 'checkpoint', {}), (config, 'checkpoint', {}), (config, 'device', {}), (model, 'split', {}),
            (model, 'subset', {}), (model, 'surrogate_checkpoint', {'surrogate': model})):
        with pytest.raises(InputError, match=f"{name}='cpu': (is|needs|applies) "):
            evaluate(network, x, list(y), attacks='pgd2', **settings, **{name: 'cpu'})
    with pytest.raises(InputError, match="split='test': applies only to data given by name"):
        evaluate(model, TensorDataset(x, torch.tensor(y)), attacks='clean', split='test')


def test_a_surrogate_has_the_classes_of_the_network():
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    for count in (3, 5):  # with more classes its gradients would be of others, and the accuracy too high
        with pytest.raises(InputError, match="surrogate='TinyNet': has a different number of classes"):
            measured(model, x, y % 3, 'clean,pgd2', surrogate=TinyNet(num_classes=count))
    model, x = timm.create_model('nofrost_resnet20_cifar', pretrained=True), torch.rand(4, 3, 32, 32)
    other = timm.create_model('nofrost_resnet20_cifar', num_classes=12)
    with pytest.raises(InputError, match='has 12 classes, but the model has 10'):
        measured(model, x, torch.arange(4), 'clean,pgd2', surrogate=other)
    other = timm.create_model('nofrost_resnet20_cifar', pretrained=True)
    other.pretrained_cfg['label_names'] = model.pretrained_cfg['label_names'][::-1]
    with pytest.raises(InputError, match='different classes from the model, or in a different order'):
        measured(model, x, torch.arange(4), 'clean,pgd2', surrogate=other)


def test_refusals():
    model, (x, y) = TinyNet().eval(), data()
    partly = TinyNet(norm=True).eval()
    partly.norm.train()
    with pytest.raises(InputError, match=r'model: has a normalization layer in training mode \(norm\)'):
        measured(partly, x, y)
    with pytest.raises(InputError, match=r'images: span \[-'):
        measured(model, x * 2 - 1, y)
    with pytest.raises(InputError, match='labels: hold class 7, but the network has 4 classes'):
        measured(model, x, y + 4)
    with pytest.raises(InputError, match='19 images'):
        measured(model, x[1:], y)
    broken = TinyNet().eval()
    nn.init.constant_(broken.fc.bias, float('nan'))
    with pytest.raises(InputError, match='not finite'):
        measured(broken, x, y)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match='tuple'):
        measured(Pair().eval(), x, y)


@pytest.mark.parametrize('settings, message', [
    (dict(attacks='pdg20'), "attacks='pdg20': unknown attack"),
    (dict(attacks='pgd3,pgd3'), "attacks='pgd3,pgd3': names pgd3 more than once"),
    (dict(attacks='apgd-t', num_classes=3), 'needs at least 4 classes, but the model has 3'),
    (dict(attacks='rays', threat='L2 0.5'), "attacks='rays': supports only Linf"),
    (dict(threat='Linf 8'), "threat='Linf 8': is above 1"),
    (dict(threat='Linf 0'), 'eps=0: allows no perturbation'),
    (dict(attack_settings={'restarts': 2}, attacks='fgsm'), 'restarts=2: fgsm has no such setting'),
    (dict(attack_settings={'step_size': '0'}), "step_size='0': must be positive"),
    (dict(fast_dtype='int8'), "fast_dtype='int8': unknown"),
    (dict(exact=True, fast_dtype='bfloat16'), "fast_dtype='bfloat16': with `exact=True`"),
    (dict(worst_case='false'), "worst_case='false': must be true or false"),
    (dict(seed=1.5), 'seed=1.5: must be a whole number'),
    (dict(seed=-1), 'seed=-1: must be at least 0'),
    (dict(save_images=-1), 'save_images=-1: must be a whole number of at least 0'),
    (dict(batch_size=4.5), 'batch_size=4.5: must be a whole number'),
    (dict(num_examples=21), 'num_examples=21: must be between 1 and 20'),
    (dict(eps_sweep='0,x'), "eps_sweep='0,x': is not a number"),
    (dict(eps_sweep='0,2'), "eps_sweep='0,2': is above 1"),
    (dict(eps_sweep='0.1', attacks='clean'), "eps_sweep='0.1': needs an attack"),
    (dict(gamma_sweep=True, attacks='clean'), 'gamma_sweep=True: needs an attack'),
    (dict(resume=True, output=''), 'resume: needs the folder'),
    (dict(surrogate_checkpoint='x.pth'), "surrogate_checkpoint='x.pth': needs a model name"),
    (dict(checkpoint='x.pth'), "checkpoint='x.pth': applies only to a model given by name"),
    (dict(benchmarks='clean'), "benchmarks='clean': need a timm model"),
    (dict(attacks=None, benchmarks='clean', worst_case=True), 'worst_case=True: has no effect with `benchmarks`'),
    (dict(severities=(1,)), 'severities=(1,): has no effect without `benchmarks`'),
])
def test_bad_settings_are_refused_before_any_work(settings, message, tmp_path):
    x, y = data()
    model = TinyNet(num_classes=settings.pop('num_classes', 4)).eval()
    model.register_forward_pre_hook(lambda module, args: None if len(args[0]) < 8 else pytest.fail('it was begun'))
    with pytest.raises(InputError) as error:
        measured(model, x, y % model.num_classes, **{'output': tmp_path / 'out', **settings})
    assert message in str(error.value) and '--' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_arguments_are_the_settings():
    """What the command line can say, Python can say, with the same defaults. Only Python has `distributed`."""
    arguments = inspect.signature(evaluate).parameters
    for field in dataclasses.fields(EvalConfig):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        assert arguments[field.name].default in (default, None if default == {} else default), field.name
    images = {f.name for f in dataclasses.fields(ImagesConfig)}
    others = set(arguments) - {f.name for f in dataclasses.fields(EvalConfig)} - {'distributed'}
    assert others == {'model', 'data', 'labels', 'checkpoint', 'device'} | {
        'split', 'num_examples', 'subset', 'batch_size', 'workers', 'allow_class_mismatch'} and others - {
        'model', 'data', 'labels', 'checkpoint', 'device'} <= images


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('pictures'), splits=('test',), classes=tuple('abcd'), per_class=4)


def test_models_and_data_in_every_form_are_the_same(pictures, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    config = NetworkConfig(model='nofrost_resnet20_cifar', num_classes=4, checkpoint=str(tmp_path / 'w.pth'))
    stored = ImageFolder(pictures / 'test', ToTensor())
    x, y = torch.stack([image for image, _ in stored]), torch.tensor(stored.targets)
    common = dict(attacks='clean,pgd2', threat=THREAT, seed=5, progress=False, save_images=0)
    named = evaluate(config, ImagesConfig(data_dir=str(pictures), split='test', workers=0), **common)
    assert 0 < named.clean_accuracy and named.data.class_names == tuple('abcd')
    folder = evaluate(model, str(pictures), split='test', workers=0, **common)
    assert folder.data.indices == named.data.indices and folder.data.sha256 == named.data.sha256
    by_index = [[dict(zip(r.data.indices, a.correct)) for a in r.attacks] for r in (named, folder)]
    assert by_index[0] == by_index[1]
    for network in (model, NormalizedModel(model).eval()):
        for images in ((x, y), TensorDataset(x, y), stored, ImageFolder(pictures / 'test')):
            report = evaluate(network, images, workers=0, **common)
            assert [dict(enumerate(a.correct)) for a in report.attacks] == by_index[0], (type(network), type(images))
            assert report.model.weights_sha256 == named.model.weights_sha256 == weights_sha256(model)
            assert report.model.mean == named.model.mean and report.data.num_images == 16


def test_data_that_is_none_is_refused():
    model, (x, y) = TinyNet().eval(), data()
    for images, message in ((3, 'data: is int'), ({'x': x}, 'data: does not return pairs of an image'),
                            ([(x[0], 'cat')], 'data: does not return'), (TensorDataset(x, y[:, None]), 'as a label'),
                            ([(x[0], .5)], 'data: returns 0.5 as a label'), (x, 'labels: are missing'),
                            ((x,), 'data: is tuple'),
                            ('nowhere', 'the model is not a timm model'), ((x[:0], y[:0]), 'data: holds no images')):
        with pytest.raises(InputError, match=message):
            evaluate(model, images, attacks='clean')
    with pytest.raises(InputError, match='data: holds pictures, but the model is not a timm model'):
        evaluate(model, [(Image.new('RGB', (8, 8)), 0)], attacks='clean')
    with pytest.raises(InputError, match="split='test': is a setting of the ImagesConfig"):
        evaluate(timm.create_model('nofrost_resnet20_cifar'), ImagesConfig(), split='test')
    with pytest.raises(InputError, match='model: is int'):
        evaluate(3, x, y)
    with pytest.raises(InputError, match='model: has no weights: it is on the meta device'):
        evaluate(TinyNet().to('meta').eval(), x, y)
    with pytest.raises(InputError, match='output=3: must be text'):
        evaluate(model, x, y, output=3)
    with pytest.raises(InputError, match="surrogate='no_such_model': Unknown model"):
        evaluate(model, x, y, surrogate='no_such_model')


def test_autoattack_and_its_examples():
    x, _ = data(12)
    model = undecided_net(x)
    y = labels_of(model, x)
    report = measured(model, x, y, 'clean,fgsm,autoattack', NEAR, save_images=12, batch_size=12, diagnose=False)
    adv = AutoAttack()(model, x, y, NEAR, seed=index_seeds(0, range(12)))
    result = report['autoattack']
    assert result.correct == tuple((labels_of(model, adv) == y).tolist())
    assert [m['attack'] for m in result.members] == ['apgd', 'apgd-t', 'fab-t', 'square']
    later = [f and not r for f, r in zip(report['fgsm'].correct, result.correct)]
    assert any(later) and any(result.correct), 'the comparison says nothing'
    held = [e for e in report.examples if not e.fooled]
    assert len(held) == sum(result.correct) and {e.attack for e in held} == {'autoattack'}
    fooled = [e.attack for e in report.examples if e.fooled]
    assert sum(a.startswith('autoattack/') for a in fooled) == sum(later) and set(fooled) - {'fgsm'}
    for example in report.examples:
        assert (example.adversarial - example.clean).abs().max() <= NEAR.eps + 1e-6


def test_a_surrogate_gets_no_more_than_a_batch_at_once():
    x, _ = data()
    model, surrogate, sizes = undecided_net(x), TinyNet().eval(), []
    surrogate.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    report = measured(model, x, labels_of(model, x), 'clean,pgd3', batch_size=3, surrogate=surrogate)
    assert max(sizes) == 3 and report.settings.surrogate == 'TinyNet'
    assert report.settings.surrogate_sha256 == weights_sha256(surrogate)
    with pytest.raises(InputError, match='attacks=.apgd-ce.*transfers poorly'):
        measured(model, x, labels_of(model, x), 'apgd-ce', surrogate=surrogate)


def test_a_sweep_is_an_evaluation_for_each_eps():
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    report = measured(model, x, y, 'clean,pgd3', eps_sweep=[.02, 0, '0.002', .3])
    alone = {eps: measured(model, x, y, 'pgd3', Linf(eps)).accuracy('pgd3') for eps in (.002, .02, .3)}
    curve = {p.eps: p.accuracy for p in report.eps_sweep}
    assert curve == {0: 100., **alone} and list(curve) == sorted(curve) and len(set(curve.values())) > 2
    # a step size is made for one eps
    stepped = measured(model, x, y, [PGD(steps=3, step_size=.001)], eps_sweep=[.02])
    assert stepped.eps_sweep[0].accuracy == curve[.02] and stepped.accuracy('pgd3') != curve[.02]


def test_the_first_look_at_a_clean_image_counts():
    """A resume on another device may classify an image otherwise; it must not pass for robust without an attack."""
    x, _ = data()
    model = undecided_net(x)
    y = labels_of(model, x)
    journal, plan = Journal(), make_plan('clean,pgd3', Linf(.9))
    journal.record('clean', list(range(20)), [''] * 20, [True] * 20, 0.)
    y[3] = (y[3] + 1) % 4
    Runner(model, plan, journal, 4, 20, torch.device('cpu'), progress=False).run([(x, y)], range(20))
    assert len(journal.correct['pgd3']) == 20 and journal.correct['pgd3'][3] is False


def test_a_network_that_guesses_is_noticed():
    x, y = torch.rand(60, 3, 8, 8), torch.zeros(60, dtype=torch.long)
    model = TinyNet().eval()
    nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([0., 1., 0., 0.])
    with pytest.raises(InputError, match='0.0 % of the first 60 clean images .* guessing among 4 classes'):
        measured(model, x, y)
    assert measured(model, x, y, allow_chance=True).worst_case_accuracy == 0
    assert measured(model, x, y, 'clean').clean_accuracy == 0


def test_an_apgd_object_and_a_name_are_the_same():
    x, _ = data(8)
    model = undecided_net(x)
    y = labels_of(model, x)
    named = measured(model, x, y, 'apgd-dlr', NEAR, attack_settings={'restarts': 2, 'steps': 5})
    made = measured(model, x, y, [APGD(loss='dlr', restarts=2, steps=5)], 'linf .005')
    assert [(a.name, a.correct, a.attack) for a in named.attacks] == [
        (a.name, a.correct, a.attack) for a in made.attacks]


def test_what_is_written_is_the_report(tmp_path):
    x, _ = data()
    model = undecided_net(x)
    report = measured(model, x, labels_of(model, x), output=tmp_path / 'out', save_images=2)
    assert EvaluationReport.load(tmp_path / 'out') == report and len(report.examples) == 2
    names = {p.name for p in (tmp_path / 'out').iterdir()}
    assert names == {'results.json', 'report.html', 'report.md', 'images.png'}
    with pytest.raises(InputError, match='output=.*already holds results.json'):
        measured(model, x, labels_of(model, x), output=tmp_path / 'out')


def test_optional_work_costs_nothing(tmp_path, monkeypatch, caplog):
    """Also where every image is misclassified, and a diagnosis has nothing to work with."""
    caplog.set_level(logging.INFO)
    x, _ = data()
    model = undecided_net(x)
    y = (labels_of(model, x) + 1) % 4
    report = measured(model, x, y, 'clean,autoattack', output=tmp_path / 'a', save_images=4)
    assert report.worst_case_accuracy == 0 and not report.findings
    assert EvaluationReport.load(tmp_path / 'a') == report
    assert 'Diagnosis: is the robustness real? ...' in caplog.text and 'classifies no image' in caplog.text

    def fail(*args, **kwargs):
        assert EvaluationReport.load(tmp_path / 'b').worst_case_accuracy is not None, 'nothing was written before'
        raise torch.OutOfMemoryError('no memory\nleft')

    monkeypatch.setattr(diagnostics_module, '_zero_gradients', fail)
    monkeypatch.setattr(diagnostics_module, '_GRADIENTS', (fail,))
    report = measured(model, x, labels_of(model, x), 'clean,pgd2', output=tmp_path / 'b', diagnose=True)
    assert EvaluationReport.load(tmp_path / 'b') == report and 'fit into memory (no memory left)' in caplog.text
    assert not list((tmp_path / 'b').glob('progress*'))


@pytest.mark.parametrize('wrapped', ['', 'torch.nn.parallel.DistributedDataParallel'])
def test_processes_share_the_images_and_get_one_report(tmp_path, wrapped):
    """Also in a training loop, where a wrapper exchanges buffers in each pass, of which the processes make different
    numbers."""
    script = f"""
import torch, timm_robust, torch.distributed as dist
from helpers import TinyNet
from timm_robust.evaluation import Runner, evaluate
dist.init_process_group('gloo')
torch.manual_seed(0)
x, y, model = torch.rand(21, 3, 8, 8), torch.arange(21) % 4, {wrapped}(TinyNet(norm=True).eval())
run, seen = Runner.run, []
Runner.run = lambda self, batches, indices: (seen.append(len(indices)), run(self, batches, indices))[1]
report = evaluate(model, x, y, attacks='clean,pgd2', eps_sweep='0.1', batch_size=4, progress=False,
                  output={str(tmp_path / 'out')!r}, save_images=1, diagnose=False)
assert seen == [11 - dist.get_rank()] * 2, seen
report.save({str(tmp_path)!r} + f'/{{dist.get_rank()}}')
"""
    run_distributed(script, tmp_path)
    reports = [EvaluationReport.load(tmp_path / name) for name in '01']
    assert reports[0] == reports[1] == EvaluationReport.load(tmp_path / 'out')
    torch.manual_seed(0)
    x, y, model = torch.rand(21, 3, 8, 8), torch.arange(21) % 4, TinyNet(norm=True).eval()
    alone = evaluate(model, x, y, attacks='clean,pgd2', eps_sweep='0.1', batch_size=7, progress=False, diagnose=False)
    assert [a.correct for a in alone.attacks] == [a.correct for a in reports[0].attacks]
    assert alone.eps_sweep == reports[0].eps_sweep and alone.data == reports[0].data
    assert alone.model == reports[0].model


def test_processes_with_images_or_networks_of_their_own(tmp_path):
    """As in the validation of a training loop: halves of different batches must not make up one report."""
    script = f"""
import copy, torch, timm_robust, torch.distributed as dist
from helpers import TinyNet
from timm_robust import InputError
from timm_robust.evaluation import evaluate
dist.init_process_group('gloo')
torch.manual_seed(0)
x, y, model = torch.rand(12, 3, 8, 8), torch.arange(12) % 4, TinyNet().eval()
own_x, own_model = x.clone(), copy.deepcopy(model)
own_x[11] += .001 * dist.get_rank()  # the last of twelve images
own_model.fc.bias.data += .001 * dist.get_rank()
settings = dict(attacks='clean,pgd2', progress=False, diagnose=False)
own_threat = dict(settings, threat=['Linf 0.1', 'Linf 0.2'][dist.get_rank()])
own_y, longer = (y + dist.get_rank()) % 4, slice(dist.get_rank(), None)
for name, args, kwargs in (
        ('data', (model, own_x, y), settings), ('data', (model, x, own_y), settings),
        ('data', (model, x[longer], y[longer]), settings), ('model', (own_model, x, y), settings),
        ('settings', (model, x, y), own_threat)):
    try:
        evaluate(*args, **kwargs)
        raise SystemExit(f'{{name}} not refused')
    except InputError as error:
        assert error.argument == name and 'distributed=False' in str(error), error
evaluate(model, x.clone(), y.clone(), **settings)
rows = slice(dist.get_rank(), None, 2)
evaluate(own_model, x[rows], y[rows], distributed=False, **settings).save({str(tmp_path)!r} + f'/{{dist.get_rank()}}')
"""
    run_distributed(script, tmp_path)
    torch.manual_seed(0)
    x, y, model = torch.rand(12, 3, 8, 8), torch.arange(12) % 4, TinyNet().eval()
    for rank in range(2):
        report = EvaluationReport.load(tmp_path / str(rank))
        alone = evaluate(model, x[rank::2], y[rank::2], attacks='clean,pgd2', progress=False, diagnose=False)
        assert report.data == alone.data and report.data.num_examples == 6
        assert report.model == alone.model
        model.fc.bias.data += .001  # the network of the second process


def test_pixels_reach_the_attack_unnormalized():
    # the same numbers through NormalizedModel and through a network that normalizes by hand
    model = timm.create_model('nofrost_resnet20_cifar').eval()
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    wrapped = NormalizedModel(model).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    a = FGSM().craft(wrapped, x, y, THREAT)
    b = FGSM().craft(lambda p: model((p - mean) / std), x, y, THREAT)
    assert torch.equal(a, b) and (a - x).abs().max() <= THREAT.eps * (1 + 3e-6)


def test_no_pass_of_the_network_is_in_tf32():
    x, y = data(8)
    seen = []

    def allowed():
        if hasattr(torch.backends.cudnn, 'conv'):
            places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
            return tuple(place.fp32_precision == 'tf32' for place in places)
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # before torch 2.9

    class Recorder(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            seen.append(allowed())
            return self.inside(x)

    inside = undecided_net(x)
    inside.norm = nn.BatchNorm2d(8).eval()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('high')
        Recorder(inside)(x)
        assert seen.pop() == (True, True), 'nothing to switch off'
        measured(Recorder(inside).eval(), x, labels_of(inside, x), 'clean,pgd2,fab2', NEAR, exact=True)
        recorder, y = NormalizedModel(Recorder(inside), 0, 1).eval(), labels_of(inside, x)
        for measure in (
                lambda: diagnostics_module.diagnose(recorder, x, y, NEAR, steps=(1, 2, 3), black_box_queries=5),
                lambda: loss_surface(recorder, x, y, NEAR),
                lambda: measure_properties(recorder, x, y, NEAR, steps=2),
                lambda: compare_bn_modes(recorder, x, y, make_plan('clean,pgd2', NEAR), batch_size=4)):
            assert len(seen) > 5 and not any(map(any, seen))
            seen.clear()
            measure()
        assert len(seen) > 5 and not any(map(any, seen))
        assert torch.get_float32_matmul_precision() == 'high' and allowed() == (True, True)
    finally:
        torch.set_float32_matmul_precision(before)


class Wrapped(nn.Module):
    """Normalizes by itself, and calls its network `module`, as wrappers of libraries do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module((x - .5) / .25)


def test_only_wrappers_of_libraries_are_looked_into(caplog):
    torch.manual_seed(0)
    inner = timm.create_model('nofrost_resnet20_cifar', num_classes=3).eval()
    x = torch.rand(8, 3, 32, 32)
    for model, normalized in ((Wrapped(inner), False), (nn.DataParallel(inner), True), (inner, True)):
        caplog.clear()
        with torch.no_grad():
            expected = (NormalizedModel(inner) if normalized else model)(x).argmax(1)
        report = measured(model, x, expected, attacks='clean', allow_chance=True)
        assert report.clean_accuracy == 100
        assert ('unless Wrapped normalizes them' in caplog.text) == (not normalized)
    assert InputSpace.of(torch.compile(inner, backend='eager')) == InputSpace.of(inner)
    assert not InputSpace.of(inner).is_pixels


def test_a_folder_of_classes_has_no_split(tmp_path):
    root = make_image_folder(tmp_path / 'data', splits=('train', 'test'), per_class=4)
    model = timm.create_model('nofrost_resnet20_cifar', num_classes=2).eval()
    for folder, split, recorded in ((root, 'test', 'test'), (root / 'train', 'validation', None)):
        report = evaluate(
            model, str(folder), split=split, attacks='clean', allow_chance=True, progress=False, workers=0)
        assert report.data.split == recorded and report.data.num_examples == 8
