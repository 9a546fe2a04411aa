import os
import subprocess
import sys
import time

import pytest
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

import timm_robust  # noqa: F401
from timm_robust.attacks import PGD, InputSpace
from timm_robust.errors import InputError, PretrainedWeightsError
from timm_robust.inputs import weights_sha256
from timm_robust.layers import RobustNorm2d
from timm_robust.models import CifarNormFreeNet, CifarResNet, CifarVGG, NormalizedModel

NAMES = [n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('timm_robust.')]
SMALL = [
    'nofrost_resnet11_mnist', 'nofrost_resnet20_cifar', 'nofrost_nfnet18_cifar', 'robustnorm_resnet20_cifar',
    'robustnorm_vgg11_cifar']


def test_the_names_of_the_design_are_there():
    expected = {
        *(f'nofrost_resnet{d}' for d in (26, 50, 101)), 'nofrost_resnet20_cifar', 'nofrost_resnet26_cifar',
        'nofrost_nfnet18_cifar',
        *(f'robustnorm_resnet{d}' for d in (18, 34, 50, 101)), *(f'robustnorm_vgg{d}' for d in (11, 13, 16, 19)),
        *(f'robustnorm_resnet{d}_cifar' for d in (20, 38, 50)), *(f'robustnorm_vgg{d}_cifar' for d in (11, 16)),
    }
    assert expected <= set(NAMES)


def test_import_leaves_timms_names_alone_and_stays_light():
    script = (
        'import sys, timm; before = set(timm.list_models()); loaded = set(sys.modules)\n'
        'entries = {n: timm.model_entrypoint(n) for n in before}\n'
        'import timm_robust\n'
        'assert before < set(timm.list_models())\n'
        'assert all(timm.model_entrypoint(n) is e for n, e in entries.items())\n'
        "new = {m.split('.')[0] for m in set(sys.modules) - loaded} - {'timm_robust', 'timm', 'torch'}\n"
        'print(sorted(m for m in new if m not in sys.stdlib_module_names))\n'
    )
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'


