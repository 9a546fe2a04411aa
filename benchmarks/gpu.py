"""Check on a GPU that everything runs and that attacks agree with the CPU, and time a training step.

    python -m benchmarks.gpu --output gpu.json

Sections: `attacks` (each attack on packaged weights, compared with the CPU image by image, TF32 off), `objectives` (a
step of each in every precision), `layers` (RobustNorm against the CPU), `steps` (time and memory of a training step). A
failed check prints one line; its traceback is in the output file, which is written after every check. A file in
results/ gets a section in RESULTS.md.
"""
import argparse
import copy
import json
import shlex
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler

import timm_robust  # noqa: F401
from timm_robust.attacks import L2, Attack, InputSpace, Linf, ThreatModel, make_fast_model, parse_attacks
from timm_robust.evaluation import versions
from timm_robust.layers import RobustNorm2d, set_bn_mode
from timm_robust.models import NormalizedModel
from timm_robust.precision import float32_proper
from timm_robust.tasks import AWP, OBJECTIVES, Madry, TrainingAttack, create_task

from .common import memory, seconds

SECTIONS = ('attacks', 'objectives', 'layers', 'steps')
_LINF = ('fgsm,fgsm-rs,bim5,pgd5,pgd-targeted4,mim5,cw5,apgd-ce8,apgd-dlr8,apgd-t4,fab4,fab-t3,square40,rays40')
_L2 = 'pgd5,cw-l24,apgd-ce8,fab4,square40'
_NETWORKS = ('nofrost_nfnet18_cifar', 'robustnorm_resnet20_cifar')


class Report:
    """Results of checks by section, and facts about the run; a failed check does not stop the others."""

    def __init__(self, path: Path, facts: Dict[str, Any]):
        self.path, self.content = path, {**facts, 'checks': {}}
        self.found: Dict[str, Any] = {}

    def begin(self, section: str) -> None:
        """Start a section for the following checks."""
        self.found = self.content['checks'][section] = {}

    def check(self, name: str, function: Callable[[], Any]) -> None:
        """Run a check, store and print its result; an exception counts as a failure."""
        start = time.perf_counter()
        try:
            result: Dict[str, Any] = {'ok': True, 'value': function()}
        except Exception as error:
            result = {'ok': False, 'value': f'{type(error).__name__}: {error}'[:300], 'trace': traceback.format_exc()}
        result['seconds'] = round(time.perf_counter() - start, 2)
        self.found[name] = result
        self.path.write_text(json.dumps(self.content, indent=1) + '\n')
        text = ' '.join(str(result['value']).split())[:110]
        print(f"{'PASS' if result['ok'] else 'FAIL'} {name} {text} ({result['seconds']} s)", flush=True)


def _agree(ours: torch.Tensor, theirs: torch.Tensor, allowed: int) -> str:
    """How many outcomes of two devices differ, which rounding can cause; an error if more than `allowed`."""
    different = int((ours.cpu() != theirs.cpu()).sum())
    assert different <= allowed, f'{different} of {len(ours)} outcomes differ'
    return f'{different} of {len(ours)} differ, {int(ours.sum())} fooled'


