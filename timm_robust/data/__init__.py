from .check import (
    check_classes,
    check_distinct,
    check_images,
    check_labels,
    check_split,
    class_names,
    conflicting_labels,
    dataset_labels,
    dataset_size,
    image_channels,
    is_grey,
    whole_datasets,
)
from .subset import balanced_indices, listed_indices

__all__ = [
    'balanced_indices',
    'check_classes',
    'check_distinct',
    'check_images',
    'check_labels',
    'check_split',
    'class_names',
    'conflicting_labels',
    'dataset_labels',
    'dataset_size',
    'image_channels',
    'is_grey',
    'listed_indices',
    'whole_datasets',
]
