"""Several networks side by side, from the files their evaluations wrote (NoFrost, figures 3 and 4).

NoFrost - https://arxiv.org/abs/2207.01156
"""
import json
import math
import textwrap
from pathlib import Path
from typing import Any, BinaryIO, Dict, Sequence, Tuple, Union

from ..errors import InputError

__all__ = ['collect', 'plot_bars', 'plot_radar']

_FILES = ('benchmarks.json', 'results.json')

_Row = Tuple[float, Tuple[Any, ...]]  # accuracy and what it was measured on, number of images and seed first


def _benchmarks(content: Dict[str, Any]) -> Dict[str, _Row]:
    data, seed, found = content['data'], content['settings']['seed'], {}
    for e in content['benchmarks']:
        place = (data['dataset'] or 'ImageFolder', data['split']) if e['benchmark'] in ('clean', 'corruptions') else ()
        which = (data['corruptions'], data['severities']) if e['errors'] else ()
        found[e['benchmark']] = e['accuracy'], (e['images'], seed, 'balanced', e['available'], *place, *which)
    return found


def _attacks(content: Dict[str, Any]) -> Dict[str, _Row]:
    data = content['data']
    sample = (data['num_examples'], content['settings']['seed'], data['subset'], data['num_images'], data['dataset'],
              data['split'])
    found = {}
    for row in content['results']:
        name = row['attack']['name']
        if name == 'clean':
            found[name] = row['accuracy'], sample
        elif row['accuracy'] is not None:  # it was run on all images, not on what other attacks left
            found[f"{name} {content['threat_model']['text']}"] = row['accuracy'], (*sample, row['attack'])
    return found


def collect(folders: Dict[str, Sequence[Path]]) -> Dict[str, Dict[str, float]]:
    """Accuracy in percent by network and benchmark or attack, of those that all networks have.

    The name of an attack holds its threat model, every name the number of images and the seed.

    Args:
        folders: By name of a network the folders of its evaluations, with results.json or benchmarks.json.

    Raises:
        InputError: If a folder holds neither, a network has one accuracy twice, networks were evaluated on different
            images or with different seeds, or they have nothing in common.
    """
    found: Dict[str, Dict[str, _Row]] = {}
    for name, own in folders.items():
        found[name], weights = {}, set()
        for folder in own:
            files = [Path(folder) / f for f in _FILES if (Path(folder) / f).is_file()]
            if not files:
                raise InputError(f"{name}={folder}: holds neither {' nor '.join(_FILES)}")
            for path in files:
                content = json.loads(path.read_text())
                weights.add(content['model']['weights_sha256'])
                if len(weights) > 1:
                    raise InputError(f'{name}={folder}: was measured on other weights than the folder before it')
                rows = _benchmarks(content) if path.name == _FILES[0] else _attacks(content)
                for key, value in rows.items():
                    if key != 'clean' and key in found[name]:
                        raise InputError(f'{name}={folder}: measures {key}, which another folder of {name} does too')
                    found[name].setdefault(key, value)
    first = next(iter(found.values()))
    common = [key for key in first if all(key in own for own in found.values())]
    if not common:
        raise InputError(f"{', '.join(found)}: have no benchmark or attack in common")
    for key in common:
        for name, own in found.items():
            if own[key][1] != first[key][1]:
                raise InputError(
                    f'{name}: {key} was measured on other images or with other settings than that of '
                    f'{next(iter(found))}: give both the same data, --num-examples, --seed, attacks, --corruptions and '
                    '--severities')
    titles = {key: f'{key} ({first[key][1][0]:,} images, seed {first[key][1][1]})' for key in common}
    return {name: {titles[key]: own[key][0] for key in common} for name, own in found.items()}


def plot_bars(table: Dict[str, Dict[str, float]], title: str, path: Union[Path, BinaryIO]) -> None:
    """Draw `collect`'s table as groups of bars, a group for each benchmark, as a PNG at `path`."""
    from matplotlib.figure import Figure
    keys = list(next(iter(table.values())))
    figure = Figure(figsize=(max(6., 1.3 * len(keys) + 1.5), 4), layout='constrained')
    axes = figure.subplots()
    width = .8 / len(table)
    for i, (name, row) in enumerate(table.items()):
        bars = axes.bar([k + i * width for k in range(len(keys))], list(row.values()), width, label=name)
        axes.bar_label(bars, fmt='%.0f', fontsize=7)
    labels = [textwrap.fill(key, 18) for key in keys]
    axes.set_xticks([k + .4 - width / 2 for k in range(len(keys))], labels, fontsize=8)
    axes.set(ylabel='accuracy (%)', ylim=(0, 100), title=title)
    axes.legend(fontsize=8)
    figure.savefig(path, format='png', dpi=120)


def plot_radar(table: Dict[str, Dict[str, float]], title: str, path: Union[Path, BinaryIO]) -> None:
    """Draw `collect`'s table with an axis for each benchmark around a centre at 0 %, as a PNG at `path`.

    Raises:
        InputError: If there are less than three axes.
    """
    from matplotlib.figure import Figure
    keys = list(next(iter(table.values())))
    if len(keys) < 3:
        raise InputError(f'--kind radar: needs three benchmarks or more, there are {len(keys)}: choose bars')
    figure = Figure(figsize=(6.5, 6), layout='constrained')
    axes = figure.add_subplot(projection='polar')
    angles = [2 * math.pi * k / len(keys) for k in range(len(keys))]
    for name, row in table.items():
        values = list(row.values())
        axes.plot([*angles, angles[0]], [*values, values[0]], marker='o', markersize=3, label=name)
        axes.fill(angles, values, alpha=.1)
    axes.set_xticks(angles, [textwrap.fill(key, 18) for key in keys], fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_title(title)
    axes.legend(loc='lower left', bbox_to_anchor=(-.15, -.12), fontsize=8)
    figure.savefig(path, format='png', dpi=120)
