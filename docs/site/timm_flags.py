"""Write docs/timm_flags.md: which flags of timm's train.py and validate.py our commands lack, and why.

    python docs/site/timm_flags.py path/to/pytorch-image-models

Both scripts are parsed, not run. It is an error if REASONS lacks a missing flag, or lists a flag that is not missing.
"""
import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

PAGE = Path(__file__).resolve().parents[1] / 'timm_flags.md'
COMMANDS = {'train.py': 'train', 'validate.py': 'eval'}
_OF_ALL_COMMANDS = {'--plugin', '--device-modules'}  # parsed before the flags of a command

_NAFLEX = 'batches of patches instead of images; attacks and threat models are defined on images'
_KD = 'distillation defines its own task, as our objectives do; `timm-train` refuses the combination too'
_SPLITS = 'augmentation splits arrange batches for the JSD loss; our objectives use their own layout'
_JIT = ('TorchScript and its fusers are no longer developed, and the faster copy for attacks cannot be made from a '
        'scripted network')
_LOW = 'for low precision use `--amp`, which keeps weights in float32'
_VERDICT = 'every verdict is in float32; `--fast-dtype bfloat16` speeds up attacks, and their results are verified'
_KWARGS = 'an argument of few models; use `--model-kwargs`'

REASONS: Dict[str, Dict[str, str]] = {
    'train.py': {
        '--pretrained-path': '`--initial-checkpoint`, or the folder of an export as `--model` with `--pretrained`',
        '--no-resume-opt': '`--initial-checkpoint` starts from weights alone',
        '--fuser --torchscript': _JIT,
        '--fast-norm': 'changes the arithmetic of LayerNorm for the whole process',
        '--head-init-scale --head-init-bias': 'none of our recipes needs it',
        '--model-dtype': _LOW,
        '--synchronize-step': 'for debugging timings',
        '--local_rank': 'torchrun sets it in the environment',
        '--aug-splits --jsd-loss --resplit --split-bn': _SPLITS,
        '--drop-connect': 'deprecated in timm, the same as `--drop-path`',
        '--drop-block --bn-momentum --bn-eps': _KWARGS,
        '--save-images': 'for debugging',
        '--tta': 'averages predictions over augmented copies, which timm no longer creates',
        '--use-multi-epochs-loader': 'workers would carry random state across epochs, which resuming could not restore',
        '--train-batches-per-epoch': 'inferred from the data, as in timm when the flag is absent',
        '--variable-batch-loss-scale': 'every batch counts the same; the learning rate follows the average batch',
        '--naflex-loader --naflex-train-seq-lens --naflex-max-seq-len --naflex-patch-sizes --naflex-patch-size-probs '
        '--naflex-loss-scale --naflex-patchify-channels-first': _NAFLEX,
        '--kd-model-name --kd-distill-type --kd-loss-type --distill-loss-weight --task-loss-weight --kd-temperature '
        '--kd-student-feature-dim --kd-teacher-feature-dim --kd-token-distill-type': _KD,
    },
    'validate.py': {
        '--num-samples': 'for streamed data, which has no index; for other data use `--num-examples`',
        '--use-train-size --crop-border-pixels --test-pool --tf-preprocessing': 'a published accuracy holds for '
        "the preprocessing in the weights' config; change it with `--img-size`, `--crop-pct` and `--crop-mode`",
        '--log-freq': 'progress is shown as a bar, or in a log as one line per pool of images',
        '--num-gpu': 'torchrun starts a process for each GPU',
        '--no-prefetcher': 'both loaders deliver the same pixels',
        '--amp --amp-dtype --model-dtype': _VERDICT,
        '--fuser --torchscript --aot-autograd --torchcompile --torchcompile-mode': _JIT + '; compiling takes longer '
        'than most evaluations',
        '--fast-norm': 'changes the arithmetic of LayerNorm, and with it verdicts',
        '--reparam': 'the faster copy already folds normalization; verdicts come from the network itself',
        '--results-format': '`results.json` is always written',
        '--real-labels': 'an image can have several correct labels, and an attack would have to avoid all of them',
        '--valid-labels': 'ImageNet-A and -R restrict the classes automatically (`--benchmarks`); for other data the '
        'choice of classes would have to be part of every report',
        '--retry': 'when memory runs out, the evaluation automatically continues with half the batch size',
        '--metrics-avg': 'precision and recall do not measure robustness; `results.json` has the verdict of each image',
        '--naflex-loader --naflex-max-seq-len': _NAFLEX,
    },
}


def flags_of(script: Path) -> List[str]:
    """The long flags that a script adds to parsers, in order."""
    calls = (node for node in ast.walk(ast.parse(script.read_text(encoding='utf-8'))) if isinstance(node, ast.Call))
    added = ([a.value for a in call.args if isinstance(a, ast.Constant)] for call in calls
             if isinstance(call.func, ast.Attribute) and call.func.attr == 'add_argument')
    return list(dict.fromkeys(next(n for n in names if n.startswith('--')) for names in added if any(
        str(n).startswith('--') for n in names)))


def own_flags(command: str) -> Set[str]:
    """The flags of one of our commands."""
    parser = importlib.import_module(f'timm_robust.cli.{command}').build_parser()
    return _OF_ALL_COMMANDS | {option for action in parser._actions for option in action.option_strings}


def reasons(script: str) -> Iterator[Tuple[List[str], str]]:
    """Missing flags that share a reason, and the reason."""
    return ((names.split(), why) for names, why in REASONS[script].items())


def page(checkout: Path) -> str:
    """The text of the page.

    Raises:
        SystemExit: If the reasons do not match the missing flags.
    """
    found = re.search(r"'([^']+)'", (checkout / 'timm' / 'version.py').read_text())
    parts = [
        '# Flags of timm\n',
        "Flags of timm's scripts that our commands lack, listed by `docs/site/timm_flags.py` for timm "
        f'{found[1] if found else "of unknown version"}. Our commands\n'
        "have all other flags of these scripts, under the same names. `timm-robust timm-train` runs timm's train.py "
        'itself.\n']
    for script, command in COMMANDS.items():
        all_flags = flags_of(checkout / script)
        lacking = [flag for flag in all_flags if flag not in own_flags(command)]
        explained = [flag for names, _ in reasons(script) for flag in names]
        if sorted(lacking) != sorted(explained):
            sys.exit(f'{script}: {sorted(set(lacking) - set(explained))} need a reason, '
                     f'{sorted(set(explained) - set(lacking))} no longer do')
        parts.append(f'## {script}: {len(lacking)} of {len(all_flags)} are not in `timm-robust {command}`\n')
        parts.append('| flags | why not |\n|---|---|')
        parts += [f"| {', '.join(f'`{name}`' for name in names)} | {why} |" for names, why in reasons(script)]
        parts.append('')
    return '\n'.join(parts)


if __name__ == '__main__':
    PAGE.write_text(page(Path(sys.argv[1])), encoding='utf-8')
