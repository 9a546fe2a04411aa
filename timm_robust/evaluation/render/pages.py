"""The report as self-contained HTML, as Markdown, and as text for a terminal."""
import base64
import html
import re
import textwrap
from pathlib import Path
from typing import Any, List, Mapping, Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tabulate import tabulate

from ..facts import Example, Finding
from ..outcome import percent
from ..report import EvaluationReport
from . import words
from .figures import panels, to_png

__all__ = [
    'findings_text',
    'html_report',
    'html_table',
    'markdown_environment',
    'markdown_report',
    'text_report',
    'text_table',
]


def _markdown(value: Any) -> Markup:
    """Escape text so that Markdown shows it literally, on one line and in one table cell."""
    if isinstance(value, Markup):
        return value
    text = html.escape(' '.join(str(value).split()), quote=False)
    return Markup(re.sub(r'([\\`*_\[\]|~$#])', r'\\\1', text))


def _backticks(text: str, least: int) -> str:
    """More backticks than any run of them in the text."""
    return '`' * max(least, 1 + max(map(len, re.findall('`+', text)), default=0))


def _fenced(text: str, language: str = '') -> Markup:
    """A block of code."""
    fence = _backticks(text, 3)
    return Markup(f'{fence}{language}\n{text}\n{fence}')


def _code(value: Any) -> Markup:
    """Code within a line."""
    text = ' '.join(str(value).split())
    fence, space = _backticks(text, 1), ' ' if '`' in text else ''
    return Markup(f'{fence}{space}{text}{space}{fence}')


def _alignment(rows: Sequence[Sequence[str]]) -> List[Markup]:
    """Numbers to the right, all else to the left."""
    return [
        Markup('---:') if all(re.fullmatch(r'-|[\d.]+', cell) for cell in column) else Markup('---')
        for column in zip(*rows)]


_TEMPLATES = Path(__file__).parent / 'templates'


def _environment(folder: Path, **kwargs: Any) -> Environment:
    found = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, **kwargs)
    found.globals['words'] = words
    return found


def markdown_environment(folder: Path) -> Environment:
    """The jinja environment of Markdown templates; values are escaped, or shown as code by `code` and `fenced`.

    Args:
        folder: Folder of the templates.
    """
    found = _environment(folder, finalize=_markdown)
    found.filters.update(cell=_markdown, code=_code, fenced=_fenced)
    found.globals['alignment'] = _alignment
    return found


_HTML = _environment(_TEMPLATES)
_HTML.filters['base64'] = lambda png: base64.b64encode(png).decode()
_MARKDOWN = markdown_environment(_TEMPLATES)


def html_report(report: EvaluationReport, figures: Mapping[str, bytes]) -> str:
    """The report as one HTML page, with the figures embedded.

    Args:
        report: The report.
        figures: From `draw_figures`.
    """
    def pictures(example: Example) -> List[bytes]:
        return [to_png(panel) for panel in panels(example)]

    def cumulative_of(outcome: Any) -> float:
        return percent(report.standing(outcome.name))

    page = _HTML.get_template('report.html').render(
        report=report, figures=figures, pictures=pictures, cumulative_of=cumulative_of)
    return page.lstrip()


def html_table(report: EvaluationReport) -> str:
    """The table of attacks as HTML, for a notebook."""
    return _HTML.get_template('table.html').render(report=report)


def markdown_report(report: EvaluationReport, figures: Mapping[str, bytes]) -> str:
    """The report as Markdown, which links to the figures by file name.

    Args:
        report: The report.
        figures: From `draw_figures`.
    """
    return _MARKDOWN.get_template('report.md').render(report=report, figures=figures)


def text_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A table of aligned columns, the first to the left and the others to the right."""
    return tabulate(
        [list(map(str, row)) for row in rows], headers=list(header), disable_numparse=True,
        colalign=['left', *['right'] * (len(header) - 1)] if rows else None)


def _wrapped(header: str) -> str:
    return header.replace(', ', ',\n')


def text_report(report: EvaluationReport) -> str:
    """Accuracy per attack, benchmarks and notes as text."""
    blocks = [words.title(report)]
    if report.attacks:
        blocks.append(text_table(words.attack_rows(report), list(map(_wrapped, words.HEADER))))
    if words.threat_rows(report):
        blocks.append(text_table(words.threat_rows(report), words.threat_header(report)))
    if report.benchmarks:
        blocks.append(text_table(words.benchmark_rows(report), words.BENCHMARK_HEADER))
        blocks += [
            f'{b.name}: error (%) by severity\n\n{text_table(words.severity_rows(b), words.severity_header(b))}'
            for b in report.benchmarks if b.errors]
    blocks.append('\n'.join(words.notes(report)))
    if report.findings:
        blocks.append(f'Is the robustness real?\n\n{findings_text(report.findings)}')
    return '\n\n'.join(blocks)


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings for a terminal: alarms, warnings and skipped checks in full, then the names of the others."""
    blocks = [
        f"{verdict.upper():<8} {f.name.replace('_', ' ')}\n"
        + textwrap.fill(f.text, 110, initial_indent=' ' * 9, subsequent_indent=' ' * 9)
        for verdict in ('alarm', 'warning', 'skipped') for f in findings if f.verdict == verdict]
    fine = ', '.join(f.name.replace('_', ' ') for f in findings if f.verdict == 'ok')
    if fine:
        blocks.append(textwrap.fill(f'OK       {fine}', 110, subsequent_indent=' ' * 9))
    return '\n\n'.join(blocks)
