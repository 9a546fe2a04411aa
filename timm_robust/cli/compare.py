"""`timm-robust compare`: compare several networks over benchmarks and attacks, as table and figure."""
from pathlib import Path
from typing import Dict, List

from ..errors import InputError, check_choice
from ..evaluation.comparison import collect
from ..evaluation.render import plot_bars, plot_radar, text_table
from .arguments import Parser
from .outputs import new_file

__all__ = ['build_parser', 'run']

_KINDS = {'bars': plot_bars, 'radar': plot_radar}


def build_parser() -> Parser:
    """The parser of `timm-robust compare`."""
    parser = Parser(
        prog='timm-robust compare',
        description='Compare networks by their timm-robust eval results, with attacks or --benchmarks. Shows the '
                    'accuracies that all networks have, on the same images (NoFrost, figures 3 and 4).',
        examples=('timm-robust compare hardened=output/eval/A,output/eval/B undefended=output/eval/C --kind radar',))
    parser.add_argument('networks', nargs='+', metavar='NAME=FOLDER[,FOLDER]',
                        help='name of a network in the figure, and the folders of its evaluations')
    parser.add_argument('--kind', default='bars', help='bars or radar (default: bars)')
    parser.add_argument('--title', default='', help='title of the figure')
    parser.add_argument('-o', '--output', default='comparison.png', metavar='FILE',
                        help='PNG file for the figure (default: comparison.png)')
    return parser


def _read_folders(texts: List[str]) -> Dict[str, List[Path]]:
    folders: Dict[str, List[Path]] = {}
    for text in texts:
        name, separator, places = text.partition('=')
        if not (name and separator and places):
            raise InputError(
                'is not NAME=FOLDER, for example NoFrost=output/eval/nofrost', argument='networks', value=text)
        if name in folders:
            raise InputError(
                'this name was already given', 'list all its folders at once, separated by commas',
                argument='networks', value=text)
        folders[name] = [Path(p) for p in places.split(',')]
    return folders


def run(argv: List[str]) -> None:
    """Print the table and draw the figure."""
    args = build_parser().parse_args(argv)
    check_choice('kind', args.kind, _KINDS)
    output = new_file(args.output, '.png')
    table = collect(_read_folders(args.networks))
    _KINDS[args.kind](table, args.title, output)
    keys = list(next(iter(table.values())))
    print(text_table([(key, *(f'{row[key]:.1f}' for row in table.values())) for key in keys], ('top-1 %', *table)))
    print(f'\nWritten: {output}')
