"""One reader for every checkpoint: what is in it reaches the right place, or one line says why not."""
import argparse
import itertools
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from helpers import TinyNet, state_equal
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from timm_robust.errors import InputError
from timm_robust.inputs import (
    convert_state_dict,
    load_weights,
    read_checkpoint,
    weights_sha256,
    write_weights,
)
from timm_robust.inputs.weights import fit_weights
from timm_robust.layers import convert_aux_norm
from timm_robust.models import NormalizedModel


@pytest.fixture
def net():
    torch.manual_seed(1)
    return TinyNet(norm=True)


def saved(tmp_path, content, name='x.pth'):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def loads(tmp_path, content, net, **kwargs):
    torch.manual_seed(2)
    other = TinyNet(norm=True)
    found = load_weights(other, saved(tmp_path, content), **kwargs)
    assert state_equal(other, net)
    return found


@pytest.mark.parametrize('prefixes', [
    p for n in range(4) for p in itertools.permutations(('model.', 'module.', '_orig_mod.'), n)], ids=''.join)
def test_wrappers_in_any_order(tmp_path, net, prefixes):
    prefix = ''.join(prefixes)
    content = {f'{prefix}{k}': v for k, v in net.state_dict().items()}
    _, conversion = loads(tmp_path, content, net)
    assert len(conversion.renamed) == (len(content) if prefix else 0)


def test_real_wrappers(tmp_path, net):
    wrapped = torch.nn.DataParallel(torch.compile(NormalizedModel(net, (0., 0., 0.), (1., 1., 1.))))
    loads(tmp_path, wrapped.state_dict(), net)
    _, conversion = loads(tmp_path, AveragedModel(net).state_dict(), net)
    assert conversion.dropped == {'n_averaged': 'a counter of averaged models, which the model does not keep'}


def test_a_submodule_that_is_called_like_a_wrapper_keeps_its_name():
    net = torch.nn.ModuleDict({'model': torch.nn.Linear(2, 3), 'fc': torch.nn.Linear(2, 3)})
    found = convert_state_dict(net.state_dict(), net)
    assert not found.renamed and torch.equal(found.state_dict['model.weight'], net.model.weight)


@pytest.mark.parametrize('outer', ['state_dict', 'model', 'net', 'weights', 'state_dict_ema', 'model_ema'])
def test_outer_keys(tmp_path, net, outer):
    checkpoint, _ = loads(tmp_path, {outer: net.state_dict(), 'epoch': 3, 'optimizer': {0: torch.ones(1)}}, net)
    assert checkpoint.source == outer and checkpoint.keys == (outer, 'epoch', 'optimizer')
    checkpoint, _ = loads(tmp_path, {'model': {outer: net.state_dict()}}, net)
    assert checkpoint.source == f'model.{outer}'


def test_averaged_weights_are_a_choice(tmp_path, net):
    other = {k: v + 1 for k, v in net.state_dict().items()}
    loads(tmp_path, {'state_dict': other, 'state_dict_ema': net.state_dict()}, net)
    loads(tmp_path, {'state_dict': net.state_dict(), 'state_dict_ema': other}, net, use_ema=False)
    loads(tmp_path, {'state_dict': net.state_dict(), 'state_dict_ema': None}, net)


@pytest.mark.parametrize('kind', [dict, lambda **kwargs: argparse.Namespace(**kwargs)])
def test_arguments_of_the_run(tmp_path, net, kind):
    checkpoint, _ = loads(tmp_path, {'state_dict': net.state_dict(), 'args': kind(mean=[.5], img_size=48)}, net)
    assert checkpoint.run == {'mean': [.5], 'img_size': 48}
    assert loads(tmp_path, net.state_dict(), net)[0].run == {}


