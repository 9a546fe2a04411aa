"""Which images of a data set to evaluate: a seeded, class-balanced choice, or a published list."""
import importlib.util
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np

from ..errors import InputError

__all__ = ['balanced_indices', 'listed_indices']


def balanced_indices(labels: Optional[np.ndarray], size: int, num_examples: Optional[int], seed: int) -> List[int]:
    """Choose images at random with as equal a share of each class as possible.

    Args:
        labels: Class index of every image, or None to choose regardless of class.
        size: Number of images there are.
        num_examples: Number of images to choose, None for all.
        seed: Seed of the choice.

    Returns:
        Indices in a random order in which every prefix is balanced, so that batches are mixed too.

    Raises:
        InputError: If `num_examples` is not positive or more than there are.
    """
    num_examples = size if num_examples is None else num_examples
    if not 0 < num_examples <= size:
        raise InputError(f'--num-examples {num_examples}: must be between 1 and {size}, the size of the data set')
    order = np.random.default_rng(seed).permutation(size)
    if labels is not None:
        # sort by how many images of the same class stand before; ties stay in random order
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
        '--subset robustbench: the list imagenet_test_image_ids.txt is part of the robustbench package, which is not '
        'installed: install it, or give the path of the list')


def listed_indices(dataset, subset: str, num_examples: Optional[int]) -> List[int]:
    """The images a list names, in its order.

    Args:
        dataset: A timm data set of image files.
        subset: 'robustbench' for the ImageNet images of RobustBench (Croce et al. 2021,
            https://arxiv.org/abs/2010.09670), or the path of a text file with one image on each line, by its name or
            by folder and name.
        num_examples: Take the first so many, None for all.

    Returns:
        Indices into the data set.

    Raises:
        InputError: If there is no such list, the data set has no file names, or it lacks an image.
    """
    path = _robustbench_list() if subset == 'robustbench' else Path(subset)
    if not path.is_file():
        raise InputError(f'--subset {subset}: no such file; choose balanced, robustbench or a file of image names')
    if getattr(getattr(dataset, 'reader', None), 'samples', None) is None:
        raise InputError(f'--subset {subset}: needs a folder of image files')
    index: Dict[str, List[int]] = {}
    for i in range(len(dataset)):
        file = Path(dataset.filename(i, basename=False))
        for name in (file.name, f'{file.parent.name}/{file.name}'):
            index.setdefault(name, []).append(i)
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    found = [index.get('/'.join(Path(n).parts[-2:])) or index.get(Path(n).name, []) for n in names]
    for name, places in zip(names, found):
        if len(places) != 1:
            what = 'is the name of more than one image' if places else 'is not in the data set'
            raise InputError(f'--subset {subset}: {name} {what}')
    if num_examples is not None and not 0 < num_examples <= len(names):
        raise InputError(f'--num-examples {num_examples}: must be between 1 and {len(names)}, the length of the list')
    return [places[0] for places in found[:num_examples]]
