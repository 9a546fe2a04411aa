"""What an evaluation leaves: results.json, a table, and a report to look at."""
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from ..attacks import ThreatModel
from ..inputs import write_bytes
from ..version import __version__
from .diagnostics import Finding
from .figures import draw_figures
from .html import html_report
from .markdown import markdown_report
from .outcome import Evaluation, percent
from .summary import HEADER, notes, table_rows

__all__ = [
    'build_results',
    'evaluation_table',
    'format_table',
    'write_report',
]


def format_table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A table of aligned columns, the first to the left and the others to the right."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [str(row[0]).ljust(widths[0])] + [str(c).rjust(w) for c, w in zip(row[1:], widths[1:])]
        return '  '.join(cells).rstrip()

    return '\n'.join([line(header), '  '.join('-' * w for w in widths), *map(line, rows)])


def evaluation_table(results: Dict[str, Any]) -> str:
    """Accuracy per attack as text, from the content of results.json."""
    return '\n'.join([format_table(table_rows(results), HEADER), '', *notes(results)])


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


def build_results(
        evaluation: Evaluation,
        threat: ThreatModel,
        *,
        model: Dict[str, Any],
        data: Dict[str, Any],
        settings: Dict[str, Any],
        eps_sweep: Optional[Dict[float, float]] = None,
        mbnat_gamma_sweep: Sequence[Dict[str, float]] = (),
        findings: Sequence[Finding] = (),
) -> Dict[str, Any]:
    """The content of results.json: everything needed to repeat the evaluation, and every image's outcome.

    Args:
        evaluation: What came out.
        threat: Threat model of the attacks.
        model: Facts about the model, its weights' hash among them.
        data: Facts about the data set.
        settings: Seed, batch size, device, command and the like.
        eps_sweep: Accuracy by eps.
        mbnat_gamma_sweep: Of `sweep_mbnat_gamma`.
        findings: Of `diagnose`.
    """
    content = {
        'format': 2,
        'model': model,
        'data': {**data, 'num_examples': len(evaluation.labels), 'indices': evaluation.indices,
                 'labels': evaluation.labels},
        'threat_model': {'norm': threat.norm, 'eps': threat.eps, 'text': str(threat)},
        'settings': {**settings, 'batch_dependent': evaluation.batch_dependent},
        'results': [
            {
                'attack': r.spec.describe(),
                'accuracy': r.accuracy,
                'worst_case_so_far': r.worst_case_accuracy,
                'attacked': r.attacked,
                'seconds': round(r.seconds, 3),
                'correct': [None if c is None else int(c) for c in r.correct],
            }
            for r in evaluation.results
        ],
        'worst_case_accuracy': percent(evaluation.worst_case),
        'versions': versions(),
    }
    if eps_sweep:
        content['eps_sweep'] = [{'eps': e, 'accuracy': a} for e, a in eps_sweep.items()]
    if mbnat_gamma_sweep:
        content['mbnat_gamma_sweep'] = list(mbnat_gamma_sweep)
    if findings:
        content['diagnostics'] = [asdict(f) for f in findings]
    return content


def write_report(
        folder: Path,
        results: Dict[str, Any],
        examples: List[Dict[str, Any]],
        class_names: Optional[Sequence[str]] = None,
        surface: Optional[Dict[str, Any]] = None,
) -> List[Path]:
    """Write report.html, which needs no other file, report.md and the figures it shows.

    Args:
        folder: Where to.
        results: Content of results.json.
        examples: Images of `example_images`, or none.
        class_names: Class names, or None for indices.
        surface: Of `loss_surface`, or None.

    Returns:
        The files written.
    """
    figures = draw_figures(results, examples, class_names, surface)
    pages = {
        'report.html': html_report(results, examples, class_names, figures),
        'report.md': markdown_report(results, examples, class_names, figures),
    }
    # a path from the command line may hold bytes that are no text
    files = {**{name: page.encode('utf-8', 'backslashreplace') for name, page in pages.items()}, **figures}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / name, content)
    return [folder / name for name in files]
