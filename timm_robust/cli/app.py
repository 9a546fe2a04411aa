"""`timm-robust app MODEL`: a web page for attacking images.

This file also works as the app.py of a Space on the Hugging Face Hub: the variable MODEL names the network, the folder
`images` holds images to choose from, and requirements.txt is `timm-robust[app]`.
"""
import os
import sys
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torchvision.transforms.v2.functional import to_pil_image

from timm_robust.attacks import ThreatModel
from timm_robust.cli.arguments import SettingsParser, start_logging
from timm_robust.cli.flags import add_flags
from timm_robust.errors import InputError
from timm_robust.evaluation import ThreatConfig
from timm_robust.evaluation.examples import attack_picture, attacks_of_pictures
from timm_robust.evaluation.render.figures import panels
from timm_robust.evaluation.subject import Subject, open_model
from timm_robust.inputs import NetworkConfig, check_batch_size
from timm_robust.settings import from_flat
from timm_robust_command import main

__all__ = ['build_page', 'build_parser', 'run', 'show']

_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp')
_MAX_IMAGES = 24
_MIN_SIDE = 256  # smaller images are enlarged for display, without interpolation


def build_parser() -> SettingsParser:
    """The parser of `timm-robust app`."""
    parser = SettingsParser(
        ThreatConfig, prog='timm-robust app',
        description='Serve a local web page: choose or upload an image, set eps and the attack, and see prediction, '
                    'perturbation and adversarial image.',
        examples=('timm-robust app nofrost_nfnet18_cifar --images "my images"',
                  'timm-robust app output/train/mine/export --norm L2 --eps 0.5'),
        first=('norm', 'eps', 'images', 'checkpoint', 'device'))
    parser.add_argument('model', nargs='?', metavar='MODEL', help='a timm model, the folder of an exported model, or '
                        'hf-hub:ORG/NAME (default: the environment variable MODEL)')
    parser.add_argument('--images', metavar='DIR', help=f'folder with images to choose from; at most {_MAX_IMAGES} '
                        'are shown (default: images, if it exists)')
    add_flags(parser, NetworkConfig, without=('model',))
    return parser


def _class_name(subject: Subject, index: int) -> str:
    assert subject.network is not None
    names = subject.network.class_names()
    if names:
        return names[index]
    imagenet = infer_imagenet_subset(subject.network.model)  # inferred from the number of classes
    return f'class {index}' + (f', {ImageNetInfo(imagenet).index_to_description(index)}' if imagenet else '')


def show(
        subject: Subject,
        picture: Image.Image,
        threat: ThreatModel,
        attack: str,
) -> Tuple[List[Image.Image], str]:
    """Attack a picture and return what the page shows.

    Args:
        subject, picture, threat, attack: See `attack_picture`.

    Returns:
        Image, perturbation x10 and adversarial image as 8-bit pictures, and the predictions as one line of text.
    """
    example = attack_picture(subject, picture, threat, attack)
    before, after = _class_name(subject, example.label), _class_name(subject, example.prediction)
    size = threat.size((example.adversarial - example.clean)[None]).item()
    pictures = [to_pil_image(panel.clamp(0, 1)) for panel in panels(example)]
    factor = -(-_MIN_SIDE // min(pictures[0].size))
    return (
        [p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST) for p in pictures],
        f'**{before}** ({100 * example.clean_confidence:.1f} %) → **{after}** ({100 * example.confidence:.1f} %): '
        f'{"fooled" if example.fooled else "not fooled"}, {example.attack}, perturbation {threat.norm} {size:.4g}')


def build_page(subject: Subject, threat: ThreatModel, images: Sequence[Path]) -> Any:
    """The page, a `gradio.Blocks`; no data is sent to other machines."""
    import gradio as gr
    unit, shown = (1 / 255, '1/255') if threat.norm == 'Linf' else (1., 'pixel units')

    def attacked(picture: Optional[Image.Image], eps: float, attack: str) -> List[Any]:
        if picture is None:
            return [None, None, None, '']
        pictures, text = show(subject, picture, type(threat)(eps * unit), attack)
        return [*pictures, text]

    with gr.Blocks(title='timm-robust', analytics_enabled=False) as page:
        gr.Markdown(f'# {subject.facts.name}\nThe attack tries to change the prediction for the image.')
        with gr.Row():
            picture = gr.Image(label='Your image', type='pil', sources=['upload', 'clipboard'], height=_MIN_SIDE)
            with gr.Column():
                eps = gr.Slider(0, threat.scaled(4).eps / unit, threat.eps / unit, step=threat.eps / unit / 16,
                                label=f'eps ({threat.norm}, {shown})')
                attack = gr.Dropdown(
                    attacks_of_pictures(threat, subject.facts.num_classes), value='pgd', label='attack')
                text = gr.Markdown()
        with gr.Row():  # PNG, since lossy webp would destroy perturbations
            outputs = [gr.Image(label=label, format='png', interactive=False) for label in (
                'What the network sees', 'Perturbation x10', 'Adversarial image')]
        if images:
            gr.Examples([[str(path)] for path in images], [picture], label='Images')
        gr.on([picture.change, eps.release, attack.change], attacked, [picture, eps, attack], [*outputs, text])
    return page


def _images(folder: Optional[str]) -> List[Path]:
    if folder and not Path(folder).is_dir():
        raise InputError('no such folder', argument='images', value=folder)
    found = sorted(p for p in Path(folder or 'images').rglob('*') if p.suffix.lower() in _SUFFIXES)
    return found[::-(-len(found) // _MAX_IMAGES) or 1]


def run(argv: List[str]) -> None:
    """Serve the page on localhost, unless gradio's environment variables say otherwise."""
    values = build_parser().read(argv)
    start_logging()
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(f"the page needs gradio ({error}): pip install 'timm-robust[app]'") from error
    name = values.pop('model', None) or os.environ.get('MODEL')
    if not name:
        raise InputError('name a network, for example nofrost_nfnet18_cifar', argument='model')
    threat, images = from_flat(ThreatConfig, values).threat, _images(values.get('images'))
    if not threat.eps:
        raise InputError('allows no perturbation', 'pass an eps above 0', argument='eps', value=0)
    subject = open_model(from_flat(NetworkConfig, {**values, 'model': name}))
    check_batch_size(subject.model, 1)
    build_page(subject, threat, images).launch(show_error=True)


if __name__ == '__main__':
    sys.exit(main(['app', *sys.argv[1:]]))
