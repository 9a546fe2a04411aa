"""Checkpoints as their authors left them become weights of named models."""
import json
import pickle
import re

import pytest
import timm
import torch
import torch.nn as nn
from helpers import make_image_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_tensor

from timm_robust.cli.main import main
from timm_robust.inputs import weights_sha256
from timm_robust.inputs.weights import fixed_input, logits_of_fixed_input
from timm_robust.layers import set_bn_mode
from timm_robust.models._build import CIFAR10_MEAN, CIFAR10_STD


def convert(tmp_path, content, name, *more, code=0):
    path, out = tmp_path / 'given.pth', tmp_path / 'out.safetensors'
    torch.save(content, path)
    assert main(['convert', str(path), '--model', name, '-o', str(out), *more]) == code
    if code:
        return None, None
    return load_file(out), json.loads((tmp_path / 'out.safetensors.json').read_text())


def spoilt(model):
    torch.manual_seed(3)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(.5, 1.)
    return model.eval()


class PaperNorm(nn.BatchNorm2d):
    """RobustNorm as its authors keep it: a BatchNorm2d whose running_var is the range."""

    def forward(self, x):
        y = (x - self.running_mean.view(1, -1, 1, 1)) / (self.running_var.view(1, -1, 1, 1) ** .2 + self.eps)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class PaperVGG(nn.Module):
    """The RobustNorm repository's VGG11, from its description."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for v in (64, 'M', 128, 'M', 256, 256, 'M', 512, 512, 'M', 512, 512, 'M'):
            if v == 'M':
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, v, 3, padding=1), PaperNorm(v), nn.ReLU()]
                channels = v
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU(),
            nn.Linear(512, 10))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


@pytest.mark.parametrize('wrapped', [True, False])
def test_nofrost_authors_checkpoints(tmp_path, wrapped, capsys):
    source = spoilt(timm.create_model('nf_resnet26', num_classes=7))
    content = (nn.DataParallel(source) if wrapped else source).state_dict()
    weights, report = convert(tmp_path, content, 'nofrost_resnet26', '--num-classes', '7')
    model = timm.create_model('nofrost_resnet26', num_classes=7)
    model.load_state_dict(weights, strict=True)
    assert torch.equal(logits_of_fixed_input(model.eval()), logits_of_fixed_input(source))
    torch.testing.assert_close(torch.tensor(report['logits_of_fixed_input']), logits_of_fixed_input(model))
    assert report['weights_sha256'] == weights_sha256(model) and not report['dropped'] and not report['added']
    assert len(report['renamed']) == (len(content) if wrapped else 0)
    assert weights_sha256(weights) == report['weights_sha256']
    printed = capsys.readouterr().out
    assert 'renamed:' in printed and ('module.stem.conv.weight -> stem.conv.weight' in printed) is wrapped


def test_float16_halves_the_file_and_is_hashed_as_the_network_that_loads_it(tmp_path, capsys):
    source = spoilt(timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d'))
    content = source.state_dict()
    images = make_image_folder(tmp_path / 'images', splits=('validation',), classes='abcdefghij', per_class=3)
    flags = ('--model-kwargs', 'norm_layer=batchnorm2d', '--dtype', 'float16', '--data-dir', str(images), '-j', '0')
    weights, report = convert(tmp_path, content, 'robustnorm_resnet20_cifar', *flags)
    assert {v.dtype for v in weights.values()} == {torch.float16, torch.int64}
    model = timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d').eval()
    model.load_state_dict(weights)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}
    assert report['weights_sha256'] == weights_sha256(weights) == weights_sha256(model) != weights_sha256(source)
    torch.testing.assert_close(torch.tensor(report['logits_of_fixed_input']), logits_of_fixed_input(model))
    for key, value in content.items():
        assert torch.equal(model.state_dict()[key], value.half().float() if value.is_floating_point() else value)
    x = torch.cat([to_tensor(Image.open(p).convert('RGB'))[None] for p in sorted(images.rglob('*.png'))])
    x = (x - x.new_tensor(CIFAR10_MEAN).view(3, 1, 1)) / x.new_tensor(CIFAR10_STD).view(3, 1, 1)
    with torch.no_grad():
        change = 100 * (model(x).softmax(1) - source(x).softmax(1)).abs().max().item()
    told = re.search(r'of (\d+) images by at most (\S+) percentage points', capsys.readouterr().out)
    assert int(told[1]) == len(x) and float(told[2]) == pytest.approx(change, rel=.05)


def test_the_file_is_float32_unless_asked_whatever_the_checkpoint_was(tmp_path):
    source = spoilt(timm.create_model('robustnorm_resnet20_cifar')).half()
    weights, report = convert(tmp_path, source.state_dict(), 'robustnorm_resnet20_cifar')
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float32}
    assert report['weights_sha256'] == weights_sha256(weights) == weights_sha256(source)


@pytest.mark.parametrize('first, last', [(1e-6, 100), (1, 1e7)])  # near float16's smallest numbers, beyond its largest
def test_float16_is_refused_where_it_would_change_the_network(tmp_path, capsys, first, last):
    images = make_image_folder(tmp_path / 'images', splits=('validation',), classes='abcdefghij', per_class=1)
    torch.manual_seed(0)
    model = timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d').eval()
    model.conv1.weight.data.mul_(first)
    model.bn1.weight.data.fill_(6e4)
    model.fc.weight.data.mul_(last)
    torch.save(model.state_dict(), tmp_path / 'big.pth')
    command = ['convert', str(tmp_path / 'big.pth'), '--model', 'robustnorm_resnet20_cifar', '--model-kwargs',
               'norm_layer=batchnorm2d', '--dtype', 'float16', '-o', str(tmp_path / 'big.safetensors')]
    for more, message in (([], 'pass --data-dir'), (['--data-dir', str(images), '-j', '0'], 'use float32')):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and '\n' not in error
        assert not (tmp_path / 'big.safetensors').exists()


def test_robustnorm_repository_resnet(tmp_path):
    source = spoilt(timm.create_model('robustnorm_resnet20_cifar', norm_layer='batchnorm2d'))
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = PaperNorm
    content = {'epoch': 3, 'state_dict': nn.DataParallel(source).state_dict(), 'acc': 12.5, 'best_acc': 13.}
    weights, report = convert(tmp_path, content, 'robustnorm_resnet20_cifar')
    model = timm.create_model('robustnorm_resnet20_cifar').eval()
    model.load_state_dict(weights)
    set_bn_mode(model, 'population')
    torch.testing.assert_close(logits_of_fixed_input(model), logits_of_fixed_input(source))
    assert all(key.endswith('num_batches_tracked') for key in report['dropped']) and len(report['dropped']) == 21
    assert report['taken_from'] == 'state_dict'


def test_robustnorm_repository_vgg(tmp_path):
    source = PaperVGG().eval()
    weights, report = convert(
        tmp_path, {'state_dict': nn.DataParallel(source).state_dict()}, 'robustnorm_vgg11_cifar', '--model-kwargs',
        'hidden_size=512')
    model = timm.create_model('robustnorm_vgg11_cifar', hidden_size=512).eval()
    model.load_state_dict(weights)
    x = fixed_input(model)
    torch.testing.assert_close(model(x), source(x))
    assert report['renamed']['module.classifier.1.weight'] == 'pre_logits.fc1.weight'


def test_training_checkpoints_and_the_choice_of_weights(tmp_path):
    plain, average = (spoilt(timm.create_model('nofrost_resnet11_mnist')) for _ in range(2))
    for p in average.parameters():
        p.data.mul_(1.01)
    content = {'state_dict': plain.state_dict(), 'state_dict_ema': average.state_dict(), 'epoch': 2,
               'args': {'model': 'x'}}
    for flags, wanted, source in (([], average, 'state_dict_ema'), (['--no-use-ema'], plain, 'state_dict')):
        (tmp_path / 'out.safetensors').unlink(missing_ok=True)
        weights, report = convert(tmp_path, content, 'nofrost_resnet11_mnist', *flags)
        assert all(torch.equal(weights[k], v) for k, v in wanted.state_dict().items())
        assert report['taken_from'] == source


def test_counters_a_model_wants_are_added(tmp_path):
    model = timm.create_model('resnet10t', num_classes=3)
    content = {k: v for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked')}
    weights, report = convert(tmp_path, content, 'resnet10t', '--num-classes', '3')
    assert set(weights) == set(model.state_dict()) and report['added']


class Payload:
    def __reduce__(self):
        return open, ('/tmp/pwned', 'w')


@pytest.mark.parametrize('spoil, message', [
    (lambda d: d.pop('head.fc.weight'), '(missing head.fc.weight)'),
    (lambda d: d.update(extra=torch.zeros(1)), '(left over extra)'),
    (lambda d: d.update({'head.fc.weight': torch.zeros(3, 3)}), '(3, 3) under head.fc.weight where'),
    (lambda d: d.update({'head.fc.weight': d['head.fc.weight'] * float('nan')}), 'head.fc.weight is not finite'),
])
def test_every_key_is_accounted_for(tmp_path, capsys, spoil, message):
    content = timm.create_model('nofrost_resnet11_mnist').state_dict()
    spoil(content)
    convert(tmp_path, content, 'nofrost_resnet11_mnist', code=2)
    error = capsys.readouterr().err.strip()
    assert message in error and '\n' not in error and not (tmp_path / 'out.safetensors').exists()


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    def fails(content, message, write=True):
        path = tmp_path / 'x.pth'
        if write:
            path.write_bytes(content)
        out = str(tmp_path / 'o.safetensors')
        assert main(['convert', str(path), '--model', 'nofrost_resnet11_mnist', '-o', out]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and '\n' not in error

    fails(b'', 'no such file', write=False)
    fails(b'nothing', 'is truncated or not a checkpoint')
    torch.save({'state_dict': Payload()}, tmp_path / 'evil.pth')
    fails((tmp_path / 'evil.pth').read_bytes(), 'holds code, which is never run')
    fails(pickle.dumps({'state_dict': Payload()}), 'x.pth')
    torch.save({'weights of mine': 3}, tmp_path / 'odd.pth')
    fails((tmp_path / 'odd.pth').read_bytes(), 'has no weights under')
    (tmp_path / 'o.safetensors').write_text('held')
    fails((tmp_path / 'odd.pth').read_bytes(), 'already exists; choose another name')


def test_weights_in_the_package_load_with_the_network_off(tmp_path, monkeypatch):
    from timm_robust.models import _build
    monkeypatch.setattr(_build, 'WEIGHTS_DIR', tmp_path)
    monkeypatch.setattr('socket.socket.connect', lambda *args: pytest.fail('the network was asked'))
    own = spoilt(timm.create_model('robustnorm_resnet20_cifar'))
    save_file(own.state_dict(), tmp_path / 'robustnorm_resnet20_cifar.robustnorm_cifar10.safetensors')
    for name in ('robustnorm_resnet20_cifar', 'robustnorm_resnet20_cifar.robustnorm_cifar10'):
        model = timm.create_model(name, pretrained=True)
        assert weights_sha256(model) == weights_sha256(own)
    assert timm.create_model('robustnorm_resnet20_cifar', pretrained=True, num_classes=3).fc.out_features == 3
    other = spoilt(timm.create_model('robustnorm_resnet20_cifar', num_classes=4))
    save_file(other.state_dict(), tmp_path / 'mine.safetensors')
    overlay = {'file': str(tmp_path / 'mine.safetensors'), 'num_classes': 4}
    model = timm.create_model(
        'robustnorm_resnet20_cifar', pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    assert weights_sha256(model) == weights_sha256(other)
