"""What an evaluation shows: a table, results.json and figures."""
import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn

from ..attacks import ThreatModel
from ..version import __version__
from .accuracy import Evaluation

__all__ = ['format_table', 'plot_eps_sweep', 'plot_images', 'weights_sha256', 'write_json', 'write_results']


def weights_sha256(model: nn.Module) -> str:
    """Hash of a state dict: names, types, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b'')
    return digest.hexdigest()


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table of aligned columns, the first to the left and the others to the right."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [str(row[0]).ljust(widths[0])] + [str(c).rjust(w) for c, w in zip(row[1:], widths[1:])]
        return '  '.join(cells).rstrip()

    return '\n'.join([line(header), '  '.join('-' * w for w in widths), *map(line, rows)])


def evaluation_table(evaluation: Evaluation, threat: ThreatModel, seed: int) -> str:
    """Accuracy per attack, with everything a robust accuracy must be reported with."""
    count = len(evaluation.labels)
    rows = [
        (
            r.spec.name,
            '-' if r.spec.threat is None else str(r.spec.threat),
            r.spec.settings.get('steps', 1) if r.spec.function else '-',
            f'{r.accuracy:.2f}',
            f'{r.seconds:.1f}',
        )
        for r in evaluation.results
    ]
    attacks = [r for r in evaluation.results if r.spec.function]
    if len(attacks) > 1:
        worst = 100. * sum(evaluation.worst_case) / max(count, 1)
        rows.append(('worst case', str(threat), '-', f'{worst:.2f}', '-'))
    table = format_table(rows, ('attack', 'threat model', 'steps', 'accuracy %', 'seconds'))
    notes = [f'{count} images, seed {seed}. Each attack ran on the images classified correctly.']
    if len(attacks) > 1:
        notes.append('Worst case: an image counts only if it withstands every attack above.')
    if attacks:
        notes.append('These attacks bound robustness from above; stronger ones (AutoAttack) find less.')
    if evaluation.batch_dependent:
        notes.append(
            'WARNING: this network normalizes by the batch at hand. A prediction depends on the other images in its '
            'batch, and these accuracies hold for these batches only.')
    return '\n'.join([table, '', *notes])


def versions() -> Dict[str, str]:
    """Versions of what an evaluation depends on."""
    import timm
    import torchvision
    return {
        'timm_robust': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'torchvision': torchvision.__version__,
        'python': platform.python_version(),
    }


def write_json(path: Path, content: Dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, 'w') as file:
        json.dump(content, file, indent=1)
        file.write('\n')
    os.replace(part, path)


def write_results(
        path: Path,
        evaluation: Evaluation,
        threat: ThreatModel,
        *,
        model: Dict[str, Any],
        data: Dict[str, Any],
        settings: Dict[str, Any],
        eps_sweep: Optional[Dict[float, float]] = None,
) -> None:
    """Write results.json: everything needed to repeat the evaluation, and every image's outcome.

    Args:
        path: File to write.
        evaluation: What came out.
        threat: Threat model of the attacks.
        model: Facts about the model, its weights' hash among them.
        data: Facts about the data set.
        settings: Seed, batch size, device, command and the like.
        eps_sweep: Accuracy by eps.
    """
    write_json(path, {
        'format': 1,
        'model': model,
        'data': {**data, 'num_examples': len(evaluation.labels), 'indices': evaluation.indices,
                 'labels': evaluation.labels},
        'threat_model': {'norm': threat.norm, 'eps': threat.eps, 'text': str(threat)},
        'settings': {**settings, 'batch_dependent': evaluation.batch_dependent},
        'results': [
            {
                'attack': r.spec.describe(),
                'accuracy': r.accuracy,
                'seconds': r.seconds,
                'correct': [int(c) for c in r.correct],
            }
            for r in evaluation.results
        ],
        'worst_case_accuracy': 100. * sum(evaluation.worst_case) / max(len(evaluation.labels), 1),
        **({'eps_sweep': [{'eps': e, 'accuracy': a} for e, a in eps_sweep.items()]} if eps_sweep else {}),
        'versions': versions(),
    })


def plot_eps_sweep(curves: Dict[str, Dict[float, float]], norm: str, title: str, path: Path) -> None:
    """Draw accuracy over eps, one line per name."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker='o', label=name)
    axes.set(xlabel=f'eps ({norm}, pixels in [0, 1])', ylabel='accuracy (%)', ylim=(0, 100), title=title)
    axes.grid(alpha=.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_images(examples: List[dict], names: Optional[Sequence[str]], title: str, path: Path) -> None:
    """Draw a sheet: clean image, perturbation (magnified to full contrast) and adversarial image.

    Args:
        examples: As kept by `evaluate_attacks`.
        names: Class names, or None for indices.
        title: Title of the figure.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    def name(index: int) -> str:
        return names[index] if names else str(index)

    def show(axes, image: torch.Tensor, text: str) -> None:
        image = image.permute(1, 2, 0).numpy()
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=1)
        axes.set_title(text, fontsize=8)
        axes.axis('off')

    figure = Figure(figsize=(1.6 * len(examples) + .4, 5.2), layout='constrained')
    figure.suptitle(title, fontsize=9)
    grid = figure.subplots(3, len(examples), squeeze=False)
    for column, example in enumerate(examples):
        delta = example['adversarial'] - example['clean']
        largest = delta.abs().max().clamp_min(1e-12)
        show(grid[0, column], example['clean'], f'clean: {name(example["label"])}')
        show(grid[1, column], delta / largest / 2 + .5, f'perturbation ×{.5 / largest:.0f}')
        verdict = 'fooled' if example['prediction'] != example['label'] else 'holds'
        show(grid[2, column], example['adversarial'], f'{verdict}: {name(example["prediction"])}')
    figure.savefig(path, dpi=120)
