"""Accuracy on corruptions and other shifts of distribution, as part of an evaluation."""
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

from tqdm import tqdm

from ..data import balanced_indices, check_classes, check_images, class_names, dataset_labels
from ..data.corruptions import COMMON_CORRUPTIONS, CORRUPTIONS, SEVERITIES, CorruptedDataset, check_library
from ..data.shifts import CIFAR_C, CORRUPTIONS_3D, FOLDERS, Part, cifar_10_1, cifar_c, imagenet_c, imagenet_shift
from ..errors import InputError, check_choice
from ..inputs import ImagesConfig, Network, Peers, Preprocessing, open_dataset, pixel_loader, split_of
from ..layers import has_batch_statistics
from ..models._build import classes_of
from .config import EvalConfig
from .facts import DataFacts
from .journal import Journal
from .shifts import BenchmarkResult, evaluate_shift, summarize_shifts

__all__ = ['Benchmarks']

_NAMES = ('clean', 'corruptions', *FOLDERS)
_CORRUPTED = ('corruptions', 'c', '3dcc', *CIFAR_C)


def _read_names(config: EvalConfig, data_dir: Optional[str]) -> Dict[str, str]:
    """Folder by benchmark; '' for benchmarks computed from the data set itself."""
    listed = config.benchmarks.split(',') if isinstance(config.benchmarks, str) else config.benchmarks
    found: Dict[str, str] = {}
    for text in filter(None, listed):
        name, _, folder = text.partition('=')

        def wrong(problem: str, remedy: str = '', text: str = text) -> InputError:
            return InputError(problem, remedy, argument='benchmarks', value=text)

        if name not in _NAMES:
            raise wrong('unknown', f"choose from {', '.join(_NAMES)}")
        if name in found:
            raise InputError(f'names {name} twice', argument='benchmarks', value=','.join(listed))
        if folder and name not in FOLDERS:
            raise wrong('is computed from the data set', 'pass its folder as `data_dir`')
        if name in FOLDERS and not (folder or data_dir):
            raise wrong('has no folder', f'write {name}=FOLDER, or pass its parent folder as `data_dir`')
        found[name] = folder or (str(Path(data_dir or '') / FOLDERS[name]) if name in FOLDERS else '')
    return found


def _read_corruptions(config: EvalConfig, benchmarks: Iterable[str]) -> Dict[str, List[str]]:
    """Corruptions by benchmark, for benchmarks that have any."""
    known = {name: CORRUPTIONS_3D if name == '3dcc' else CORRUPTIONS for name in benchmarks if name in _CORRUPTED}
    names = config.corruptions or (*COMMON_CORRUPTIONS, *CORRUPTIONS_3D)
    if tuple(names) == ('all',):
        names = (*CORRUPTIONS, *CORRUPTIONS_3D)
    elif config.corruptions:
        for name in names:
            check_choice('corruptions', name, (*CORRUPTIONS, *CORRUPTIONS_3D, 'all'))
            if not any(name in own for own in known.values()):
                raise InputError('is not a corruption of any requested benchmark', argument='corruptions', value=name)
    for severity in config.severities:
        if severity not in SEVERITIES:
            raise InputError('must be from 1 to 5', argument='severities', value=severity)
    for argument, values in (('corruptions', names), ('severities', config.severities)):
        if len(set(values)) < len(values):
            raise InputError('has duplicates', argument=argument, value=' '.join(map(str, values)))
    chosen = {benchmark: [name for name in names if name in own] for benchmark, own in known.items()}
    for benchmark in (b for b, own in chosen.items() if not own):
        raise InputError(f'names no corruption of {benchmark}', f"choose from {', '.join(known[benchmark])}",
                         argument='corruptions', value=' '.join(names))
    return chosen


def _refuse_union(dataset: Any, folders: Mapping[str, str], images: ImagesConfig) -> None:
    """Refuse a data folder without a folder for the split: timm would read all of it, benchmarks included."""
    root = getattr(getattr(dataset, 'reader', None), 'root', None)
    inside = [f for f in filter(None, folders.values()) if root and Path(root).resolve() in Path(f).resolve().parents]
    if inside:
        raise InputError(
            f'{images.data_dir} has no such folder, and {inside[0]} would be taken for clean images',
            'pass the folder of clean images as `data_dir` and benchmarks as NAME=FOLDER', argument='split',
            value=images.split)


def _keys(part: Part) -> List[str]:
    """Keys of the outcomes of a part; two for a part with fewer classes than the network."""
    return [part.key] + [f'{part.key}/all'] * (part.classes is not None)


