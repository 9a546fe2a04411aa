"""The report as Markdown."""
import html
import re
from typing import Any, Dict, List, Optional, Sequence

from . import summary

__all__ = ['markdown_report']


def _safe(value: Any) -> str:
    """Text that is shown as it is: neither markup nor the end of a table cell or line."""
    text = html.escape(' '.join(str(value).split()), quote=False)
    return re.sub(r'([\\`*_\[\]|~$#])', r'\\\1', text)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numbers = [all(re.fullmatch(r'-|[\d.]+', cell) for cell in column) for column in zip(*rows)]
    lines = [header, ['---:' if n else '---' for n in numbers], *([_safe(cell) for cell in row] for row in rows)]
    return '\n'.join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """A block of code, fenced by more backticks than the code has in a row."""
    fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence}\n{text}\n{fence}'


def _examples(examples: List[Dict[str, Any]], names: Optional[Sequence[str]]) -> str:
    rows = [
        (summary.class_name(e['label'], names), f"{100 * e['clean_confidence']:.1f}", e['attack'],
         summary.class_name(e['prediction'], names), f"{100 * e['confidence']:.1f}",
         'fooled' if e['prediction'] != e['label'] else 'holds')
        for e in examples]
    return _table(('label', 'clean confidence %', 'attack', 'prediction', 'its confidence %', 'outcome'), rows)


def markdown_report(
        results: Dict[str, Any],
        examples: List[Dict[str, Any]],
        names: Optional[Sequence[str]],
        figures: Dict[str, bytes],
) -> str:
    """The report as Markdown, with figures by file name.

    Args:
        results: Content of results.json.
        examples: Of `example_images`.
        names: Class names, or None for indices.
        figures: Of `draw_figures`.
    """
    blocks = [f'# {_safe(summary.title(results))}', f'**{_safe(summary.headline(results))}**']
    blocks += [f'> **{verdict.upper()}** {_safe(text)}' for verdict, text in summary.warnings(results)]
    blocks += ['## Accuracy', _table(summary.HEADER, summary.table_rows(results))]
    blocks += map(_safe, summary.reading(results))
    if 'eps_sweep.png' in figures:
        blocks += [
            '## Accuracy over eps', f'Under {_safe(summary.sweep_attack(results))}.',
            '![Accuracy over eps](eps_sweep.png)', _table(('eps', 'accuracy %'), summary.sweep_rows(results))]
    if 'mbnat_gamma.png' in figures:
        blocks += [
            '## Accuracy over gamma', f'{summary.GAMMA} Robust accuracy under {_safe(summary.sweep_attack(results))}.',
            '![Clean and robust accuracy](mbnat_gamma.png)',
            _table(summary.GAMMA_HEADER, summary.gamma_rows(results))]
    if examples:
        blocks += ['## Images', '![Clean image, perturbation x10, adversarial image](images.png)',
                   _examples(examples, names)]
    if results.get('diagnostics'):
        blocks += ['## Is the robustness real?', '\n'.join(
            f"- **{f['verdict']}** {_safe(summary.spoken(f['name']))}: {_safe(f['text'])}"
            for f in results['diagnostics'])]
    if 'loss_surface.png' in figures:
        blocks += ['## Loss around clean images', '![Mean cross-entropy around clean images](loss_surface.png)',
                   summary.SURFACE]
    blocks += ['## To repeat this']
    if results['settings'].get('command'):
        blocks.append(_code(results['settings']['command']))
    for group, rows in summary.facts(results).items():
        blocks.append(_table((group, ''), rows))
    blocks.append('The indices of the images and the outcome of each are in `results.json`.')
    return '\n\n'.join(blocks) + '\n'
