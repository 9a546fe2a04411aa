"""Inputs of every command: a network with its weights, images, a device; and files written atomically."""
from .device import Process, check_seed, init_process, resolve_device
from .export import export_model, make_loadable
from .files import json_text, read_json, read_yaml, write_bytes, write_json, write_text, written_whole
from .images import DatasetConfig, Images, ImagesConfig, choose_images, open_dataset, open_images, pixel_loader
from .network import (
    ModelConfig,
    Network,
    NetworkConfig,
    Preprocessing,
    build_network,
    build_surrogate,
    check_batch_size,
    check_surrogate,
    create_network,
    pixel_network,
    resolve_preprocessing,
)
from .peers import Peers
from .pretrained import num_outputs
from .weights import (
    Checkpoint,
    Conversion,
    convert_state_dict,
    fit_weights,
    load_weights,
    read_checkpoint,
    weights_sha256,
    write_weights,
)

__all__ = [
    'Checkpoint',
    'Conversion',
    'DatasetConfig',
    'Images',
    'ImagesConfig',
    'ModelConfig',
    'Network',
    'NetworkConfig',
    'Peers',
    'Preprocessing',
    'Process',
    'build_network',
    'build_surrogate',
    'check_surrogate',
    'check_batch_size',
    'check_seed',
    'choose_images',
    'convert_state_dict',
    'create_network',
    'export_model',
    'fit_weights',
    'init_process',
    'json_text',
    'load_weights',
    'make_loadable',
    'num_outputs',
    'open_dataset',
    'open_images',
    'pixel_loader',
    'pixel_network',
    'read_checkpoint',
    'read_json',
    'read_yaml',
    'resolve_device',
    'resolve_preprocessing',
    'weights_sha256',
    'write_bytes',
    'write_json',
    'write_text',
    'write_weights',
    'written_whole',
]
