"""summary.csv: a row for each validated epoch, and its curves."""
import csv
import io
from pathlib import Path
from typing import Any, Dict, List, Mapping

from ..inputs import write_text

__all__ = ['add_row', 'plot_curves', 'read_rows', 'trim']


def read_rows(path: Path) -> List[Dict[str, str]]:
    """The rows of a summary; none if the file is missing or not a summary."""
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        return [row for row in rows if int(row['epoch']) >= 0]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []


def _write(path: Path, rows: List[Dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue() if rows else '')


def trim(path: Path, start_epoch: int) -> None:
    """Remove the rows of epochs that will be repeated; rename a file that is not a summary."""
    if not path.is_file():
        return
    rows = read_rows(path)
    if not rows and path.stat().st_size:
        path.rename(path.with_name(f'{path.stem}-broken{path.suffix}'))
        return
    _write(path, [row for row in rows if int(row['epoch']) < start_epoch])


def add_row(
        path: Path,
        epoch: int,
        train_metrics: Mapping[str, float],
        eval_metrics: Mapping[str, float],
        lr: float,
) -> Dict[str, Any]:
    """Add an epoch and return its row; if earlier rows have other columns, their file is renamed first."""
    row: Dict[str, Any] = {
        'epoch': epoch, **{f'train_{k}': v for k, v in train_metrics.items()},
        **{f'eval_{k}': v for k, v in eval_metrics.items()}, 'lr': lr}
    rows: List[Dict[str, Any]] = list(read_rows(path))
    if rows and list(rows[0]) != list(row):
        path.rename(path.with_name(f'{path.stem}-before-{epoch}{path.suffix}'))
        rows = []
    _write(path, [*rows, row])
    return row


def plot_curves(summary: Path, output: Path) -> None:
    """Plot every loss and accuracy of a summary over the epochs.

    Args:
        summary: The summary.csv of a run.
        output: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    rows = read_rows(summary)
    if not rows:
        return
    epochs = [int(r['epoch']) for r in rows]
    figure = Figure(figsize=(10, 4), layout='constrained')
    losses, accuracies = figure.subplots(1, 2)
    for name in rows[0]:
        axes = losses if 'loss' in name else accuracies if 'top1' in name else None
        if axes is not None:
            axes.plot(epochs, [float(r[name]) for r in rows], marker='.', label=name)
    losses.set(xlabel='epoch', ylabel='loss')
    accuracies.set(xlabel='epoch', ylabel='accuracy (%)', ylim=(0, 100))
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=.3)
        axes.legend()
    figure.savefig(output, dpi=120)
