"""What the commands share."""
import logging
from pathlib import Path

import pytest

from timm_robust.cli import main, train
from timm_robust.cli.arguments import SettingsParser, start_logging
from timm_robust.cli.outputs import new_folder
from timm_robust.errors import InputError
from timm_robust.evaluation import EvalConfig
from timm_robust.inputs import ImagesConfig, NetworkConfig
from timm_robust.settings import from_flat
from timm_robust.tasks import AWP, SAT, TrainingAttack
from timm_robust.training import TrainConfig


def test_a_second_command_of_a_process_logs_each_line_once(capsys):
    for _ in range(2):
        start_logging()
    logging.getLogger('timm_robust').info('said')
    assert capsys.readouterr().err.count('said') == 1


def test_flags_win_over_the_file_and_what_neither_says_has_its_default(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text(
        'attacks: [clean, fgsm]\nworst_case: true\nuse_ema: false\nnum_examples: 8\nmean: [0, .5, 1e0]\n'
        'model_kwargs: {drop_rate: 1e-1}\n')
    parser = SettingsParser(EvalConfig, ImagesConfig, NetworkConfig, prog='x')
    values = parser.read(['-c', str(path), '--num-examples', '9', '--use-ema'])
    config, images, network = (from_flat(cls, values) for cls in (EvalConfig, ImagesConfig, NetworkConfig))
    assert config == EvalConfig(attacks=('clean', 'fgsm'), worst_case=True)
    assert images == ImagesConfig(num_examples=9)
    assert network == NetworkConfig(mean=(0., .5, 1.), model_kwargs={'drop_rate': .1}) and network.use_ema
    assert [str(a) for a in config.plan.attacks] == ['clean', 'fgsm']


def test_flags_switch_off_what_the_file_switches_on(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text('amp: true\nno_aug: true\nmodel_ema: true\n')
    filed, flagged = (train.read_config(['x', '-c', str(path), *flags]) for flags in ([], ['--no-amp', '--no-aug']))
    assert (filed.amp, filed.no_aug, filed.model_ema) == (True, True, True)
    assert (flagged.amp, flagged.no_aug, flagged.model_ema) == (False, True, True)


def test_the_folder_of_training_data_in_either_way(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text('data_dir: filed\nepochs: 6\n')
    for argv, found in ((['-c', str(path)], 'filed'), (['here', '-c', str(path)], 'here'),
                        (['--data-dir', 'there', '-c', str(path)], 'there')):
        config = train.read_config(argv)
        assert (config.data_dir, config.epochs) == (found, 6)
    with pytest.raises(InputError, match='given twice'):
        train.read_config(['here', '--data-dir', 'there'])


@pytest.mark.parametrize('flag', ['--plugin', '--device-modules'])
def test_a_plugin_that_is_none_is_one_line(capsys, flag):
    for argv, message in (([flag], 'expected'), ([flag, 'no_such_module'], '--plugin no_such_module: cannot be')):
        assert main(['eval', *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith('timm-robust eval: error: ') and message in error and error.count('\n') == 1


def test_stopped_by_the_keyboard(monkeypatch, capsys):
    monkeypatch.setattr('timm_robust.cli.models.run', lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(['models']) == 130
    assert capsys.readouterr().err == 'timm-robust models: stopped\n'


def test_flags_reach_their_settings():
    values = SettingsParser(NetworkConfig, prog='x').read(
        '--checkpoint x --no-use-ema --pretrained --num-classes 7 --input-size 3 8 9 --mean .1 .2 .3 --std .4 .5 .6 '
        '--crop-pct .9 --bn-mode batch --channels-last --model-kwargs depth=3'.split())
    assert from_flat(NetworkConfig, values) == NetworkConfig(
        checkpoint='x', use_ema=False, pretrained=True, num_classes=7, input_size=(3, 8, 9), mean=(.1, .2, .3),
        std=(.4, .5, .6), crop_pct=.9, bn_mode='batch', channels_last=True, model_kwargs={'depth': 3})
    config = train.read_config((
        '--objective sat --adv-weight .3 --attack mim --attack-norm L2 --attack-eps .5 --attack-steps 3 '
        '--attack-step-size .2 --attack-bn-mode train --attack-eps-warmup-epochs 2 --awp-gamma .01 '
        '--awp-start-epoch 1 --resume last.pth.tar --initial-checkpoint first.pth --val-split test -b 6 -vb 5 '
        '--model-ema --model-ema-decay .9 --sched-on-updates --dr .3 --device cpu').split())
    assert config == TrainConfig(
        objective=SAT(weight=.3), attack=TrainingAttack(
            attack='mim', norm='L2', eps=.5, steps=3, step_size=.2, bn_mode='train', eps_warmup_epochs=2.),
        awp=AWP(gamma=.01, start_epoch=1), resume='last.pth.tar', initial_checkpoint='first.pth', val_split='test',
        batch_size=6, validation_batch_size=5, model_ema=True, model_ema_decay=.9, sched_on_updates=True,
        decay_rate=.3, device='cpu')


@pytest.mark.parametrize('model, name', [
    ('resnet50.a1_in1k', 'resnet50_a1_in1k'), ('local-dir:output/train/one/export/', 'output_train_one_export'),
    ('out/one', 'out_one'), ('/a b/é', 'a_b_é'), ('hf-hub:me/mine@v1', 'me_mine_v1')])
def test_names_of_folders(model, name):
    folder = Path(new_folder('eval', model))
    assert folder.parent == Path('output/eval') and folder.name.split('-', 2)[2].rsplit('-', 1)[0] == name
    assert new_folder('eval', model) != str(folder)
