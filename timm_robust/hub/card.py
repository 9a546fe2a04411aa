"""Model cards; every number is computed from the outcomes in results.json, which were measured on the same weights."""
import math
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple, cast

import torch.nn as nn
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from markupsafe import Markup
from timm.models import is_model, model_entrypoint

from ..errors import InputError
from ..evaluation import AttackOutcome, EvaluationReport, read_reports
from ..evaluation.render import markdown_environment
from ..evaluation.subject import eval_mode
from ..inputs import (
    Preprocessing,
    export_model,
    fingerprint,
    json_text,
    make_loadable,
    read_json,
    weights_sha256,
    write_json,
    write_text,
    written_whole,
)
from ..models._build import WEIGHTS_DIR, classes_of
from ..settings import check_types, from_mapping, to_mapping
from .benchmark import published, write_benchmark
from .metadata import (
    Evaluations,
    arxiv_ids,
    diagnoses,
    doubts,
    eval_files,
    has_autoattack,
    hub_datasets,
    overlap,
    threat_tags,
)
from .papers import citations

__all__ = [
    'FIGURES', 'Card', 'Evaluations', 'build_card_folder', 'card_files', 'card_text', 'read_card', 'result_rows',
    'rewrite_card_folder']

FIGURES = ('eps_sweep.png', 'gamma_sweep.png', 'loss_surface.png', 'images.png')
_FEW_CLASSES = 20  # up to this many are listed by name
_HEADER = ('data', 'images', 'threat model', 'attack', 'steps', 'seed', 'accuracy %', '95 % interval')
_TEMPLATE = markdown_environment(Path(__file__).parent / 'templates').get_template('card.md')
_SAME = 1e-3  # of the largest logit: devices round differently
_PREPROCESSING = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


@dataclass(frozen=True, kw_only=True)
class Card:
    """The contents of a card other than measurements.

    Attributes:
        name: Model and tag, 'nofrost_resnet50.nofrost_linf8_in1k'.
        repo_id: Where the model is published.
        license: Identifier of the licence of the weights.
        model_args: Arguments of the model.
        objective: Objective of this package that the model was trained with.
        command: Command of that training.
        base_model: Pretrained weights that training started from.
        origin: Source of weights that were not trained by this package.
        selection: Which weights of the run these are and how they were selected.
        train_data, train_split: Data set and split of the training, '' if unknown.
        figures: Names of figures in the folder.

    Raises:
        InputError: If the name has no tag or timm does not know the model, or the repository's name is invalid.
    """
    name: str
    repo_id: str
    license: str = 'apache-2.0'
    model_args: Dict[str, object] = field(default_factory=dict)
    objective: str = ''
    command: str = ''
    base_model: str = ''
    origin: str = ''
    selection: str = ''
    train_data: str = ''
    train_split: str = ''
    figures: Tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        if not (self.tag and is_model(self.model)):
            raise InputError('must be MODEL.TAG with a model timm knows', 'timm.list_models() lists them',
                             argument='name', value=self.name)
        if not self.repo_id:
            raise InputError('say where it will be published', argument='repo_id')
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise InputError(str(error), argument='repo_id', value=self.repo_id) from error
        if not (self.command or self.origin):
            raise InputError('say where the weights are from', 'give `command` or `origin`')
        for figure in self.figures:
            if re.sub(r'^\d+_', '', figure) not in FIGURES:
                raise InputError('is not a figure of an evaluation', argument='figures', value=figure)

    @property
    def model(self) -> str:
        """Name of the model, without its tag."""
        return self.name.partition('.')[0]

    @property
    def tag(self) -> str:
        """Name of the weights."""
        return self.name.partition('.')[2]

    @property
    def architecture(self) -> str:
        """Model name in the published config: timm's name if timm has the same network, else this package's name."""
        own = self.model.replace('nofrost', 'nf', 1)
        return own if self.model.startswith('nofrost') and is_model(own) else self.model

    @property
    def in_plain_timm(self) -> bool:
        """Whether timm can load the model without this package."""
        return model_entrypoint(self.architecture).__module__.startswith('timm.')

    @property
    def packaged(self) -> bool:
        """Whether the weights ship with this package."""
        return (WEIGHTS_DIR / f'{self.name}.safetensors').is_file()

    @property
    def arguments(self) -> str:
        """Arguments of the model as text."""
        return ', '.join(f'{k}={v}' for k, v in self.model_args.items())


def _order(report: EvaluationReport, outcomes: Sequence[AttackOutcome]) -> List[AttackOutcome]:
    """AutoAttack first, then other attacks from the strongest, clean accuracy last."""
    return sorted(outcomes, key=lambda a: (a.is_clean, not a.is_autoattack, report.accuracy(a.name)))