def attacks(report: Report, device: torch.device, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Each attack on both devices."""
    def outcome(attack: Attack, threat: ThreatModel, model: nn.Module, where: torch.device) -> torch.Tensor:
        x, y = images.to(where), labels.to(where)
        with float32_proper():
            adv = attack(model, x, y, threat, seed=list(range(len(x))))
            assert adv.device == x.device
            with torch.no_grad():
                return model(adv).argmax(1) != y

    def folded(model: nn.Module) -> str:
        x = images.to(device)
        with float32_proper():
            search = make_fast_model(model, x[:8])
            assert search is not None, 'no copy'
            return f'logits differ by {(search(x) - model(x)).abs().max().item():.1e}'

    for network in _NETWORKS:
        plain = timm.create_model(network, pretrained=True).eval()
        on_cpu = NormalizedModel(plain, plain.pretrained_cfg['mean'], plain.pretrained_cfg['std']).eval()
        there = copy.deepcopy(on_cpu).to(device)
        for threat, names, settings in ((Linf('8/255'), _LINF, {'num_targets': 3}), (L2(.5), _L2, {})):
            for attack in parse_attacks(names, **settings):
                report.check(f'{network} {threat.norm} {attack}', lambda t=threat, m=attack, a=there, b=on_cpu: _agree(
                    outcome(m, t, a, device), outcome(m, t, b, torch.device('cpu')), len(images) // 20))
        report.check(f'{network} folded copy', lambda model=there: folded(model))


def objectives(report: Report, device: torch.device, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One step of each objective in every precision and layout, with AWP if images are crafted."""
    for objective in OBJECTIVES:
        network = 'robustnorm_resnet20_cifar' if objective in ('mbnat', 'apart') else 'nofrost_resnet20_cifar'
        kwargs = {'norm_layer': 'batchnorm2d'} if network.startswith('robustnorm') else {}
        for dtype, layout in (
                (torch.float32, torch.contiguous_format), (torch.float32, torch.channels_last),
                (torch.bfloat16, torch.channels_last), (torch.float16, torch.channels_last)):
            def step(objective=objective, dtype=dtype, layout=layout, network=network, kwargs=kwargs):
                model = timm.create_model(network, **kwargs).to(device, memory_format=layout).train()
                space = _space(model)
                task = create_task(
                    OBJECTIVES[objective](), model, nn.CrossEntropyLoss(), attack=TrainingAttack(steps=2),
                    awp=AWP(gamma=.005), space=space, device=device, verbose=False)
                optimizer = create_optimizer_v2(model, opt='sgd', lr=.01, weight_decay=0.)
                views = getattr(task, 'views', 1)
                x = space.normalize(images.to(device)).repeat(views, 1, 1, 1).contiguous(memory_format=layout)
                before = next(model.parameters()).clone()
                low = dtype != torch.float32
                with torch.autocast(device.type, dtype) if low else nullcontext():
                    result = task(x, labels.to(device).repeat(views))
                if dtype == torch.float16 and device.type == 'cuda':
                    NativeScaler()(result['loss'], optimizer, parameters=model.parameters())
                else:
                    result['loss'].backward()
                    optimizer.step()
                assert torch.isfinite(result['loss']), 'loss is not finite'
                changed = not torch.equal(before, next(model.parameters()))
                assert changed or dtype == torch.float16, 'weights did not change'
                return f"loss {result['loss'].item():.4f}"

            name = f"{objective} {str(dtype)[6:]}{' channels_last' if layout == torch.channels_last else ''}"
            report.check(name, step)


def layers(report: Report, device: torch.device) -> None:
    """RobustNorm compared with the CPU in float32: every mode, both layouts."""
    torch.manual_seed(0)
    base = torch.randn(8, 6, 5, 7)
    for statistics in ('batch', 'mean', 'population'):
        for training in (True, False):
            for layout in (torch.contiguous_format, torch.channels_last):
                def compare(statistics=statistics, training=training, layout=layout):
                    found = []
                    norm = RobustNorm2d(6)
                    norm.load_state_dict({k: v + .1 * torch.rand_like(v) if v.is_floating_point() else v
                                          for k, v in norm.state_dict().items()})
                    for where in (torch.device('cpu'), device):
                        own = set_bn_mode(copy.deepcopy(norm), statistics).train(training).to(where)
                        x = base.to(where).clone(memory_format=layout).requires_grad_(True)
                        y = own(x)
                        (y * torch.linspace(-1, 1, y.numel(), device=where).view(8, 6, 5, 7)).sum().backward()
                        found.append([t.detach().cpu() for t in (y, x.grad, own.weight.grad, own.bias.grad)])
                    errors = [((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(*found)]
                    assert max(errors) < 1e-4, f'relative errors {errors}'
                    return f'relative error {max(errors):.1e}'

                mode = 'train' if training else 'eval'
                report.check(
                    f"RobustNorm {statistics} {mode}{' channels_last' if layout == torch.channels_last else ''}",
                    compare)


def _space(model: nn.Module) -> InputSpace:
    return InputSpace(model.pretrained_cfg['mean'], model.pretrained_cfg['std'])


def steps(report: Report, device: torch.device, batches: Sequence[int], attack_steps: int, repeats: int) -> None:
    """Seconds of a training step in bfloat16 and channels_last with PGD and AWP, and its memory."""
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    for network in ('nofrost_nfnet18_cifar', 'nofrost_resnet20_cifar'):
        for batch in batches:
            def measure(network=network, batch=batch):
                model = timm.create_model(network).to(device, memory_format=torch.channels_last).train()
                task = create_task(
                    Madry(), model, nn.CrossEntropyLoss(), attack=TrainingAttack(steps=attack_steps),
                    awp=AWP(gamma=.005), space=_space(model), device=device, verbose=False)
                optimizer = create_optimizer_v2(model, opt='muon', lr=.02, weight_decay=.02)
                x = task.space.normalize(torch.rand(batch, 3, 32, 32, device=device))
                x = x.contiguous(memory_format=torch.channels_last)
                y = torch.arange(batch, device=device) % 10

                def step():
                    with torch.autocast(device.type, torch.bfloat16):
                        loss = task(x, y)['loss']
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                for _ in range(2):
                    step()
                with memory(device) as taken:
                    spent = seconds(step, device, repeats)
                return (f'{1e3 * spent:.1f} ms, {batch / spent:.0f} images/s, {50e3 / batch * spent:.1f} s an epoch of '
                        f'CIFAR-10, {taken():.0f} MiB')

            report.check(f'step {network} batch {batch} pgd{attack_steps} awp', measure)


def main() -> int:
    """Run the sections; returns the exit code: 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--sections', nargs='+', default=SECTIONS, choices=SECTIONS)
    parser.add_argument('--batches', nargs='+', type=int, default=[256, 512, 1024])
    parser.add_argument('--attack-steps', type=int, default=10)
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--num-images', type=int, default=64)
    parser.add_argument('--images', metavar='FILE', help='torch file with pixels (N, 3, 32, 32) in [0, 1] and labels')
    parser.add_argument('--output', type=Path, default=Path('gpu.json'))
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('no GPU is available: pass --device cpu to try the script itself', file=sys.stderr)
        return 2
    device = torch.device(args.device)
    if args.images:
        images, labels = torch.load(args.images, weights_only=True)
    else:
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.rand(args.num_images, 3, 32, 32, generator=generator), torch.arange(args.num_images) % 10
    images, labels = images[:args.num_images], labels[:args.num_images]
    named = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
    print(named, torch.__version__, timm.__version__)
    command = shlex.join(['python', '-m', 'benchmarks.gpu', *sys.argv[1:]])
    report = Report(args.output, {'command': command, 'device': named, 'versions': versions()})
    runs = {
        'steps': lambda: steps(report, device, args.batches, args.attack_steps, args.repeats),
        'layers': lambda: layers(report, device),
        'objectives': lambda: objectives(report, device, images, labels),
        'attacks': lambda: attacks(report, device, images, labels),
    }
    for section, run in runs.items():
        if section in args.sections:
            report.begin(section)
            run()
    found = [(name, check) for of in report.content['checks'].values() for name, check in of.items()]
    failed = [name for name, check in found if not check['ok']]
    print(f"{len(found) - len(failed)} passed, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main())
