"""A second device on a machine without one, in pure Python: what a GPU would refuse or wait for, a test sees here.

Its tensors say that they are on `device`, hold theirs on the CPU, and compute there, bit for bit. As on a GPU, an
operation that mixes them with tensors of the CPU fails, and whatever would make the host wait for the device is noted
with its line: reading a value, finding indices, a copy in either direction. A copy to the device that is
`non_blocking` costs no wait, for a GPU stages it.

It is torch's PrivateUse1 device, which has to be there before the first backward pass of a process and cannot be
unregistered, and it patches torch: only a process of its own may import this file, see test_fake_device.py.
"""
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import timm_robust

__all__ = ['FakeDevice', 'fake_device']

_NAME = 'fake'
_PACKAGE = f'{Path(timm_robust.__file__).parent}/'
_aten = torch.ops.aten

_READS = {  # the size of the result depends on values, or the result is on the host
    'aten::_unique2', 'aten::bincount', 'aten::equal', 'aten::is_nonzero', 'aten::masked_select', 'aten::nonzero',
    'aten::repeat_interleave.Tensor', 'aten::unique_consecutive', 'aten::unique_dim'}
_INDEXES = {
    'aten::_index_put_impl_', 'aten::_unsafe_index_put', 'aten::index.Tensor', 'aten::index_put', 'aten::index_put_'}

_active: Optional['FakeDevice'] = None


class Wait(NamedTuple):
    """The host waits for the device.

    Attributes:
        kind: Why.
        where: File and line of the package.
    """
    kind: str
    where: str


class FakeDevice:
    """What is noted while the device is there.

    Attributes:
        device: The device.
        waits: Every wait so far.
        has_float64: Whether it knows float64; Apple's does not.
    """

    def __init__(self, has_float64: bool = True):
        self.device = torch.device(_NAME, 0)
        self.waits: List[Wait] = []
        self.has_float64 = has_float64

    def note(self, kind: str) -> None:
        """Note a wait."""
        self.waits.append(Wait(kind, _where()))

    def count(self) -> Counter:
        """How often the host waited, by kind and line."""
        return Counter(f'{wait.where} {wait.kind}' for wait in self.waits)

    def check_dtype(self, result: Any) -> None:
        """Refuse float64 as Apple's device does."""
        first = tree_flatten(result)[0][:1]  # what a kernel of the CPU returns besides is its own
        if not self.has_float64 and first and getattr(first[0], 'dtype', None) == torch.float64:
            raise TypeError(f'the device does not know float64, at {_where()}')


def _where() -> str:
    outer: Any = sys._getframe()
    while outer is not None and not outer.f_code.co_filename.startswith(_PACKAGE):
        outer = outer.f_back
    if outer is None:
        return 'outside of the package'
    return f'{outer.f_code.co_filename.removeprefix(_PACKAGE)}:{outer.f_lineno}'


