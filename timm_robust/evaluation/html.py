"""The report as one HTML page that needs no other file and no script."""
import base64
from html import escape
from typing import Any, Dict, List, Optional, Sequence

from . import summary
from .figures import panels, to_png

__all__ = ['html_report']

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1f24; --soft: #5b6470; --line: #d9dee4; --panel: #f5f7f9;
  --bar: #2563eb; --alone: #a9c5fb; --ok: #15803d; --warning: #a15c00; --alarm: #b91c1c; --skipped: #5b6470; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --text: #e4e8ec; --soft: #9aa5b1; --line: #323941; --panel: #1d2228; --bar: #6ea0ff;
    --alone: #2f4a7d; --ok: #4ade80; --warning: #fbbf24; --alarm: #f87171; --skipped: #9aa5b1; }
  .chart { filter: brightness(.88); }
}
@media print {
  :root { color-scheme: light; } main { max-width: none; } h2 { break-after: avoid; }
  .examples { grid-template-columns: 1fr 1fr !important; }
  figure, tr, .warn, .finding, .example, .bar { break-inside: avoid; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1rem 0 .25rem; }
p { margin: .5rem 0; } .soft, figcaption { color: var(--soft); font-size: .875rem; }
.key { display: flex; flex-wrap: wrap; gap: .75rem; }
.key div { flex: 1 1 12rem; padding: .75rem 1rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--panel); }
.key b { display: block; font-size: 2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.lead { font-size: 1.05rem; }
.warn { margin: .75rem 0; padding: .6rem .9rem; border: 1px solid; border-left-width: .4rem; border-radius: .4rem; }
.warn span { color: var(--text); }
.ok { color: var(--ok); } .warning { color: var(--warning); } .alarm { color: var(--alarm); }
.skipped { color: var(--skipped); }
.badge { display: inline-block; padding: 0 .5rem; border: 1px solid; border-radius: 1rem; font-size: .8rem;
  font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.bar { display: grid; grid-template: 'name chart values' / 9rem 1fr 13rem; gap: 0 .75rem; align-items: center;
  font-size: .9rem; font-variant-numeric: tabular-nums; padding: .2rem 0; }
.bar svg { grid-area: chart; width: 100%; height: 1.1rem; } .bar .values { grid-area: values; text-align: right; }
.worst { fill: var(--bar); } .alone { fill: var(--alone); } .track { fill: var(--panel); }
.legend svg { width: .8rem; height: .8rem; margin: 0 .3rem 0 .8rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
.chart { display: block; border-radius: .5rem; border: 1px solid var(--line); background: #fff; }
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: center; }
.beside figure { flex: 1 1 20rem; max-width: 45rem; } .beside table { flex: 1 1 10rem; width: auto; max-width: 16rem; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
.example { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .25rem .5rem; }
.example p { grid-column: 1 / -1; margin: 0; }
.example img { width: 100%; display: block; border-radius: .25rem; } .pixels img { image-rendering: pixelated; }
.finding { display: grid; grid-template-columns: 5.5rem 1fr; gap: .75rem; padding: .5rem 0; align-items: start;
  border-bottom: 1px solid var(--line); }
pre { padding: .75rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--panel);
  white-space: pre-wrap; font-size: .85rem; }
.facts { columns: 2 22rem; column-gap: 2rem; } .facts div { break-inside: avoid; overflow: hidden; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 40rem) {
  .wide thead { position: absolute; clip-path: inset(50%); } .wide tr { display: block; padding: .5rem 0;
    border-bottom: 1px solid var(--line); }
  .wide td { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0; }
  .wide td::before { content: attr(data-label); color: var(--soft); } .wide td:first-child { font-weight: 600; }
  .bar { grid-template: 'name values' 'chart chart' / max-content 1fr; }
  dl { grid-template-columns: 1fr; } dd { margin: 0 0 .3rem 1rem; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title}</h1>
{body}
</main></body>
</html>
"""


def _image(png: bytes, alt: str, kind: str = '') -> str:
    data = base64.b64encode(png).decode()
    kind = f' class="{kind}"' if kind else ''
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}"{kind}>'


def _key_figures(results: Dict[str, Any]) -> str:
    clean, (robust, names) = summary.clean_accuracy(results), summary.robust_accuracy(results)
    at_most = '&le; ' if summary.bounded(results) else ''
    boxes = []
    if clean is not None:
        boxes.append(f'<div>Clean accuracy<b>{clean:.2f} %</b><span class="soft">no attack</span></div>')
    if robust is not None:
        boxes.append(
            f'<div>Robust accuracy<b>{at_most}{robust:.2f} %</b><span class="soft">'
            f"{escape(results['threat_model']['text'])}, {escape(', '.join(names))}</span></div>")
    return f'<div class="key">{"".join(boxes)}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = '') -> str:
    head = ''.join(f'<th scope="col">{escape(h)}</th>' for h in header)
    body = ''.join(
        '<tr>' + ''.join(f'<td data-label="{escape(h)}">{escape(c)}</td>' for h, c in zip(header, row)) + '</tr>\n'
        for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _beside(figure: bytes, alt: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f'<div class="beside"><figure>{_image(figure, alt, "chart")}</figure>{_table(header, rows)}</div>'


def _bars(results: Dict[str, Any]) -> str:
    bars = []
    for found in results['results']:
        alone, worst = found['accuracy'], found['worst_case_so_far']
        two = alone not in (None, worst)
        drawn = [('track', 100)] + ([('alone', alone)] if two else []) + [('worst', worst)]
        said = f'<b>{worst:.2f} %</b>' + (f' ({alone:.2f} % alone)' if two else '')
        rects = ''.join(f'<rect class="{kind}" width="{width:.3f}" height="10"/>' for kind, width in drawn)
        bars.append(
            f'<div class="bar"><span>{escape(found["attack"]["name"])}</span>'
            f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>'
            f'<span class="values">{said}</span></div>\n')
    swatch = '<svg viewBox="0 0 10 10" aria-hidden="true"><rect class="{}" width="10" height="10"/></svg>{}'
    legend = swatch.format('worst', 'worst case so far')
    legend += swatch.format('alone', 'accuracy under it alone') if 'class="alone"' in ''.join(bars) else ''
    return f'{"".join(bars)}<p class="soft legend">{legend}</p>'


def _example(example: Dict[str, Any], names: Optional[Sequence[str]]) -> str:
    label, prediction = (summary.class_name(example[key], names) for key in ('label', 'prediction'))
    fooled = example['prediction'] != example['label']
    texts = (
        ('clean', label, f"{100 * example['clean_confidence']:.1f} %"),
        ('perturbation x10',),
        ('adversarial', prediction, f"{100 * example['confidence']:.1f} %"),
    )
    shown = ''.join(
        f'<figure>{_image(to_png(panel), lines[0])}<figcaption>{"<br>".join(map(escape, lines))}</figcaption></figure>'
        for panel, lines in zip(panels(example), texts))
    verdict, outcome = ('alarm', 'fooled by') if fooled else ('ok', 'holds against')
    badge = f'<span class="badge {verdict}">{outcome} {escape(example["attack"])}</span>'
    # small images are shown larger than they are, and their pixels as they are
    kind = 'example pixels' if example['clean'].shape[-1] < 128 else 'example'
    return f'<div class="{kind}"><p><strong>{escape(label)}</strong> {badge}</p>{shown}</div>\n'


def _findings(results: Dict[str, Any]) -> str:
    return ''.join(
        f'<div class="finding"><div><span class="badge {f["verdict"]}">{f["verdict"]}</span></div>'
        f'<div><strong>{escape(summary.spoken(f["name"]))}.</strong> {escape(f["text"])}</div></div>\n'
        for f in results['diagnostics'])


def _repeat(results: Dict[str, Any]) -> str:
    command = results['settings'].get('command')
    blocks = [f'<pre><code>{escape(command)}</code></pre>'] if command else []
    groups = []
    for group, rows in summary.facts(results).items():
        items = ''.join(f'<dt>{escape(key)}</dt><dd>{escape(value)}</dd>' for key, value in rows)
        groups.append(f'<div><h3>{escape(group)}</h3><dl>{items}</dl></div>')
    blocks.append(f'<div class="facts">{"".join(groups)}</div>')
    blocks.append('<p class="soft">The indices of the images and the outcome of each are in results.json.</p>')
    return '\n'.join(blocks)


def html_report(
        results: Dict[str, Any],
        examples: List[Dict[str, Any]],
        names: Optional[Sequence[str]],
        figures: Dict[str, bytes],
) -> str:
    """The report as one HTML page, with figures in it.

    Args:
        results: Content of results.json.
        examples: Of `example_images`.
        names: Class names, or None for indices.
        figures: Of `draw_figures`.
    """
    body = [_key_figures(results), f'<p class="lead">{escape(summary.headline(results))}</p>']
    body += [
        f'<p class="warn {verdict}"><strong>{verdict.capitalize()}:</strong> <span>{escape(text)}</span></p>'
        for verdict, text in summary.warnings(results)]
    body += ['<h2>Accuracy</h2>', _bars(results), _table(summary.HEADER, summary.table_rows(results), 'wide')]
    body += [f'<p class="soft">{escape(text)}</p>' for text in summary.reading(results)]
    attack = escape(summary.sweep_attack(results))
    if 'eps_sweep.png' in figures:
        body += [
            f'<h2>Accuracy over eps under {attack}</h2>',
            _beside(figures['eps_sweep.png'], 'Accuracy over eps', ('eps', 'accuracy %'), summary.sweep_rows(results))]
    if 'mbnat_gamma.png' in figures:
        body += [
            f'<h2>Accuracy over gamma under {attack}</h2>', f'<p class="soft">{summary.GAMMA}</p>',
            _beside(figures['mbnat_gamma.png'], 'Clean and robust accuracy', summary.GAMMA_HEADER,
                    summary.gamma_rows(results))]
    if examples:
        body += ['<h2>Images</h2>', f'<div class="examples">{"".join(_example(e, names) for e in examples)}</div>']
    if results.get('diagnostics'):
        body += ['<h2>Is the robustness real?</h2>', _findings(results)]
    if 'loss_surface.png' in figures:
        surface = _image(figures['loss_surface.png'], 'Mean cross-entropy around clean images', 'chart')
        caption = f'<figcaption>{summary.SURFACE}</figcaption>'
        body += ['<h2>Loss around clean images</h2>', f'<figure>{surface}{caption}</figure>']
    body += ['<h2>To repeat this</h2>', _repeat(results)]
    return _PAGE.format(title=escape(summary.title(results)), style=_STYLE, body='\n'.join(body))
