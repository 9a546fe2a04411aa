"""Bad input: one line that names argument, value and mend, exit code 2, before training, nothing overwritten."""
import pickle
import shutil

import pytest
import timm
import torch
from helpers import make_image_folder, run_cli
from PIL import Image

from timm_robust.cli.main import COMMANDS, main

MODEL = ['--model', 'nofrost_resnet11_mnist', '--in-chans', '3', '--img-size', '32', '--num-classes', '2', '-j', '0',
         '--device', 'cpu']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp('images'), per_class=4)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Flag and path of random weights for a model of these tests."""
    files = tmp_path_factory.mktemp('weights')

    def of(name='nofrost_resnet11_mnist'):
        path = files / f'{name}.pth'
        if not path.exists():
            torch.save(timm.create_model(name, in_chans=3, num_classes=2).state_dict(), path)
        return ['--checkpoint', path]

    return of


@pytest.fixture
def fails(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(command, *argv, mentions=()):
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*'))
        assert main([command, *map(str, argv)]) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith('timm-robust')]
        assert len(lines) == 1 and 'Traceback' not in captured.err, captured.err
        assert lines[0].startswith(f'timm-robust {command}: error: ')
        for text in mentions:
            assert str(text) in lines[0], lines[0]
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob('*')) == before, 'something was written'
        return lines[0]

    return check


@pytest.mark.parametrize('flags,mentions', [
    (['--objective', 'trade'], ['--objective trade', 'nofrost']),
    (['--attack', 'pdg'], ['--attack pdg', 'pgd']),
    (['--attack-norm', 'l7'], ['--attack-norm l7', 'linf']),
    (['--attack-eps', '8'], ['--attack-eps 8', '8/255']),
    (['--attack-steps', '-1'], ['--attack-steps -1', 'at least 1']),
    (['--attack-steps', '0'], ['--attack-steps 0']),
    (['--attack-steps', 'many'], ['--attack-steps', 'many']),
    (['--attack-eps-warmup-epochs', '9', '--epochs', '6'], ['--attack-eps-warmup-epochs 9', '--epochs 6']),
    (['--objective', 'sat', '--adv-weight', '1.2'], ['--adv-weight 1.2', '[0, 1]']),
    (['--adv-weight', '.2'], ['--adv-weight 0.2', 'is for --objective sat, nofrost']),
    (['--attack-eps-warmup-epochs', 'nan'], ['--attack-eps-warmup-epochs nan', 'at least 0']),
    (['--objective', 'fat', '--fat-tau-epochs', 'nan'], ['--fat-tau-epochs nan', 'at least 0']),
    (['--objective', 'trades', '--trades-beta', '-1'], ['--trades-beta -1: ', 'at least 0']),
    (['--objective', 'trades', '--trades-beta', 'inf'], ['--trades-beta inf', 'at least 0']),
    (['--objective', 'fat', '--mixup', '.5'], ['--objective fat', 'leave out --mixup']),
    (['--cutmix', '.2', '--batch-size', '3'], ['--batch-size 3', 'even number']),
    (['--objective', 'mbnat'], ['--objective mbnat', 'no BatchNorm']),
    (['--objective', 'mbnat', '--eval-metric', 'robust_top1', '--robust-eval-steps', '2'],
     ['--eval-metric robust_top1', '--mbnat-gamma']),
    (['--objective', 'mbnat', '--grad-checkpointing'], ['--grad-checkpointing', 'leave it out']),
    (['--objective', 'apart'], ['--objective apart', 'no BatchNorm']),
    (['--objective', 'apart', '--apart-ratio', '1.5'], ['--apart-ratio 1.5', '(0, 1]']),
    (['--objective', 'apart', '--apart-ratio', '.3'], ['--apart-ratio 0.3', '--batch-size 4']),
    (['--objective', 'apart', '--apart-groups', '3'], ['--apart-groups 3', '--batch-size 4']),
    (['--eval-metric', 'robust_top1'], ['--eval-metric robust_top1', '--robust-eval-steps 10']),
    (['--eval-metric', 'top2'], ['--eval-metric top2', 'top1']),
    (['--amp-dtype', 'bf16'], ['--amp-dtype bf16', 'bfloat16']),
    (['--clip-mode', 'foo'], ['--clip-mode foo', 'agc']),
    (['--torchcompile', 'foo'], ['--torchcompile foo', 'Invalid backend']),
    (['--torchcompile', '--torchcompile-mode', 'foo'], ['--torchcompile inductor', 'Unrecognized mode=foo']),
    (['--device', 'xpu'], ['--device xpu', 'no such device here', 'pass --device cpu']),
    (['--dist-bn', 'foo'], ['--dist-bn foo', 'reduce']),
    (['--lr-base-scale', 'foo'], ['--lr-base-scale foo', 'sqrt']),
    (['--workers', '-3'], ['--workers -3', 'at least 0']),
    (['--robust-eval-steps', '-1'], ['--robust-eval-steps -1', 'at least 0']),
    (['--robust-eval-samples', '0'], ['--robust-eval-samples 0', 'at least 1']),
    (['--opt', 'foo'], ['--opt foo']),
    (['--model-ema-decay', '2'], ['--model-ema-decay 2', '[0, 1]']),
    (['--clip-grad', '0'], ['--clip-grad 0', 'above 0']),
    (['--clip-grad', '-1'], ['--clip-grad -1', 'above 0']),
    (['--clip-grad', 'nan'], ['--clip-grad nan', 'above 0']),
    (['--weight-decay', '-1'], ['--weight-decay -1', 'at least 0']),
    (['--momentum', '2'], ['--momentum 2', '[0, 1]']),
    (['--mixup', '-1'], ['--mixup -1', 'at least 0']),
    (['--bce-loss', '--bce-target-thresh', 'nan'], ['--bce-target-thresh nan', '[0, 1]']),
    (['--color-jitter', '-1'], ['--color-jitter -1', 'at least 0']),
    (['--scale', '2', '1'], ['--scale 2 1', 'two ascending numbers']),
    (['--ratio', '-1', '1'], ['--ratio -1 1', 'two ascending numbers']),
    (['--aa', 'foo'], ['--aa foo', 'not a policy of timm']),
    (['--val-split', '../val'], ['../val', 'leads out of the data']),
    (['--model-kwargs', 'colour'], ['NAME=VALUE']),
    (['--model-kwargs', 'pretrained=True'], ['--model-kwargs pretrained=True', 'a separate setting']),
    (['--opt-kwargs', 'colour=1'], ['--opt sgd', 'colour']),
    (['--sched', 'foo'], ['--sched foo']),
    (['--val-interval', '0'], ['--val-interval 0', 'at least 1']),
    (['--log-interval', '0'], ['--log-interval 0', 'at least 1']),
    (['--checkpoint-hist', '0'], ['--checkpoint-hist 0', 'at least 1']),
    (['--seed', '-1'], ['--seed -1', 'at least 0']),
    (['--crop-mode', 'sqash'], ['--crop-mode sqash', 'squash']),
    (['--aug-repeats', '3'], ['--aug-repeats 3', 'torchrun']),
    (['--objective', 'apart', '--opt', 'adahessian'], ['--opt adahessian', 'apart']),
    (['--mean', '.5', '.5'], ['mean', '3 values', '--mean']),
    (['--model', 'vit_tiny_patch16_224'],
     ['--model vit_tiny_patch16_224', '(32, 32)', '(224, 224)', 'img_size=N in --model-kwargs']),
    (['--model', 'nofrost_resnet5000'], ['--model nofrost_resnet5000', 'timm.list_models()']),
    (['--model-kwargs', 'colour=red'], ['colour']),
    (['--model-kwargs', 'in_chans=1'], ['--model-kwargs in_chans=1', 'a separate setting']),
    (['--no-such-flag'], ['--no-such-flag', '--help']),
    (['--batch-size', '64'], ['--batch-size 64', '8 images']),
    (['--num-classes', '1'], ['--num-classes 1', '--num-classes 2']),
    (['--resume', 'nowhere.pth.tar'], ['--resume nowhere.pth.tar', 'no such file']),
    (['--model', 'robustnorm_vgg11_cifar', '--grad-checkpointing'], ['--grad-checkpointing', 'leave it out']),
    (['--model', 'robustnorm_resnet20_cifar', '--batch-size', '1'], ['--batch-size 1', 'at least 2']),
])
def test_flags_of_train(fails, folder, flags, mentions):
    fails('train', *MODEL, '--data-dir', folder, '--batch-size', '4', *flags, mentions=mentions)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_missing_device(fails, folder):
    fails('train', *MODEL, '--data-dir', folder, '--device', 'cuda', mentions=['--device cuda', '--device cpu'])
    fails('eval', *MODEL, '--data-dir', folder, '--device', 'cuda', mentions=['--device cuda', '--device cpu'])


@pytest.mark.parametrize('flags,mentions', [
    (['--attacks', 'clean,pdg20'], ['--attacks pdg20', 'pgd']),
    (['--attacks', 'fgsm3'], ['--attacks fgsm3', 'takes no number']),
    (['--attacks', 'pgd0'], ['--attacks pgd0']),
    (['--attacks', ''], ['--attacks']),
    (['--attacks', f"pgd{'9' * 400}"], ['below 2**31']),
    (['--split', '/'], ['--split /', 'leads out of the data']),
    (['--crop-pct', '1e-9'], ['--crop-pct 1e-09', 'above 32768']),
    (['--attacks', 'a\nb'], ['--attacks a b: unknown']),
    (['--norm', 'l3'], ['--norm l3']),
    (['--eps', '8'], ['--eps 8', '8/255']),
    (['--eps', 'x'], ['--eps x']),
    (['--restarts', '0'], ['--restarts 0']),
    (['--seed', '-1'], ['--seed -1']),
    (['--mean', '.5', '.5'], ['mean', '3 values', '--mean']),
    (['--step-size', '0'], ['--step-size 0']),
    (['--eps-sweep', '0,4', '--attacks', 'pgd20'], ['--eps-sweep', '4/255']),
    (['--eps-sweep', '0,1/255', '--attacks', 'clean'], ['--eps-sweep', 'pgd20']),
    (['--num-examples', '0'], ['--num-examples 0', 'at least 1']),
    (['--num-examples', '99'], ['--num-examples 99', 'between 1 and 8']),
    (['--bn-mode', 'batch'], ['--bn-mode batch', 'no BatchNorm or RobustNorm']),
    (['--bn-mode', 'both'], ['--bn-mode both', 'population']),
    (['--checkpoint', 'nowhere.pth'], ['--checkpoint nowhere.pth', 'no such file']),
    (['--model', 'robustnorm_resnet20_cifar', '--bn-mode', 'batch', '-b', '1'], ['--batch-size 1', 'larger']),
])
def test_flags_of_eval(fails, folder, weights, flags, mentions):
    name = flags[1] if flags[0] == '--model' else 'nofrost_resnet11_mnist'
    fails('eval', *MODEL, '--data-dir', folder, *weights(name), *flags, mentions=mentions)


def test_a_network_without_weights_is_not_evaluated(fails, folder):
    fails('eval', '--model', 'nofrost_resnet20_cifar', '--data-dir', folder, '--no-pretrained',
          mentions=['--no-pretrained', 'without weights', '--checkpoint'])


def test_eval_never_measures_random_weights(fails, folder):
    fails('eval', *MODEL, '--data-dir', folder,
          mentions=['pretrained weights', 'nofrost_resnet11_mnist', 'no location'])
    fails('eval', '--model', 'local-dir:nowhere', '--data-dir', folder, mentions=['local-dir:nowhere'])


@pytest.mark.parametrize('command', ['train', 'eval'])
def test_checkpoints_that_do_not_load(fails, folder, tmp_path_factory, command):
    flag = {'train': '--initial-checkpoint', 'eval': '--checkpoint'}[command]
    files = tmp_path_factory.mktemp('checkpoints')
    common = [*MODEL, '--data-dir', folder, '--batch-size', '4', flag]

    class Payload:
        def __reduce__(self):
            return open, (str(files / 'pwned'), 'w')

    torch.save({'state_dict': Payload()}, files / 'evil.pth')
    fails(command, *common, files / 'evil.pth', mentions=[flag, 'evil.pth', 'holds code'])
    (files / 'plain.pth').write_bytes(pickle.dumps({'state_dict': Payload()}))
    fails(command, *common, files / 'plain.pth', mentions=[flag, 'plain.pth'])
    assert not (files / 'pwned').exists(), 'code from a checkpoint was run'

    model = timm.create_model('nofrost_resnet11_mnist', in_chans=3, num_classes=2)
    torch.save(model.state_dict(), files / 'whole.pth')
    whole = (files / 'whole.pth').read_bytes()
    (files / 'cut.pth').write_bytes(whole[:len(whole) // 2])
    fails(command, *common, files / 'cut.pth', mentions=['cut.pth', 'truncated'])
    from safetensors.torch import save_file
    save_file(model.state_dict(), files / 'whole.safetensors')
    (files / 'cut.safetensors').write_bytes((files / 'whole.safetensors').read_bytes()[:-100])
    fails(command, *common, files / 'cut.safetensors', mentions=['cut.safetensors', 'truncated'])
    other = timm.create_model('nofrost_resnet20_cifar', num_classes=2)
    torch.save(other.state_dict(), files / 'other.pth')
    fails(command, *common, files / 'other.pth', mentions=['other.pth', 'a different architecture', '--model'])


def test_empty_folder_and_missing_split(fails, weights, tmp_path_factory):
    empty = tmp_path_factory.mktemp('empty')
    (empty / 'train').mkdir()
    (empty / 'validation').mkdir()
    mentions = ['--data-dir', 'one sub-folder of images per class']
    fails('train', *MODEL, '--data-dir', empty, mentions=mentions)
    fails('eval', *MODEL, *weights(), '--data-dir', empty, mentions=mentions)
    fails('train', *MODEL, '--data-dir', empty / 'nowhere', mentions=['nowhere'])
    fails('train', *MODEL, '--dataset', 'torch/no_such', '--data-dir', empty, mentions=['torch/no_such'])


def test_class_missing_in_validation(fails, tmp_path_factory):
    root = make_image_folder(tmp_path_factory.mktemp('classes'), classes=('a', 'b', 'c'))
    shutil.rmtree(root / 'validation' / 'b')
    fails('train', *MODEL, '--num-classes', '3', '--data-dir', root, '-b', '4',
          mentions=['--val-split', "lacks class 'b'"])


def test_unreadable_image(fails, weights, tmp_path_factory):
    root = make_image_folder(tmp_path_factory.mktemp('broken'), per_class=4)
    broken = root / 'validation' / 'a' / '2.png'
    broken.write_bytes(broken.read_bytes()[:200])
    fails('eval', *MODEL, *weights(), '--data-dir', root, mentions=['--data-dir', broken, 'repair or delete'])
    fails('train', *MODEL, '--data-dir', root, '-b', '4', mentions=[broken])


def test_grey_data_for_a_colour_model(fails, weights, tmp_path_factory):
    root = tmp_path_factory.mktemp('grey')
    for split in ('train', 'validation'):
        for i, name in enumerate('ab'):
            (root / split / name).mkdir(parents=True)
            for k in range(4):
                Image.new('L', (32, 32), 40 * k + i).save(root / split / name / f'{k}.png')
    for command, extra in (('train', []), ('eval', weights())):
        fails(command, *MODEL, *extra, '-b', '4', '--data-dir', root,
              mentions=['--in-chans 3', 'grey', '--in-chans 1', '--input-img-mode RGB'])


def test_finished_runs_are_not_overwritten(fails, folder, tmp_path_factory):
    done = tmp_path_factory.mktemp('done')
    (done / 'run').mkdir()
    (done / 'run' / 'last.pth.tar').write_text('precious')
    (done / 'results.json').write_text('precious')
    fails('train', *MODEL, '-b', '4', '--data-dir', folder, '--output', done, '--experiment', 'run',
          mentions=['--experiment run', '--resume'])
    fails('eval', *MODEL, '--data-dir', folder, '--output', done, mentions=['--output', 'results.json'])


@pytest.mark.parametrize('command', ['eval', 'diagnose', 'properties', 'statistics', 'convert', 'card', 'train'])
def test_values_in_config_files_pass_the_checks_of_flags(fails, folder, tmp_path_factory, command):
    path = tmp_path_factory.mktemp('configs') / 'c.yaml'
    own = {
        'convert': ['x.pth', '-o', 'x.safetensors'], 'train': [],
        'card': ['nofrost_resnet50.mine', '--origin', 'o', '--repo-id', 'a/b', '--results', 'r', '--data-name', 'd',
                 '--checkpoint', 'nowhere.pth']}
    argv = ['-c', path, *own.get(command, ['--checkpoint', 'nowhere.pth', '--data-dir', folder])]

    def refused(content, *mentions):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        fails(command, *argv, mentions=mentions)

    refused('num_classes: true', '--num-classes: must be a whole number, not true or false')
    refused('num_classes: false', 'num-classes: must be a whole number, not true or false')
    refused('num_classes: 1.5', '--num-classes 1.5: must be a whole number, not a number')
    refused('num_classes: "10"', '--num-classes 10: must be a whole number, not text')
    refused('mean: 0.5', '--mean 0.5: must be a list, each a number')
    refused('mean: [0.5, x]', '--mean 0.5 x: must be a list, each a number')
    refused('model_kwargs: [a]', '--model-kwargs a: must be a mapping')
    refused('interpolation: null', '--interpolation None: must be text')
    refused('output: 1\noutput: 2', '--config', 'output occurs more than once')
    refused(b'output: \xff', '--config', 'cannot be read as YAML')
    for content in ('', '- a', 'a', '3'):
        refused(content, '--config', 'must hold "name: value" lines')
    for content in ('a: [', '? [a]\n: b', 'x: !!map [1]', 'x: !!bool maybe', 'x: !!timestamp noon', '<<: 3'):
        refused(content, '--config', 'cannot be read as YAML')
    for name in ('no_such_flag', 'config', 'help', '3'):
        refused(f'{name}: 1', '--config', f'{name}', 'is not a flag of this command')


@pytest.mark.parametrize('command, content, message', [
    ('eval', 'worst_case: "false"', '--worst-case false: must be true or false, not text'),
    ('eval', 'attacks: 3', '--attacks 3: must be text'),
    ('eval', 'attacks: [3]', '--attacks 3: is neither a name nor an attack'),
    ('eval', 'attacks: pgd\nrestarts: 2.5', '--restarts 2.5: must be a whole number'),
    ('eval', 'attacks: pgd\nrestarts: true', '--restarts: must be a whole number'),
    ('eval', 'num_examples: true', '--num-examples: must be a whole number'),
    ('eval', 'batch_size: 4.5', '--batch-size 4.5: must be a whole number'),
    ('eval', 'workers: -3', '--workers -3: must be a whole number of at least 0'),
    ('eval', 'threats: Linf 8/255', "'threats' is not a flag"),
    ('eval', 'command: x', "'command' is not a flag"),
    ('properties', 'steps: true', '--steps: must be a whole number'),
    ('statistics', 'attacks: [3]', '--attacks 3: must be text or a list'),
    ('statistics', 'attacks: null', '--attacks None: must be text or a list'),
    ('diagnose', 'seed: 1.5', '--seed 1.5: must be a whole number'),
    ('convert', 'dtype: 16', '--dtype 16: must be text'),
    ('card', 'results: r', '--results r: must be a list, each text'),
    ('train', 'model_ema: "false"', '--model-ema false: must be true or false'),
    ('train', 'data: x', "'data' is not a flag"),
])
def test_values_in_config_files_of_one_command(fails, tmp_path_factory, command, content, message):
    path = tmp_path_factory.mktemp('configs') / 'c.yaml'
    path.write_text(content)
    positional = {'convert': ['x.pth'], 'card': ['a.b']}.get(command, [])
    fails(command, *positional, '-c', path, mentions=[message])


@pytest.mark.parametrize('argv, message', [
    (['convert', 'nowhere.pth', '-o', 'x.safetensors'], 'error: nowhere.pth: no such file'),
    (['convert', 'x.pth', '-o', 'x.pth'], '--output x.pth: must end in .safetensors'),
    (['convert', 'x.pth'], '--output: must end in .safetensors'),
    (['convert', 'x.pth', '-o', 'no/x.safetensors'], '--output no/x.safetensors: no such folder'),
    (['card', 'a.b', '--checkpoint', 'x', '--results', 'r'], '--data-name: is missing'),
    (['card', 'a.b', '--checkpoint', 'x', '--results', 'r', '--data-name', 'd'], 'error: a.b: must be MODEL.TAG'),
    (['push', 'nowhere'], 'error: nowhere: no such folder'),
    (['compare', 'a'], 'error: a: is not NAME=FOLDER'),
    (['compare', 'a=b', '-o', 'x.pdf'], '--output x.pdf: must end in .png'),
])
def test_what_has_no_flag_is_named_by_its_value(fails, argv, message):
    fails(*argv, mentions=[message])


def test_weights_of_a_surrogate_without_its_model(fails, folder, weights):
    fails('diagnose', *MODEL, '--data-dir', folder, *weights(), '--surrogate-checkpoint', 'x.pth',
          mentions=['--surrogate-checkpoint x.pth: needs a model name; pass it as --surrogate'])


def test_config_files(fails, folder, tmp_path_factory):
    files = tmp_path_factory.mktemp('configs')
    (files / 'unknown.yaml').write_text('objectve: sat\n')
    fails('train', '-c', files / 'unknown.yaml', mentions=['--config', "'objectve' is not a flag"])
    (files / 'list.yaml').write_text('- a\n')
    fails('train', '-c', files / 'list.yaml', mentions=['--config'])
    (files / 'broken.yaml').write_text('a: [\n')
    fails('train', '-c', files / 'broken.yaml', mentions=['--config', 'YAML'])
    fails('eval', '-c', files / 'missing.yaml', mentions=['--config', 'missing.yaml'])


def test_unknown_command_and_help(capsys):
    assert main(['trian']) == 2
    assert 'trian' in capsys.readouterr().err
    assert main([]) == 2 and main(['--help']) == 0 and main(['--version']) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, '--help'])
        assert stopped.value.code == 0


def test_exit_code_of_the_process(tmp_path):
    done = run_cli('eval', '--model', 'no_such_model', '--data-dir', tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize('command', ['eval', 'diagnose', 'properties', 'train'])
def test_a_path_that_is_no_model_needs_no_output_to_be_one_line(fails, folder, command):
    fails(command, '--model', 'runs/export', '--data-dir', folder, mentions=['--model runs/export'])