def result_rows(evaluations: Evaluations) -> List[Tuple[str, ...]]:
    """Rows of the card's table, each with everything its accuracy depends on; equal rows appear once."""
    def row(name: str, report: EvaluationReport, threat: object, attack: str, effort: str, accuracy: float,
            interval: Tuple[float, float]) -> Tuple[str, ...]:
        return (name, f'{report.data.num_examples:,}', str(threat or '-'), attack, effort or '-',
                str(report.settings.seed), f'{accuracy:.2f}', '{:.1f} to {:.1f}'.format(*interval))

    rows: List[Tuple[str, ...]] = []
    for name, report in evaluations:
        if len(report.threats) > 1 and report.robust_accuracy is not None:
            worst = report.robust_accuracy
            rows.append(row(name, report, report.threat, 'worst case over all', '', worst.accuracy, worst.interval))
        rows += [
            row(name, report, outcome.threat, report.described(outcome), outcome.effort,
                report.accuracy(outcome.name), report.interval(outcome.name))
            for outcome in _order(report, report.attacks)]
    return list(dict.fromkeys(rows))


def _eval_results(evaluations: Evaluations) -> List[EvalResult]:
    """The same accuracies as model-index metadata."""
    found: List[EvalResult] = []
    for name, report in evaluations:
        for outcome in _order(report, published(report)):
            threat = outcome.threat
            attack, (low, high) = report.described(outcome), report.interval(outcome.name)
            of_attack = {
                'attack': attack, 'effort': outcome.effort, 'norm': threat.norm, 'eps': threat.eps} if threat else {}
            result = EvalResult(
                task_type='image-classification',
                task_name='Image Classification',
                dataset_type=name.split(' ')[0].lower(),
                dataset_name=name,
                dataset_split=report.data.split,
                metric_type='accuracy',
                metric_name=f'Robust accuracy ({attack}, {threat})' if threat else 'Clean accuracy',
                metric_value=round(report.accuracy(outcome.name), 2),
                metric_args={
                    **of_attack, 'num_examples': report.data.num_examples, 'seed': report.settings.seed,
                    'interval': [round(low, 2), round(high, 2)]},
            )
            if result not in found:
                found.append(result)
    return found


def _class_names(card: Card, evaluations: Evaluations) -> Tuple[str, ...]:
    """Class names of the evaluated data, or else of the data set that the tag ends with."""
    names = [report.data.class_names for _, report in evaluations if not report.data.mismatch]
    known = classes_of(card.name) or ()
    return next(filter(None, names), known if len(known) == evaluations[0][1].model.num_classes else ())


def _link(text: str) -> str:
    """Turn an address into a link; leave other text unchanged."""
    return Markup(f'<{text}>') if re.fullmatch(r'https?://[^\s<>]+', text) else text


def card_text(card: Card, evaluations: Evaluations) -> str:
    """The card as Markdown with metadata.

    Args:
        card: Its contents other than measurements.
        evaluations: Measurements of these weights, each with the name of its data.
    """
    papers = citations(card.model, card.objective, has_autoattack(evaluations))
    arxiv = arxiv_ids(papers)
    names = _class_names(card, evaluations)
    overlaps = overlap(card.train_data, card.train_split, card.base_model, evaluations)
    data = ModelCardData(
        model_name=card.name,
        library_name='timm',
        license=card.license,
        base_model=card.base_model or None,
        base_model_relation='finetune' if card.base_model else None,
        datasets=hub_datasets([card.train_data]) or None,
        tags=['image-classification', 'timm', *(['transformers'] if card.in_plain_timm else []),
              'adversarial-robustness', 'timm-robust', *threat_tags(evaluations), *(f'arxiv:{i}' for i in arxiv)],
        pipeline_tag='image-classification',
        eval_results=_eval_results(evaluations),
    )
    body = _TEMPLATE.render(
        card=card,
        header=_HEADER,
        rows=result_rows(evaluations),
        in_turn=any(not outcome.complete for _, report in evaluations for outcome in report.attacks),
        warnings=doubts([text for doubtful, text in overlaps if doubtful], evaluations),
        diagnoses=diagnoses(evaluations),
        overlap=[text for doubtful, text in overlaps if not doubtful],
        class_names=names if len(names) <= _FEW_CLASSES else names[:0],
        num_classes=len(names),
        arxiv=arxiv,
        commands='\n'.join(report.settings.command for _, report in evaluations),
        citations='\n\n'.join(papers),
        link=_link,
    )
    return f'---\n{data.to_yaml()}\n---\n\n{body}'


def read_card(folder: Path) -> Tuple[Card, Evaluations, Dict[str, Any]]:
    """Read the results.json of a card folder: the card, its measurements, and the whole content.

    Raises:
        InputError: If the file does not belong to a card, or an accuracy in it does not match its outcomes.
    """
    path = folder / 'results.json'
    try:
        content = read_json(path)
        evaluations = read_reports(path)
        if not isinstance(content.get('card'), dict):
            raise InputError('holds no card', 'build the folder again')
        return from_mapping(Card, content['card']), evaluations, content
    except InputError as error:
        inner = str(error) if error.argument not in ('', 'path') else error.explanation
        raise InputError(f'results.json {inner}', argument='folder', value=str(folder)) from error


def _read_results(path: str) -> EvaluationReport:
    try:
        report = EvaluationReport.load(path)
    except InputError as error:
        raise error.about('results', path) from error
    if not report.attacks:
        raise InputError('was measured without attacks', 'evaluate clean accuracy and attacks', argument='results',
                         value=path)
    return report


