"""What `diagnose` finds in a network with masked gradients: a trained network whose input is rounded to 16 grey levels.

    python train_scripts/reproduce/masked_network.py --model local-dir:RUN/export --data-dir DIR --split test

The network itself is the surrogate. Prints PGD-20 accuracy of both, then the findings for the masked one.
"""
import torch

from timm_robust.attacks import PGD
from timm_robust.cli.arguments import Parser
from timm_robust.cli.flags import add_flags
from timm_robust.evaluation import ThreatConfig, diagnose
from timm_robust.evaluation.render import findings_text
from timm_robust.evaluation.sources import open_data
from timm_robust.evaluation.subject import open_model
from timm_robust.inputs import ImagesConfig, NetworkConfig
from timm_robust.settings import from_flat


class GreyLevels(torch.nn.Module):
    """Rounds pixels before the network, so that the gradient is zero."""

    def __init__(self, model: torch.nn.Module, levels: int = 16):
        super().__init__()
        self.model, self.steps = model, levels - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x * self.steps).round() / self.steps)


def main() -> None:
    """Evaluate both networks and diagnose the masked one."""
    parser = Parser(prog='masked_network.py', description=__doc__.split('\n', 1)[0])
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='seed of images and noise (default: 0)')
    for cls in (ThreatConfig, ImagesConfig, NetworkConfig):
        add_flags(parser, cls)
    parser.set_defaults(device='cpu')
    args = parser.parse_args()
    threat, subject = from_flat(ThreatConfig, vars(args)).threat, open_model(from_flat(NetworkConfig, vars(args)))
    source = open_data(from_flat(ImagesConfig, vars(args)), subject, seed=args.seed, usual_examples=40)
    x, y = (t.to(subject.device) for t in source.first(len(source.indices)))
    honest, masked = subject.model, GreyLevels(subject.model).eval()
    for name, model in (('network', honest), ('masked', masked)):
        with torch.no_grad():
            held = (model(PGD(steps=20)(model, x, y, threat, seed=args.seed)).argmax(1) == y).double().mean()
        print(f'{name}: {100 * held:.1f} % of {len(x)} images under PGD-20, {threat}, seed {args.seed}')
    found = diagnose(
        masked, x, y, threat, batch_size=args.batch_size, seed=args.seed, surrogate=honest, steps=(20, 100))
    print('\n' + findings_text(found))


if __name__ == '__main__':
    main()