def test_safetensors_are_known_by_their_content(tmp_path, net):
    save_file(net.state_dict(), tmp_path / 'x.pth')
    other = TinyNet(norm=True)
    load_weights(other, tmp_path / 'x.pth')
    assert state_equal(other, net)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def spoilt(kind, state, path):
    """Content of a file that is no checkpoint, or not this network's."""
    first = 'conv.weight'
    whole = path.with_suffix('.whole')
    torch.save(state, whole)
    as_safetensors = path.with_suffix('.st')
    save_file(state, as_safetensors)
    code = Payload(path.with_name('pwned'))
    files = {
        'empty': b'', 'cut': whole.read_bytes()[:len(whole.read_bytes()) // 2], 'text': b'<html>not found</html>' * 9,
        'pickle': pickle.dumps({'state_dict': code}), 'cut safetensors': as_safetensors.read_bytes()[:-100],
        'long header': b'\xff' * 8 + b'{"a": 1}', 'json': json.dumps({'a': 1}).encode()}
    contents = {
        'code': {'state_dict': code}, 'module': TinyNet(), 'list': [1, 2], 'tensor': torch.ones(3), 'nothing': {},
        'numbers': {'state_dict': {'a': 1}}, 'integer keys': dict(enumerate(state.values())),
        'sparse': {**state, first: state[first].flatten(1).to_sparse()}, 'meta': {
            **state, first: torch.empty_like(state[first], device='meta')},
        'complex': {**state, first: state[first].to(torch.complex64)},
        'integers': {**state, first: state[first].to(torch.int8)},
        'array': {**state, first: np.ones(3).tolist()},
        'shape': {**state, first: state[first][:2]}, 'missing': {k: v for k, v in state.items() if k != first},
        'left over': {**state, 'extra': torch.ones(1)}, 'twice': {**state, f'module.{first}': state[first]},
        'aux': convert_aux_norm(TinyNet(norm=True)).state_dict()}
    if kind in files:
        path.write_bytes(files[kind])
    else:
        torch.save(contents[kind], path)


@pytest.mark.parametrize('kind, words', [
    ('empty', 'truncated or not a checkpoint'), ('cut', 'truncated or not a checkpoint'),
    ('text', 'truncated or not a checkpoint'), ('pickle', 'truncated or not a checkpoint'),
    ('cut safetensors', 'truncated or not a checkpoint'), ('long header', 'truncated or not a checkpoint'),
    ('json', 'truncated or not a checkpoint'),
    ('code', 'it holds code, which is never run'), ('module', 'it holds code, which is never run'),
    ('list', 'has no weights under state_dict_ema, model_ema, state_dict, model, net, weights'),
    ('tensor', 'has no weights under'), ('nothing', 'has no weights under'), ('numbers', 'has no weights under'),
    ('integer keys', 'has keys that are not strings'),
    ('sparse', 'of layout sparse_coo under conv.weight'), ('meta', 'a tensor without values under conv.weight'),
    ('complex', 'a complex64 tensor'), ('integers', 'a int8 tensor'), ('array', 'holds a list under conv.weight'),
    ('shape', 'has (2, 3, 3, 3) under conv.weight where conv.weight is (8, 3, 3, 3)'),
    ('missing', 'does not fit TinyNet: it has a different architecture or number of classes (missing conv.weight)'),
    ('left over', '(left over extra); check `model`'), ('twice', 'holds conv.weight more than once'),
    ('aux', 'has a second BatchNorm (objective mbnat); choose between the two with `gamma`'),
])
def test_files_that_do_not_load(tmp_path, net, kind, words):
    path = tmp_path / 'given.pth'
    spoilt(kind, net.state_dict(), path)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(net, path, argument='initial_checkpoint')
    text = str(caught.value)
    assert text.startswith(f"initial_checkpoint='{path}': ") and words in text and '\n' not in text, text
    assert not (tmp_path / 'pwned').exists(), 'code from a checkpoint was run'
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items()), 'half a checkpoint was loaded'


def test_a_checkpoint_without_a_second_batchnorm(tmp_path, net):
    with pytest.raises(InputError, match='has no second BatchNorm .objective mbnat.; remove `gamma`'):
        load_weights(convert_aux_norm(TinyNet(norm=True)), saved(tmp_path, net.state_dict()))


def test_paths_that_are_no_files(tmp_path):
    for path, words in ((tmp_path, 'is a folder; give the path of the file'), (tmp_path / 'x', 'no such file')):
        with pytest.raises(InputError, match=words):
            read_checkpoint(path)


def test_weights_are_written_whole_in_any_memory_format(tmp_path, net):
    write_weights(tmp_path / 'a.safetensors', net.state_dict())
    write_weights(tmp_path / 'b.safetensors', net.to(memory_format=torch.channels_last).state_dict())
    assert (tmp_path / 'a.safetensors').read_bytes() == (tmp_path / 'b.safetensors').read_bytes()
    assert weights_sha256(load_file(tmp_path / 'a.safetensors')) == weights_sha256(net)


def test_the_hash_is_of_names_types_shapes_and_values(net):
    state = net.state_dict()
    key = 'conv.weight'
    changed = [
        {**state, key: state[key] + 1e-7}, {**state, key: state[key].double()}, {**state, key: state[key].flatten(1)},
        {k.replace('conv', 'cnov'): v for k, v in state.items()}]
    assert len({weights_sha256(s) for s in [state, *changed]}) == 5
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    single = {k: v.float() if v.dtype == torch.half else v for k, v in half.items()}
    assert weights_sha256(half) == weights_sha256(single)


@pytest.mark.parametrize('norm, warns', [('batchnorm2d', 'does not count batches'), ('robustnorm2d', 'counts batches')])
def test_weights_of_the_other_norm_are_not_loaded_in_silence(tmp_path, caplog, norm, warns):
    own, other = (timm.create_model('robustnorm_resnet20_cifar', norm_layer=n) for n in sorted(
        ('batchnorm2d', 'robustnorm2d'), key=lambda n: n != norm))
    for model, words in ((own, ''), (other, warns)):
        torch.save(model.state_dict(), tmp_path / 'x.pth')
        caplog.clear()
        if words:
            before = weights_sha256(own)
            with pytest.raises(InputError, match=f'{words}, .* must be converted first'):
                load_weights(own, tmp_path / 'x.pth')
            assert weights_sha256(own) == before
        fit_weights(own, read_checkpoint(tmp_path / 'x.pth'), 'x.pth', converts=True)
        assert words in caplog.text and bool(caplog.text) == bool(words)
        write_weights(tmp_path / 'x.safetensors', own.state_dict())
        load_weights(own, tmp_path / 'x.safetensors')
