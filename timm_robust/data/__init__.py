from .check import check_images, check_labels, dataset_labels, image_channels, is_grey
from .subset import balanced_indices, listed_indices

__all__ = [
    'balanced_indices',
    'check_images',
    'check_labels',
    'dataset_labels',
    'image_channels',
    'is_grey',
    'listed_indices',
]
