"""Atomic writes of files; JSON and YAML readers with one-line errors."""
import json
import os
import re
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Union

import yaml

from ..errors import InputError

__all__ = [
    'file_name', 'json_text', 'read_json', 'read_yaml', 'write_bytes', 'write_json', 'write_text', 'written_whole']

PathLike = Union[str, 'os.PathLike[str]']


def file_name(model: str) -> str:
    """A model's name, or the path of its folder, made usable in a file name."""
    return re.sub(r'\W+', '_', model.rpartition(':')[2]).strip('_')[-80:]


@contextmanager
def written_whole(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends, and is deleted if it fails.

    The content is synced to disk before the rename, so that after a crash there is the old file or the new one.

    Raises:
        OSError: Naming `path`, not the temporary path.
    """
    target = Path(path)
    part = target.with_name(f'.{target.name}.{secrets.token_hex(4)}')
    try:
        yield part
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno or 0, error.strerror or str(error), str(target)) from error
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: PathLike, content: bytes) -> None:
    """Write a file atomically."""
    with written_whole(path) as part:
        part.write_bytes(content)


def write_text(path: PathLike, content: str) -> None:
    """Write UTF-8 atomically; characters that cannot be encoded, as in some paths, are escaped."""
    write_bytes(path, content.encode('utf-8', 'backslashreplace'))


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON with each list of numbers on one line."""
    return re.sub(r'\[\n[^][{}"]*\]', lambda match: ' '.join(match[0].split()), json.dumps(content, indent=1)) + '\n'


def write_json(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_bytes(path, json_text(content).encode())


def read_json(path: PathLike, argument: str = 'path') -> Dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        path: The file.
        argument: Its name in errors.

    Raises:
        InputError: If there is no such file or it does not hold a JSON mapping.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())[:100] or type(error).__name__
        raise InputError(f'cannot be read as JSON ({reason})', argument=argument, value=str(path)) from error
    if not isinstance(content, dict):
        raise InputError(
            f'must hold a JSON mapping, not a {type(content).__name__}', argument=argument, value=str(path))
    return content


class _Loader(yaml.SafeLoader):
    """YAML without duplicate names, and with 1e-3 as a number, as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f'{name} occurs more than once')
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$'), list('-+0123456789'))


def read_yaml(path: PathLike, argument: str = 'config') -> Dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: The file.
        argument: Its name in errors.

    Raises:
        InputError: If it cannot be read, is not a mapping, or has a duplicate name.
    """
    try:
        content = yaml.load(Path(path).read_bytes().decode(), _Loader)
    except (OSError, yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())[:200]
        raise InputError(f'cannot be read as YAML ({reason})', argument=argument, value=str(path)) from error
    if not isinstance(content, dict):
        raise InputError('must hold "name: value" lines', argument=argument, value=str(path))
    return content