def measured_preprocessing(evaluations: Evaluations) -> Preprocessing:
    """The preprocessing of images, which must be the same in all measurements.

    Raises:
        InputError: If it differs between measurements or is unknown.
    """
    found = [{k: getattr(report.model, k) for k in _PREPROCESSING} for _, report in evaluations]
    if any(f != found[0] for f in found) or None in found[0].values():
        raise InputError('were measured with different or unknown preprocessing', 'evaluate again', argument='results')
    return cast(Preprocessing, found[0])


def _figures(results: Sequence[str]) -> Dict[str, Path]:
    """Figures next to the results, by their names in the card folder."""
    folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in results]
    return {
        f'{index}_{figure}' if index else figure: folder / figure
        for index, folder in enumerate(folders) for figure in FIGURES if (folder / figure).is_file()}


def build_card_folder(
        folder: Path,
        card: Card,
        model: nn.Module,
        results: Sequence[str],
        data_names: Sequence[str],
) -> List[Path]:
    """Write all files of a model repository on the Hub; the same input gives the same bytes.

    Args:
        folder: Where to write.
        card: Contents of the card; `figures` is replaced by the figures next to the results.
        model: The network with its weights.
        results: Paths of results.json or of their folders.
        data_names: Name of the data of each results.json.

    Returns:
        The files written.

    Raises:
        InputError: If a results.json was measured on other weights, or its accuracies do not match its outcomes.
    """
    if len(data_names) != len(results):
        raise InputError(f'names {len(data_names)} data sets for {len(results)} results', 'give one for each',
                         argument='data_name')
    evaluations = [(name, _read_results(path)) for name, path in zip(data_names, results)]
    digest = weights_sha256(model)
    for path, (_, report) in zip(results, evaluations):
        if report.model.weights_sha256 != digest:
            raise InputError(
                f'was measured on other weights ({report.model.weights_sha256[:12]}) than these ({digest[:12]})',
                'evaluate these weights', argument='results', value=path)
        for name, found, own in (('bn_mode', report.model.bn_mode or 'population', 'population'),
                                 ('model_kwargs', report.model.model_kwargs or card.model_args, card.model_args)):
            if found != own:
                raise InputError(f'was measured with {name} {found}, but the published network has {own}',
                                 'evaluate the network as it is published', argument='results', value=path)
        if report.model.logits and report.model.gamma is None:
            with eval_mode(model):
                logits = fingerprint(model, report.model.input_size) or (math.inf,) * len(report.model.logits)
            differences = [abs(a - b) for a, b in zip(logits, report.model.logits, strict=True)]
            if max(differences) > _SAME * max(map(abs, report.model.logits)):
                raise InputError(
                    'was measured on a network with other logits, although its weights are the same',
                    'publish it with the arguments it was evaluated with, such as global_pool and those in '
                    '`model_kwargs`', argument='results', value=path)
    preprocessing, figures = measured_preprocessing(evaluations), _figures(results)
    card = replace(card, figures=tuple(figures))
    export_model(
        model,
        folder,
        preprocessing=preprocessing,
        class_names=_class_names(card, evaluations) or None,
        pretrained_cfg={'tag': card.tag, 'license': card.license},
        architecture=card.architecture,
    )
    for target, source in figures.items():
        with written_whole(folder / target) as part:
            shutil.copyfile(source, part)
    texts = card_files(card, evaluations)
    _write(folder, texts)
    return sorted(folder / name for name in ('config.json', 'model.safetensors', *texts, *figures))


def card_files(card: Card, evaluations: Evaluations) -> Dict[str, str]:
    """The text files of a card folder, by name, generated from the card and its measurements."""
    return {
        'README.md': card_text(card, evaluations),
        'results.json': json_text({
            'weights_sha256': evaluations[0][1].model.weights_sha256,
            'card': to_mapping(card),
            'data_names': [name for name, _ in evaluations],
            'evaluations': [report.to_dict() for _, report in evaluations],
        }),
        **eval_files(card.repo_id, evaluations),
    }


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files of a card folder, and the benchmark of all cards next to it."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, text)
    cards = sorted(folder.absolute().parent.glob('*/results.json'))
    write_benchmark(folder.parent / 'benchmark', [pair for path in cards for pair in read_card(path.parent)[1]])


def rewrite_card_folder(folder: Path, **changes: Any) -> List[Path]:
    """Regenerate the card of a folder from its results.json, without the weights.

    Args:
        folder: Folder written by `build_card_folder`.
        **changes: Fields of `Card` that change.

    Returns:
        The files written.

    Raises:
        InputError: If `folder` is not a card folder.
    """
    card, evaluations, _ = read_card(folder)
    texts = card_files(replace(card, **changes), evaluations)
    config = read_json(folder / 'config.json')
    make_loadable(config, _class_names(card, evaluations) or None)
    write_json(folder / 'config.json', config)
    _write(folder, texts)
    return sorted(folder / name for name in ('config.json', *texts))
