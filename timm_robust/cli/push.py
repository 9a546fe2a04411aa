"""`timm-robust push`: publish a card folder on the Hugging Face Hub."""
from pathlib import Path
from typing import List

from ..hub import plan_push, push
from .arguments import Parser

__all__ = ['build_parser', 'run']


def build_parser() -> Parser:
    """The parser of `timm-robust push`."""
    parser = Parser(
        prog='timm-robust push',
        description='Publish a folder built by timm-robust card in one commit: card, config, results, figures and '
                    'safetensors weights. The token comes from HF_TOKEN or `hf auth login`.',
        examples=('timm-robust push hub_cards/resnet18.trades_linf8_birds --repo-id ME/MINE --dry-run',))
    parser.add_argument('folder', metavar='DIR', help='hub_cards/MODEL.TAG')
    parser.add_argument('--org', default='', metavar='NAME', help='organization or user (default: yourself)')
    parser.add_argument('--repo-id', default='', metavar='ORG/NAME', help='repository (default: ORG/MODEL.TAG)')
    parser.add_argument('--public', action='store_true', help='create a public repository (default: private)')
    parser.add_argument('--revision', default=None, metavar='BRANCH', help='branch, created if it does not exist')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    parser.add_argument('--dry-run', action='store_true', help='show what would be uploaded, without uploading it')
    return parser


def run(argv: List[str]) -> None:
    """Check the folder and upload it, unless --dry-run is given."""
    args = build_parser().parse_args(argv)
    folder = Path(args.folder)
    of_org = f'{args.org}/{folder.resolve().name}' if args.org else ''
    plan = plan_push(folder, args.repo_id or of_org)
    print(plan)
    if args.dry_run:
        print('Nothing was uploaded (--dry-run).')
        return
    print('Uploaded: ' + push(plan, private=not args.public, revision=args.revision, create_pr=args.create_pr))