class _FakeTensor(torch.Tensor):
    """A tensor of the device, whose values `raw` holds on the CPU."""
    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> '_FakeTensor':
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(_NAME, 0))
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f'fake {self.raw!r}'

    def __getitem__(self, key: Any) -> torch.Tensor:
        return torch.Tensor.__getitem__(self, _on_device(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        torch.Tensor.__setitem__(self, _on_device(key), value)

    def tolist(self) -> Any:
        _noted('tolist')
        return self.detach().raw.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of the device to numpy, use Tensor.cpu() first")


def _noted(kind: str) -> None:
    assert _active is not None, 'the device is used outside of fake_device()'
    _active.note(kind)


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, _FakeTensor) else value


def _on_device(key: Any) -> Any:
    """Lists in an index, which torch would make tensors of where no method of a subclass is asked."""
    if isinstance(key, tuple):
        return tuple(map(_on_device, key))
    return torch.tensor(key, device=_NAME) if isinstance(key, list) else key


def _is_here(device: Any) -> bool:
    return torch.device(device).type == _NAME


def _copied(source: torch.Tensor, kwargs: Dict[str, Any]) -> torch.Tensor:
    here = _is_here(kwargs.get('device') or source.device)
    if isinstance(source, _FakeTensor) and not here:
        _noted('copy to the host')
    if not isinstance(source, _FakeTensor) and here and not kwargs.get('non_blocking'):
        _noted('copy to the device')
    kept = {k: v for k, v in kwargs.items() if k not in ('device', 'non_blocking', 'pin_memory')}
    copy = _aten._to_copy.default(_raw(source), **kept)
    return _FakeTensor(copy) if here else copy


def _copied_into(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(source, _FakeTensor) and not isinstance(target, _FakeTensor):
        _noted('copy to the host')
    if isinstance(target, _FakeTensor) and not isinstance(source, _FakeTensor) and source.ndim and not non_blocking:
        _noted('copy to the device')
    _raw(target).copy_(_raw(source))
    return target


def _run(func: Any, args: Any, kwargs: Dict[str, Any]) -> Any:
    """An operation, on the CPU."""
    assert _active is not None, 'the device is used outside of fake_device()'
    name, flat = func.name(), tree_flatten((args, kwargs))[0]
    if func is _aten._to_copy.default:
        result = _copied(args[0], kwargs)
        if isinstance(result, _FakeTensor):
            _active.check_dtype(result)
        return result
    if func is _aten.copy_.default:
        return _copied_into(*args, **kwargs)
    if func is _aten._local_scalar_dense.default:
        _noted('item')
        return func(_raw(args[0]))
    if name in _READS:
        _noted(name.split('::')[1])
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    own = [t for t in tensors if isinstance(t, _FakeTensor)]
    # a single number may come from the host, and so may an index
    strangers = [t for t in tensors if not isinstance(t, _FakeTensor) and t.ndim]
    if name in _INDEXES:
        indices = [i for i in args[1] if i is not None]
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8):
                _noted('index by a mask')
            elif not isinstance(index, _FakeTensor) and index.ndim:
                _noted('index from the host')
        strangers = [t for t in strangers if not any(t is i for i in indices)]
    if own and strangers:
        raise RuntimeError(f'Expected all tensors to be on the same device: {name} at {_where()}')
    args, kwargs = tree_map(_raw, (args, kwargs))
    device = kwargs.pop('device', None)
    kwargs.pop('pin_memory', None)
    result = func(*args, **kwargs)
    if not (_is_here(device) if device is not None else own):
        return result
    if name != 'aten::empty.memory_format':  # torch's for the statistics of an empty batch
        _active.check_dtype(result)
    known = {id(t.raw): t for t in own}  # what an operation changes in place is returned itself

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else _FakeTensor(value)

    return tree_map(wrapped, result)


class _Module(_DummyBackendModule):
    """What torch asks of `torch.fake`."""

    def get_amp_supported_dtype(self) -> List[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def _maker(make: Callable) -> Callable:
    """`torch.tensor` and its like, which copy to a device out of Python's sight."""
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or not _is_here(device):
            return make(data, *args, **kwargs) if device is None else make(data, *args, device=device, **kwargs)
        return data if isinstance(data, _FakeTensor) else make(data, *args, **kwargs).to(device)

    return made


_setup_privateuseone_for_python_backend(_NAME, backend_module=_Module())
_library = torch.library.Library('_', 'IMPL')  # what it registers ends with it
_library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), 'PrivateUse1')
torch.tensor, torch.as_tensor = _maker(torch.tensor), _maker(torch.as_tensor)
torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot change its class in place


@contextmanager
def fake_device(has_float64: bool = True) -> Iterator[FakeDevice]:
    """The device, new.

    Args:
        has_float64: Whether it knows float64.
    """
    global _active
    _active = FakeDevice(has_float64)
    try:
        yield _active
    finally:
        _active = None
