"""`timm-robust transfer`: accuracy of each network on adversarial images crafted on every network."""
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from ..attacks import parse_attack
from ..errors import InputError
from ..evaluation import ThreatConfig, transfer
from ..inputs import ImagesConfig, check_seed
from ..settings import check_types, from_flat, setting
from .arguments import SettingsParser, start_logging
from .flags import add_attack_flags
from .outputs import new_folder

__all__ = ['TransferConfig', 'build_parser', 'run']


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Settings of `timm-robust transfer`."""
    attack: str = setting(
        'mim', 'attack, with its number of steps (mim20, pgd20, fgsm, cw20); mim also takes --diversity, --kernel-size '
        'and --copies', metavar='NAME')
    seed: int = setting(0, 'random seed for the image subset and the noise', metavar='S')
    device: Optional[str] = setting(None, 'device (default: cuda if available)')
    output: str = setting('', 'folder for results (default: ./output/transfer/TIME-MODEL)', metavar='DIR')

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)


def _parser() -> Tuple[SettingsParser, Dict[str, str]]:
    parser = SettingsParser(
        ThreatConfig, TransferConfig, ImagesConfig, prog='timm-robust transfer',
        description='Measure each network on adversarial images crafted on every network, and draw the matrix of '
                    'accuracies. The networks must have the same classes and input. Uses 500 images by default '
                    '(--num-examples). Writes transfer.json and transfer.png.',
        examples=(
            'timm-robust transfer nofrost_nfnet18_cifar nofrost_resnet20_cifar --data-dir cifar10 --split test',
            'timm-robust transfer output/train/A/export output/train/B/export --data-dir "my data" --diversity 0.5'),
        first=(
            'norm', 'eps', 'attack', 'seed', 'device', 'output', 'data_dir', 'dataset', 'split', 'num_examples',
            'batch_size', 'steps', 'diversity', 'kernel_size', 'copies'))
    parser.add_argument('models', nargs='+', metavar='MODEL', help='two or more: a timm model, the folder of an '
                        'export or hf-hub:ORG/NAME')
    return parser, add_attack_flags(parser)


def build_parser() -> SettingsParser:
    """The parser of `timm-robust transfer`."""
    return _parser()[0]


def run(argv: List[str]) -> None:
    """Measure all pairs of networks; print and write the matrix."""
    parser, attack_flags = _parser()
    values = parser.read(argv)
    start_logging()
    config, threat = from_flat(TransferConfig, values), from_flat(ThreatConfig, values).threat
    output = Path(config.output or new_folder('transfer', values['models'][0]))
    if (output / 'transfer.json').exists():
        raise InputError('already holds transfer.json', 'choose another folder', argument='output', value=str(output))
    attack = parse_attack(
        config.attack, **{name: values[flag] for name, flag in attack_flags.items() if values.get(flag) is not None})
    report = transfer(
        values['models'], from_flat(ImagesConfig, values), attack=attack, threat=threat, seed=config.seed,
        device=config.device, command=shlex.join(['timm-robust', 'transfer', *argv]))
    written = report.save(output)
    print(f"\n{report}\n\nWritten: {', '.join(map(str, written))}")
