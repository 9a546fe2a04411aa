"""Rendering of reports: pages from templates, figures, tables for a terminal."""
from pathlib import Path
from typing import List

from ...inputs import write_bytes
from ..report import EvaluationReport
from .figures import draw_figures, plot_bars, plot_eps_sweep, plot_images, plot_loss_surface, plot_radar, plot_transfer
from .pages import (
    findings_text,
    html_report,
    html_table,
    markdown_environment,
    markdown_report,
    text_report,
    text_table,
)

__all__ = [
    'draw_figures',
    'findings_text',
    'html_report',
    'html_table',
    'markdown_environment',
    'markdown_report',
    'plot_bars',
    'plot_eps_sweep',
    'plot_images',
    'plot_loss_surface',
    'plot_radar',
    'plot_transfer',
    'text_report',
    'text_table',
    'write_report',
]


def write_report(report: EvaluationReport, folder: Path) -> List[Path]:
    """Write report.html (self-contained), report.md and its figures, each file atomically.

    Returns:
        The files written.
    """
    figures = draw_figures(report)
    pages = {'report.html': html_report(report, figures), 'report.md': markdown_report(report, figures)}
    # a path from the command line may hold bytes that are not valid text
    files = {**{name: page.encode('utf-8', 'backslashreplace') for name, page in pages.items()}, **figures}
    for name, content in files.items():
        write_bytes(folder / name, content)
    return [folder / name for name in files]
