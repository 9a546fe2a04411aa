"""`timm-robust fetch`: checkpoints of the papers' authors as pretrained weights."""
from typing import List

from ..hub import FETCHED, fetch
from .arguments import Parser
from .outputs import print_next

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust fetch`."""
    parser = Parser(
        prog='timm-robust fetch',
        description="Download a checkpoint from the public folder of its paper's authors, convert it, and store it "
                    'where timm.create_model(MODEL, pretrained=True) finds it: the folder timm_robust inside the '
                    'folder of torch.hub ($TORCH_HOME/hub, by default ~/.cache/torch/hub). No downloaded code is run.',
        examples=('timm-robust fetch nofrost_resnet50',))
    parser.add_argument('name', metavar='MODEL', help=f"one of {', '.join(FETCHED)}; the first tag can be omitted")
    parser.add_argument('--file', default='', metavar='PATH',
                        help='path of the checkpoint in that folder, if its name does not identify it')
    return parser


def run(argv: List[str]) -> None:
    """Download a checkpoint and store it as pretrained weights."""
    args = build_parser().parse_args(argv)
    found = fetch(args.name, file=args.file)
    print(f'Stored {found.file} as {found.path}\n{found.known} Evaluate it before you rely on it.')
    print_next('eval', {'model': found.name, 'data_dir': 'IMAGENET', 'split': 'validation',
                        'eps': '4/255', 'attacks': 'clean,pgd20,autoattack', 'num_examples': 1000})
