"""A CUDA device for CPU builds of torch, for tests: real numbers, real dispatch, no GPU.

``enable()`` makes ``device="cuda"`` work. Tensors there say that they lie on ``cuda:0``, take CUDA's dispatch, autocast
and autograd keys, and refuse to meet tensors of the CPU; each kernel is the CPU's, run on the same memory, and noted.
So the code that a GPU would run is run: what mixes devices raises, what waits for the device is counted, and an
operation that only CUDA has can be given an emulation. What it cannot show: speed, rounding, memory of CUDA's kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = SOURCE.parents[2] / "build"


def build() -> Path:
    """Compile the C++ part, once for each torch and each text of it: half a minute."""
    torch_version = importlib.metadata.version("torch")
    library = BUILD / f"pretend_cuda-{hashlib.sha256(SOURCE.read_bytes() + torch_version.encode()).hexdigest()[:12]}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
        words = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(fresh)]
        subprocess.run([*words, f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"], check=True)
        fresh.replace(library)  # another process may be building as well
    return library


# torch asks once, while it is imported, whether there is a GPU: the answer must be there before.
if "torch" in sys.modules:
    raise ImportError("import pretend_cuda before torch")
TORCH = Path(importlib.util.find_spec("torch").origin).parent
for _path in (TORCH / "lib/libc10.so", TORCH / "lib/libtorch_cpu.so", build()):
    ctypes.CDLL(str(_path), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from tests.gpu import flash_emulation, pretend_graphs  # noqa: E402

# Their results' sizes, or what Python does next, hang on numbers on the device: the host waits for it.
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::equal", "aten::repeat_interleave.Tensor",
}  # fmt: skip
# May take CPU tensors beside CUDA ones, and say so in their documentation.
MIXED = {"aten::copy_", "aten::_index_put_impl_", "aten::index.Tensor", "aten::index.Tensor_out"}
# Have a kernel for all devices that asks for one of each.
GENERIC = ("copy_",)


@dataclass
class Log:
    """What ran on the device.

    Attributes:
        kernels: name, type and shapes of everything that would have been launched.
        waits: places in the code that waited for the device.
        uploads: places that copied from the host.
        slow_uploads: those of them that the host waits in: from pageable memory, or told to wait.
        replays: graphs that were replayed; their kernels are not among ``kernels``.
    """

    kernels: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    waits: list[tuple[str, str]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    slow_uploads: list[str] = field(default_factory=list)
    replays: int = 0

    def counts(self) -> Counter[str]:
        """Launches by operation and type."""
        return Counter(f"{name} {kind}" for name, kind, _ in self.kernels)


_logs: list[Log] = []


@contextmanager
def watch() -> Any:
    """Note what runs on the device in this context."""
    log = Log()
    _logs.append(log)
    try:
        yield log
    finally:
        _logs.remove(log)


_library: Any = None


def enable() -> None:
    """Make the device; once and for the whole process."""
    global _library
    if _library is not None:
        return
    if torch.backends.cuda.is_built():
        raise RuntimeError("this torch has CUDA: use it")
    _library = torch.library.Library("_", "IMPL", "CUDA")
    _library.fallback(_run, "CUDA")
    _library_aten = torch.library.Library("aten", "IMPL")
    for name in GENERIC:
        op = getattr(torch.ops.aten, name.split(".")[0])
        op = getattr(op, name.split(".")[1] if "." in name else "default")
        _library_aten.impl(name, partial(_run, op), "CUDA")
    _library_aten.impl("mm.dtype", _mm_wide, "CUDA")
    for name, function in flash_emulation.IMPLEMENTATIONS.items():
        op = getattr(torch.ops.aten, name).default
        _library_aten.impl(name, partial(_emulated, op, function), "CUDA")
    _library = _library, _library_aten
    _python_side()


def _emulated(op: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that only CUDA has."""
    leaves = tree_leaves((args, kwargs))
    _check_meeting(op._schema.name, leaves)
    _note(op, args, kwargs, leaves)
    with torch._C._AutoDispatchBelowAutograd():
        host, device = torch.ops.pretend_cuda.host, torch.ops.pretend_cuda.device
        args, kwargs = tree_map(lambda x: host(x) if _on_device(x) else x, (args, kwargs))
        return tuple(t if t is None else device(t) for t in pretend_graphs.run(function, args, kwargs))