@pytest.mark.parametrize('depth', [26, 50, 101])
def test_nofrost_is_timms_nf_resnet(depth):
    with torch.device('meta'):
        ours = timm.create_model(f'nofrost_resnet{depth}')
        theirs = timm.create_model(f'nf_resnet{depth}')
    assert type(ours) is type(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_nofrost_and_nf_resnet_exchange_weights():
    ours, theirs = timm.create_model('nofrost_resnet26').eval(), timm.create_model('nf_resnet26').eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


def test_authors_checkpoint_loads_through_timm(tmp_path):
    source = timm.create_model('nf_resnet26')
    torch.save({f'module.{k}': v for k, v in source.state_dict().items()}, tmp_path / 'best_RA.pth')
    model = timm.create_model('nofrost_resnet26', checkpoint_path=str(tmp_path / 'best_RA.pth'))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.parametrize('in_chans,num_classes', [(1, 5), (3, 10)])
def test_local_dir_round_trip(name, in_chans, num_classes, tmp_path):
    extra = {} if 'vgg' in name else {'drop_path_rate': 0.1}  # timm's VGG has no drop path
    model = timm.create_model(name, in_chans=in_chans, num_classes=num_classes, **extra).eval()
    save_for_hf(model, str(tmp_path / 'export'), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "export"}', pretrained=True).eval()
    x = torch.randn(2, in_chans, 32, 32)
    assert torch.equal(model(x), again(x))
    assert [f.name for f in (tmp_path / 'export').glob('*model*')] == ['model.safetensors']


def test_exported_nofrost_loads_without_the_plugin_in_timm(tmp_path):
    save_for_hf(timm.create_model('nofrost_resnet26', num_classes=3), str(tmp_path), safe_serialization=True)
    config = (tmp_path / 'config.json').read_text().replace('"nofrost_resnet26"', '"nf_resnet26"')
    (tmp_path / 'config.json').write_text(config)
    script = f"import timm, sys; m = timm.create_model('local-dir:{tmp_path}', pretrained=True); " \
             "assert 'timm_robust' not in sys.modules; print(m.num_classes)"
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.stdout.strip() == '3', done.stderr


@pytest.mark.parametrize('name', SMALL)
def test_features_only(name):
    model = timm.create_model(name, features_only=True)
    size = 64
    outputs = model(torch.randn(2, model.in_chans, size, size))
    assert [o.shape[1] for o in outputs] == model.feature_info.channels()
    assert [size // o.shape[-1] for o in outputs] == model.feature_info.reduction()


@pytest.mark.parametrize('name', ['nofrost_resnet20_cifar', 'robustnorm_resnet20_cifar'])
def test_gradient_checkpointing_changes_nothing(name):
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('name', ['nofrost_resnet20_cifar', 'robustnorm_resnet20_cifar'])
def test_cifar_networks_keep_the_resolution_of_the_stem(name):
    stem, *stages = timm.create_model(name).forward_intermediates(torch.randn(2, 3, 32, 32), intermediates_only=True)
    assert stem.shape[-1] == 32 and [s.shape[-1] for s in stages] == [32, 16, 8]


@pytest.mark.parametrize('name', ['nofrost_resnet20_cifar', 'robustnorm_resnet20_cifar'])
def test_a_stem_of_stride_2(name):
    model = timm.create_model(name, features_only=True, stem_stride=2, stem_chs=24)
    outputs = model(torch.randn(2, 3, 32, 32))
    assert [o.shape[-1] for o in outputs] == [16, 16, 8, 4] and outputs[0].shape[1] == 24
    assert model.feature_info.reduction() == [2, 2, 4, 8]
    assert model.feature_info.channels() == [o.shape[1] for o in outputs]


@pytest.mark.parametrize('name,bad,line', [
    ('robustnorm_resnet20_cifar', {'stem_chs': 7}, 'stem_chs=7: must be even'),
    ('robustnorm_resnet20_cifar', {'stem_stride': 3}, 'stem_stride=3: must be 1 or 2'),
    ('nofrost_resnet20_cifar', {'stem_stride': 3}, 'stem_stride=3: must be 1 or 2')])
def test_a_stem_that_cannot_be_built(name, bad, line):
    with pytest.raises(ValueError, match=line):
        timm.create_model(name, **bad)


def test_depths_of_the_small_networks():
    def convolutions(name):
        model = timm.create_model(name)
        return sum(
            1 for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and 'downsample' not in n)
    # with the classifier: 6n + 2 for basic blocks, 9n + 2 for bottlenecks
    assert convolutions('robustnorm_resnet20_cifar') + 1 == 20
    assert convolutions('robustnorm_resnet38_cifar') + 1 == 38
    assert convolutions('robustnorm_resnet50_cifar') + 1 == 9 * 8 + 2
    assert convolutions('nofrost_resnet20_cifar') + 1 == 20
    assert convolutions('nofrost_resnet26_cifar') + 1 == 26
    assert convolutions('nofrost_nfnet18_cifar') + 1 == 18
    assert convolutions('nofrost_resnet11_mnist') + 1 == 11
    assert type(timm.create_model('robustnorm_vgg16_cifar')) is CifarVGG
    assert convolutions('robustnorm_vgg16_cifar') == 13


@pytest.mark.parametrize('name', ['robustnorm_resnet20_cifar', 'robustnorm_vgg11_cifar', 'robustnorm_vgg11'])
def test_batch_norm_twin_by_name(name):
    with torch.device('meta'):
        model = timm.create_model(name, norm_layer='batchnorm2d')
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize('name', ['robustnorm_resnet20_cifar', 'robustnorm_vgg11_cifar', 'robustnorm_resnet18'])
def test_norm_by_name_with_arguments(name):
    with torch.device('meta'):
        powered = timm.create_model(name, norm_kwargs={'power': .5})
        named = timm.create_model(name, norm_layer='robustnorm2d')
        instance = timm.create_model(name, norm_layer='instancenorm2d')
    norms = [m for m in powered.modules() if isinstance(m, RobustNorm2d)]
    assert norms and all(m.power == .5 for m in norms)
    assert sum(isinstance(m, RobustNorm2d) and m.power == .2 for m in named.modules()) == len(norms)
    instances = [m for m in instance.modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    assert len(instances) == len(norms) and all(m.affine and not m.track_running_stats for m in instances)
    assert not any(isinstance(m, RobustNorm2d) for m in instance.modules())
    with pytest.raises(ValueError, match="norm_layer='foo': choose robustnorm2d, instancenorm2d"):
        timm.create_model(name, norm_layer='foo')


def test_arguments_of_norms_are_kept_by_an_export(tmp_path):
    args = {'norm_layer': 'robustnorm2d', 'norm_kwargs': {'power': .5}}
    model = timm.create_model('robustnorm_resnet20_cifar', **args)
    save_for_hf(model, str(tmp_path / 'export'), safe_serialization=True, model_args=args)
    again = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert {m.power for m in again.modules() if isinstance(m, RobustNorm2d)} == {.5}


@pytest.mark.parametrize('name, other', [
    ('robustnorm_resnet20_cifar', {'norm_layer': 'batchnorm2d'}),
    ('robustnorm_resnet20_cifar', {'norm_kwargs': {'power': .5}}), ('resnet20_cifar', {'norm_layer': 'robustnorm2d'})])
def test_weights_of_a_tag_are_for_its_norm(name, other):
    with pytest.raises(ValueError, match=f'norm_layer, norm_kwargs: weights of {name}.*leave both'):
        timm.create_model(name, pretrained=True, **other)
    own = {'norm_layer': 'robustnorm2d' if name.startswith('robustnorm') else 'batchnorm2d'}
    assert weights_sha256(timm.create_model(name, pretrained=True, **own)) == weights_sha256(
        timm.create_model(name, pretrained=True))


def test_unknown_argument_raises():
    for name in SMALL:
        with pytest.raises(TypeError):
            timm.create_model(name, not_an_argument=1)


def test_missing_weights_are_one_line(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    script = "import timm, timm_robust; timm.create_model('nofrost_resnet50', pretrained=True)"
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    last = done.stderr.strip().splitlines()[-1]
    for part in ('nofrost_resnet50.nofrost_linf8_in1k', 'the Hugging Face Hub at timm-robust/nofrost_resnet50',
                 'this package has no weights of this network: train it', 'checkpoint_path=PATH'):
        assert part in last


def test_weights_that_cannot_be_had_fail_at_once(caplog):
    begun = time.monotonic()
    with pytest.raises(PretrainedWeightsError, match='nofrost_resnet50.nofrost_linf8_in1k.*cannot be fetched'):
        timm.create_model('nofrost_resnet50', pretrained=True)  # nobody listens where the tests have their Hub
    assert time.monotonic() - begun < 5 and not caplog.records


def test_tag_without_location_and_missing_file():
    with pytest.raises(PretrainedWeightsError, match='nofrost_resnet11_mnist.*no location'):
        timm.create_model('nofrost_resnet11_mnist', pretrained=True)
    with pytest.raises(PretrainedWeightsError, match='/nowhere.*has weights of nofrost_resnet20_cifar.madry'):
        timm.create_model(
            'nofrost_resnet20_cifar', pretrained=True, pretrained_cfg_overlay=dict(file='/nowhere.safetensors'))


def test_tags_can_be_found():
    tags = timm.list_pretrained('*linf8*')
    assert 'nofrost_resnet50.nofrost_linf8_in1k' in tags
    assert 'nofrost_resnet26_cifar.nofrost_linf8_cifar10' in tags


@pytest.mark.parametrize('name', ['resnet20_cifar', 'vgg11_cifar'])
def test_a_network_has_the_norm_of_its_name(name, tmp_path):
    def norms(model):
        return {type(m).__name__ for m in model.modules() if 'Norm' in type(m).__name__}

    assert norms(timm.create_model(f'{name}.standard_cifar10', norm_layer='robustnorm2d')) == {'RobustNorm2d'}
    for tagged, norm, in_chans in (
            (f'{name}.standard_cifar10', 'BatchNorm2d', 3), (f'{name}.standard_fashion_mnist', 'BatchNorm2d', 1),
            (f'robustnorm_{name}.robustnorm_cifar10', 'RobustNorm2d', 3),
            (f'robustnorm_{name}.robustnorm_fashion_mnist', 'RobustNorm2d', 1)):
        model = timm.create_model(tagged).eval()
        assert norms(model) == norms(timm.create_model(tagged.split('.')[0])) == {norm}
        assert model.default_cfg['input_size'][0] == in_chans
        assert model.default_cfg['hf_hub_id'] == f'timm-robust/{tagged}'
        x = torch.randn(2, *model.default_cfg['input_size'])
        assert model(x).shape == (2, 10)
        # as a training run exports it: under a tag of its own
        config = {'pretrained_cfg': {'tag': 'new'}}
        save_for_hf(model, str(tmp_path / tagged), safe_serialization=True, model_config=config)
        again = timm.create_model(f'local-dir:{tmp_path / tagged}', pretrained=True).eval()
        assert torch.equal(model(x), again(x))


def test_normalized_model():
    model = timm.create_model('nofrost_resnet20_cifar').eval()
    wrapped = NormalizedModel(model)
    pixels = torch.rand(2, 3, 32, 32)
    mean = torch.tensor(model.pretrained_cfg['mean']).view(3, 1, 1)
    std = torch.tensor(model.pretrained_cfg['std']).view(3, 1, 1)
    assert torch.equal(wrapped(pixels), model((pixels - mean) / std))
    assert set(wrapped.state_dict()) == {f'model.{k}' for k in model.state_dict()}
    inside = nn.Sequential(wrapped)
    for make, words in (
            (lambda: NormalizedModel(inside, .5, .5), 'is already a NormalizedModel'),
            (lambda: NormalizedModel(model, std=0), 'std=0: must be finite and positive'),
            (lambda: NormalizedModel(model, mean=float('nan')), 'mean=nan: must be finite'),
            (lambda: PGD()(inside, pixels, [0, 1], 'Linf 8/255', space=InputSpace.of(model)), 'normalized twice')):
        with pytest.raises(InputError, match=words):
            make()


def test_classes_are_configurations_of_timms():
    from timm.models import VGG, NormFreeNet, ResNet
    assert issubclass(CifarNormFreeNet, NormFreeNet)
    assert issubclass(CifarResNet, ResNet)
    assert issubclass(CifarVGG, VGG)