class Benchmarks:
    """The benchmarks of an evaluation, opened and checked.

    Args:
        config: Settings of the evaluation.
        network: The network.
        images: Where the data set is, and how images are loaded.

    Raises:
        InputError: On unknown names, and on data that does not match the benchmark or the network.
    """

    def __init__(self, config: EvalConfig, network: Network, images: ImagesConfig):
        self.config, self.network, self.images = config, network, images
        folders = _read_names(config, images.data_dir)
        self.corruptions = _read_corruptions(config, folders)
        self.split: Optional[str] = images.split
        if images.subset != 'balanced':
            raise InputError('applies to attacks only, not to benchmarks', 'evaluate benchmarks without it',
                             argument='subset', value=images.subset)
        if 'corruptions' in folders:
            check_library()
        self.mismatch = ''
        self.parts = self._open(folders)
        # before evaluating anything, so that errors come at once
        self.chosen = {part.key: self._choose(part) for part in self.parts}
        self.batch_dependent = has_batch_statistics(network.model)
        self.batch_size = images.batch_size
        self.facts = DataFacts(
            dataset=images.dataset or 'ImageFolder', data_dir=images.data_dir, split=self.split, subset=images.subset,
            mismatch=self.mismatch)

    def _open(self, folders: Mapping[str, str]) -> List[Part]:
        network, config = self.network, self.config
        size = network.preprocessing['input_size']
        base: Any = None
        if {'clean', 'corruptions'} & set(folders):
            base = open_dataset(self.images, self.images.split, size[0], seed=config.seed)
            _refuse_union(base, folders, self.images)
            self.split = split_of(base, self.images)
            self.mismatch = check_classes(
                base, network.num_classes, network.class_names(class_names(base)),
                allow_mismatch=self.images.allow_class_mismatch)
        parts: List[Part] = []
        for name, folder in folders.items():
            if name == 'clean':
                parts.append(Part(name, lambda: base))
            elif name == 'corruptions':
                parts += [
                    Part(f'{name}/{c}/{s}', partial(CorruptedDataset, base, network.preprocessing, c, s, config.seed),
                         stored_size=size[1:])
                    for c in self.corruptions[name] for s in config.severities]
            else:
                self._check_fits(name, size[0])
                parts += self._published(name, Path(folder))
        return parts

    def _check_fits(self, name: str, channels: int) -> None:
        wanted, model = {**CIFAR_C, 'cifar10.1': 10}.get(name, 1000), self.network.config.model
        if self.network.num_classes != wanted:
            raise InputError(
                f'has {wanted} classes, but {model} has {self.network.num_classes}', argument='benchmarks', value=name)
        if channels != 3:
            raise InputError(f'has 3 channels, but {model} takes {channels}', argument='benchmarks', value=name)
        known, own = classes_of('cifar10') if wanted == 10 else None, self.network.class_names()
        if known and own and tuple(own) != known:
            raise InputError(
                f"has the classes {', '.join(known)}, in this order, but {model} has {', '.join(own)}",
                argument='benchmarks', value=name)

    def _published(self, name: str, folder: Path) -> List[Part]:
        if name in ('c', '3dcc'):
            return imagenet_c(folder, self.corruptions[name], self.config.severities, name)
        if name == 'cifar10.1':
            return cifar_10_1(folder)
        if name in CIFAR_C:
            return cifar_c(name, folder, self.corruptions[name], self.config.severities)
        return imagenet_shift(name, folder)

    def _choose(self, part: Part) -> List[int]:
        """Indices of the images of a part; opens the part."""
        dataset, count = part.open(), self.images.num_examples
        part.size = len(dataset)
        if count is None and part.expected not in (None, part.size):
            raise InputError(
                f'has {part.size:,} images, but {part.expected:,} were published', 'add the missing ones, or choose a '
                'number with `num_examples`', argument='benchmarks', value=part.key)
        if count is not None and count > part.size:
            raise InputError(f'{part.key} has only {part.size:,} images', argument='num_examples', value=count)
        return balanced_indices(dataset_labels(dataset), part.size, count, self.config.seed)

    def contexts(self, common: Mapping[str, Any]) -> Dict[str, Mapping[str, Any]]:
        """By outcome key, everything that determines the outcomes, including the entries of `common`."""
        return {key: {
            **common,
            'preprocessing': self._preprocessing(part),
            **({'seed': self.config.seed} if part.key.startswith('corruptions') else {}),
            **({'batch_size': self.batch_size} if self.batch_dependent else {}),
        } for part in self.parts for key in _keys(part)}

    def _preprocessing(self, part: Part) -> Preprocessing:
        preprocessing = self.network.preprocessing.copy()
        if part.stored_size:
            preprocessing['crop_pct'] = 1.
        return preprocessing

    def run(self, journal: Journal, peers: Peers, progress: Optional[bool]) -> None:
        """Classify this process's images of all parts, except those already in the journal."""
        hidden = True if not peers.primary else None if progress is None else not progress
        with tqdm(self.parts, unit='set', disable=hidden) as bar:
            for part in bar:
                bar.set_description_str(part.key)
                self._run_part(part, journal, peers)
        journal.say_changed()

    def _run_part(self, part: Part, journal: Journal, peers: Peers) -> None:
        indices = self.chosen[part.key]
        together = self.batch_size if self.batch_dependent else 1
        own = [indices[i] for i in peers.positions(len(indices), together)]
        if not own:
            return
        dataset = part.open()
        found = dataset_labels(dataset)
        labels = [''] * part.size if found is None else found.tolist()
        stored = check_images(getattr(dataset, 'dataset', dataset), own)
        hashes = {i: f'{digest[:16]} {labels[i]}' for i, digest in zip(own, stored)}
        keys = _keys(part)
        for key in keys:
            journal.take(key, own, [hashes[i] for i in own])
        todo = [i for i in own if any(i not in journal.correct[key] for key in keys)]
        if self.batch_dependent and todo:
            todo = own  # a prediction holds within its batch only
        if todo:
            loader = pixel_loader(
                dataset, todo, self._preprocessing(part), self.network.device, batch_size=self.batch_size,
                workers=self.images.workers, pin_mem=self.images.pin_mem)
            evaluate_shift(
                self.network.pixel_model, loader, todo, [hashes[i] for i in todo], part.key, journal,
                self.network.device, part.classes)

    def results(self, journal: Journal) -> Tuple[BenchmarkResult, ...]:
        """A result for each benchmark, from the outcomes of all processes."""
        size = self.network.preprocessing['input_size']
        return tuple(summarize_shifts(self.parts, self.chosen, journal, (size[1], size[2])))
