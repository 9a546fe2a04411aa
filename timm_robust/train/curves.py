"""Curves of loss and accuracy from a summary.csv."""
import csv
from pathlib import Path

__all__ = ['plot_curves']


def plot_curves(summary: Path, output: Path) -> None:
    """Draw every loss and every accuracy of a summary.csv over the epochs.

    Args:
        summary: The summary.csv of a run.
        output: PNG file to write.
    """
    from matplotlib.figure import Figure
    with open(summary, newline='') as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    epochs = [int(r['epoch']) + 1 for r in rows]
    figure = Figure(figsize=(10, 4), layout='constrained')
    losses, accuracies = figure.subplots(1, 2)
    for name in rows[0]:
        axes = losses if 'loss' in name else accuracies if 'top1' in name else None
        if axes is not None:
            axes.plot(epochs, [float(r[name]) for r in rows], marker='.', label=name)
    losses.set(xlabel='epoch', ylabel='loss')
    accuracies.set(xlabel='epoch', ylabel='accuracy (%)', ylim=(0, 100))
    for axes in (losses, accuracies):
        axes.grid(alpha=.3)
        axes.legend()
    figure.savefig(output, dpi=120)
