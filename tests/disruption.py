"""Runs in processes of their own, which may be killed or find no room on the disk."""
import contextlib
import json
import os
import resource
import signal

import torch
from helpers import TinyNet

from timm_robust import Linf, evaluate
from timm_robust.cli import main

TRAINING = [
    'train', '--model', 'nofrost_resnet11_mnist', '--in-chans', '3', '--img-size', '32', '--num-classes', '2',
    '-b', '8', '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '-j', '0', '--attack-steps', '1',
    '--device', 'cpu', '--epochs', '3', '--objective', 'nofrost', '--model-ema', '--reprob',
    '0.2', '--experiment', 'run']


def limited(room):
    """No file of this process grows beyond so many bytes, as on a full disk."""
    torch.set_num_threads(1)
    if room is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


@contextlib.contextmanager
def silent(log):
    with open(log, 'a') as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def evaluation(folder, log, room=None):
    """Measure a small network, or go on where a run before this one ended."""
    limited(room)
    torch.manual_seed(0)
    x, model = torch.rand(48, 3, 8, 8), TinyNet().eval()
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
        y = model(x).argmax(1)
    with silent(log):
        evaluate(
            model, x, y, threat=Linf(.005), attacks='clean,pgd20,square60', eps_sweep=[.003], batch_size=2,
            progress=False, save_images=0, output=folder, resume=True)


def training(folder, log, data, room=None):
    """Train a small network, or go on from its last checkpoint."""
    limited(room)
    last = os.path.join(folder, 'run', 'last.pth.tar')
    with silent(log):
        code = main([*TRAINING, '--data-dir', data, '--output', folder,
                     *(['--resume', last] if os.path.exists(last) else [])])
    os._exit(code)


def without_times(path):
    """The content of a results.json, without what differs from run to run."""
    content = json.loads(open(path).read())
    del content['sha256'], content['settings']['date']
    for attack in content['attacks']:
        del attack['seconds']
    return content
