"""Which images of a data set to evaluate: a seeded, class-balanced choice, or a published list."""
import importlib.util
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from ..errors import InputError

__all__ = ['balanced_indices', 'listed_indices']


def balanced_indices(labels: Optional[np.ndarray], size: int, num_examples: Optional[int], seed: int) -> List[int]:
    """Choose images at random, with the classes as balanced as possible.

    Args:
        labels: Class index of every image, or None to choose regardless of class.
        size: Number of images in the data set.
        num_examples: Number of images to choose, None for all.
        seed: Seed of the selection.

    Returns:
        Indices in a random order in which every prefix is balanced, so that batches are mixed too.

    Raises:
        InputError: If `num_examples` is not positive or larger than `size`.
    """
    num_examples = size if num_examples is None else num_examples
    if not 0 < num_examples <= size:
        raise InputError(
            f'must be between 1 and {size}, the size of the data set', argument='num_examples', value=num_examples)
    order = np.random.default_rng(seed).permutation(size)
    if labels is not None:
        # sort by the number of earlier images of the same class; ties stay in random order
        rank = np.empty(size, dtype=np.int64)
        for label in np.unique(labels):
            own = order[labels[order] == label]
            rank[own] = np.arange(len(own))
        order = order[np.argsort(rank[order], kind='stable')]
    return order[:num_examples].tolist()


def _robustbench_list() -> Path:
    """The list of 5,000 ImageNet validation images in an installed robustbench package."""
    spec = importlib.util.find_spec('robustbench')
    places = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in places:
        for found in folder.rglob('imagenet_test_image_ids.txt'):
            return found
    raise InputError(
        'the list imagenet_test_image_ids.txt is part of the robustbench package, which is not installed',
        'install it, or give the path of the list', argument='subset', value='robustbench')


def listed_indices(dataset: Any, subset: str, num_examples: Optional[int]) -> List[int]:
    """The images named in a list, in its order.

    Args:
        dataset: A timm data set of image files.
        subset: 'robustbench' for the ImageNet images of RobustBench (Croce et al. 2021,
            https://arxiv.org/abs/2010.09670), or the path of a text file with one image per line, as NAME or
            FOLDER/NAME.
        num_examples: Number of images to take from the start of the list, None for all.

    Returns:
        Indices into the data set.

    Raises:
        InputError: If there is no such list, it names an image twice or one that does not exist, or the data set has no
            file names.
    """
    def wrong(problem: str, remedy: str = '') -> InputError:
        return InputError(problem, remedy, argument='subset', value=subset)

    path = _robustbench_list() if subset == 'robustbench' else Path(subset)
    if not path.is_file():
        raise wrong('no such file', 'choose balanced, robustbench or a file of image names')
    if getattr(getattr(dataset, 'reader', None), 'samples', None) is None:
        raise wrong('needs a folder of image files')
    try:
        names = [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(f'cannot be read as a list of image names ({type(error).__name__})') from error
    if not names:
        raise wrong('names no images')
    index: Dict[str, List[int]] = {}
    for i in range(len(dataset)):
        file = Path(dataset.filename(i, basename=False))
        for name in (file.name, f'{file.parent.name}/{file.name}'):
            index.setdefault(name, []).append(i)
    found = [index.get('/'.join(Path(n).parts[-2:])) or index.get(Path(n).name, []) for n in names]
    seen = set()
    for name, places in zip(names, found):
        if len(places) != 1:
            raise wrong(f"{name} {'names more than one image' if places else 'is not in the data set'}")
        if places[0] in seen:
            raise wrong(f'names the image {name} twice', 'remove one of the lines')
        seen.add(places[0])
    if num_examples is not None and not 0 < num_examples <= len(names):
        raise InputError(
            f'must be between 1 and {len(names)}, the length of the list', argument='num_examples', value=num_examples)
    return [places[0] for places in found[:num_examples]]
