"""What `diagnose` says of a network that hides its gradients: a trained one behind 16 grey levels.

    python train_scripts/reproduce/masked_network.py --model local-dir:RUN/export --data-dir DIR --split test

The network itself is the surrogate. Prints PGD-20 accuracy of both, then the findings for the masked one.
"""
import sys

import torch

from timm_robust.attacks import PGD
from timm_robust.cli.arguments import Parser
from timm_robust.cli.diagnose import findings_text
from timm_robust.cli.inputs import add_input_arguments, add_threat_arguments, open_inputs, read_threat
from timm_robust.evaluation import diagnose


class GreyLevels(torch.nn.Module):
    """Rounds pixels, which has gradient zero, before the network sees them."""

    def __init__(self, model: torch.nn.Module, levels: int = 16):
        super().__init__()
        self.model, self.steps = model, levels - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x * self.steps).round() / self.steps)


def main() -> None:
    """Run."""
    parser = Parser(prog='masked_network.py', description=__doc__.split('\n', 1)[0])
    add_threat_arguments(parser.add_argument_group('Threat model'))
    add_input_arguments(parser, num_examples=40)
    args = parser.parse_args(sys.argv[1:])
    threat, inputs = read_threat(args), open_inputs(args, torch.device(args.device or 'cpu'))
    x, y = inputs.first(len(inputs.indices))
    honest, masked = inputs.pixel_model, GreyLevels(inputs.pixel_model).eval()
    for name, model in (('network', honest), ('masked', masked)):
        with torch.no_grad():
            held = (model(PGD(steps=20)(model, x, y, threat, seed=args.seed)).argmax(1) == y).double().mean()
        print(f'{name}: {100 * held:.1f} % of {len(x)} images under PGD-20, {threat}, seed {args.seed}')
    found = diagnose(
        masked, x, y, threat, batch_size=args.batch_size, seed=args.seed, surrogate=honest, steps=(20, 100))
    print('\n' + findings_text(found))


if __name__ == '__main__':
    main()