def _mm_wide(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """cuBLAS multiplies half-precision numbers and hands their sums out in float32; the CPU has no such call."""
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype or out_dtype != torch.float32:
        raise RuntimeError(f"out_dtype must be float32 over half-precision operands, not {out_dtype} over {a.dtype}")
    _note(torch.ops.aten.mm.dtype, (a, b), {}, [a, b])
    host = torch.ops.pretend_cuda.host
    with torch._C._AutoDispatchBelowAutograd():
        wide = pretend_graphs.run(lambda a, b: a.float() @ b.float(), (host(a), host(b)), {})
        return torch.ops.pretend_cuda.device(wide)


def _python_side() -> None:
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.mem_get_info = lambda device=None: (80 << 30, 80 << 30)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="pretended", total_memory=80 << 30, major=8, minor=0, multi_processor_count=108
    )
    cuda.synchronize = lambda device=None: None
    cuda.set_device = lambda device: None
    cuda.Stream, cuda.Event, cuda.stream = _InOrder, _InOrder, lambda stream: nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: _InOrder()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
        module.manual_seed = module.manual_seed_all = lambda seed: None
    pretend_graphs.put_in(cuda)
    pretend_graphs.Graph.on_replay = staticmethod(_replayed)
    plain: Any = torch.UntypedStorage.__deepcopy__
    torch.UntypedStorage.__deepcopy__ = lambda self, memo: (
        _storage_copy(self, memo) if self.is_cuda else plain(self, memo)
    )
    from torch.cuda.amp import common

    common.amp_definitely_not_available = lambda: False


def _storage_copy(storage: torch.UntypedStorage, memo: dict[int, Any]) -> torch.UntypedStorage:
    if storage._cdata not in memo:
        memo[storage._cdata] = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()
    return memo[storage._cdata]


class _InOrder:
    """A stream or an event of a device that does one thing after the other."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "synchronize", "record", "wait"):
            return lambda *_: None
        if name == "record_event":
            return lambda *_: self
        if name == "query":
            return lambda: True
        raise AttributeError(name)


def _where() -> str:
    """The innermost line of the caller's code that is not torch's or this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return "(autograd)"


def _on_device(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_cuda


def _check_meeting(name: str, leaves: list[Any]) -> None:
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    strangers = [t for t in tensors if not t.is_cuda and t.dim() > 0]
    if strangers and name not in MIXED:
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")


def _note(op: Any, args: Any, kwargs: Any, leaves: list[Any]) -> None:
    name = op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
    if op._schema.name == "aten::copy_":
        to, source = args[0].is_cuda, args[1].is_cuda
        name = {(True, True): "copy_", (True, False): "upload", (False, True): "download"}[to, source]
    crosses = name in ("upload", "download")
    goes_on = crosses and len(args) > 2 and bool(args[2])  # non_blocking
    waits = name in WAITS or (name == "download" and not goes_on)
    slow = name == "upload" and not (goes_on and args[1].is_pinned())
    if waits or slow:
        pretend_graphs.Waits.note()
    if not _logs:
        return
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    kind = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    shapes = tuple(tuple(t.shape) for t in tensors)
    for log in _logs:
        log.kernels.append((name, kind, shapes))
        if waits:
            log.waits.append((name, _where()))
        if name == "upload":
            log.uploads.append(_where())
        if slow:
            log.slow_uploads.append(_where())


def _replayed() -> None:
    for log in _logs:
        log.replays += 1


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation on the device: the CPU's kernel on the same memory."""
    with torch._C._AutoDispatchBelowAutograd():
        leaves = tree_leaves((args, kwargs))
        _check_meeting(op._schema.name, leaves)
        _note(op, args, kwargs, leaves)
        given: dict[int, torch.Tensor] = {}

        def to_host(x: Any) -> Any:
            if _on_device(x):
                if id(x) not in given:  # an empty `out=` may be there to grow
                    host = torch.ops.pretend_cuda.host
                    given[id(x)] = host(x) if x.numel() else torch.empty(x.shape, dtype=x.dtype)
                return given[id(x)]
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        out = pretend_graphs.run(op, host_args, host_kwargs)
        back = {id(h): x for x in leaves if _on_device(x) and (h := given.get(id(x))) is not None}
        bases = [x for x in leaves if _on_device(x)]
        for x in bases:
            if given[id(x)].shape != x.shape:
                torch.ops.pretend_cuda.take_over(x, given[id(x)])
        if isinstance(out, torch.Tensor):
            return _to_device(out, back, bases)
        if isinstance(out, (tuple, list)):
            return type(out)(_to_device(o, back, bases) if isinstance(o, torch.Tensor) else o for o in out)
        return out


def _to_device(out: torch.Tensor, back: dict[int, torch.Tensor], bases: list[torch.Tensor]) -> torch.Tensor:
    if id(out) in back:
        return back[id(out)]
    for base in bases:  # a view
        start, size = base.untyped_storage().data_ptr(), base.untyped_storage().nbytes()
        if out.numel() and start <= out.data_ptr() < start + size:
            return base.as_strided(out.shape, out.stride(), (out.data_ptr() - start) // out.element_size())
    return torch.ops.pretend_cuda.device(out)
