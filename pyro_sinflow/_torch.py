"""All uses of private names of torch, and all inspection of modules and tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from itertools import chain
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.distributions.transforms import _InverseTransform
from torch.nn.modules import activation
from torch.nn.modules import module as _module
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import wrap_torch_function

try:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
except ImportError:  # torch 2.4

    def get_proxy_mode() -> Any:  # type: ignore[misc]
        """Returns the mode of ``make_fx``, or None if it is not active."""
        key = torch._C._TorchDispatchModeKey.PROXY
        mode = torch._C._get_dispatch_mode(key)
        return torch._ops._get_dispatch_mode_pre_dispatch(key) if mode is None else mode


_PLAIN = {bool, int, float, str, type(None), torch.Size}
_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_INTERNAL = frozenset(vars(nn.Module()))
_CAPTURING = "cuda"  # the type of the devices that capture graphs
_is_capturing = torch.cuda.is_current_stream_capturing
InverseTransform = _InverseTransform
honours_torch_function = wrap_torch_function(lambda *args: args)  # for subclasses of tensors
_is_batched = torch._C._functorch.is_legacy_batchedtensor
M = TypeVar("M", bound=nn.Module)


def is_concrete(*tensors: Tensor) -> bool:
    """Whether the tensors have values that can be kept after the call.

    Tensors inside ``torch.compile`` or a ``torch.func`` transform have no such values. Fake and
    meta tensors have no values at all.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for t in tensors:
        if isinstance(t, FakeTensor) or t.is_meta:
            return False
    return True


def can_branch_on(*tensors: Tensor, captured: bool = False) -> bool:
    """Whether Python may branch on the values of tensors.

    It may not inside ``torch.compile``, ``torch.func``, ``torch.jit.trace``, ``make_fx`` or
    forward-mode differentiation, during the capture of a CUDA graph, nor if they are fake or meta
    tensors, or a batch of ``is_grads_batched``.

    Args:
        tensors: The tensors, on one device.
        captured: Whether the capture of a CUDA graph makes no difference.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or get_proxy_mode() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if isinstance(t, FakeTensor) or t.is_meta or _is_batched(t):
            return False
    # Last, because torch.compile cannot trace it.
    return captured or tensors[0].device.type != _CAPTURING or not _is_capturing()


def can_fuse(*tensors: Tensor) -> bool:
    """Whether a fused operation may replace operations of torch.

    It may if all tensors are plain tensors or parameters, and no transformation other than
    reverse-mode differentiation is active.
    """
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            return False
    return can_branch_on(*tensors, captured=True)


def vjp(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Returns vector-Jacobian products that can be differentiated again.

    The derivatives are partial: each input is treated as independent of the others, even if it was
    computed from them.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [i.view_as(i) if i.requires_grad else i.detach().requires_grad_() for i in inputs]
        outputs = function(*aliases)
        return torch.autograd.grad(
            outputs, aliases, cotangents, create_graph=create_graph, materialize_grads=True
        )


def depends_on_more(tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the graph of a tensor has leaves that require gradients and are not given."""
    known = {id(leaf) for leaf in leaves}
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in known:
            return True
        for function, _ in node.next_functions:
            stack.append(function)
    return False


def versions(*tensors: Tensor) -> list[int | None]:
    """Returns the versions of tensors. Tensors of inference mode have none: theirs is None.

    The version also changes when ``requires_grad`` is set.
    """
    seen: list[int | None] = []
    for t in tensors:
        seen.append(None if t.is_inference() else 2 * t._version + t.requires_grad)
    return seen


def _contents(value: Any) -> list[Any] | None:
    """Returns what a container, partial, method, closure, module or other object holds."""
    if isinstance(value, nn.Module):
        held = vars(value)
        parts = [held[name].values() for name in _PARTS]
        return [*held.values(), *chain.from_iterable(parts)]
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if c != CellType()]  # not empty
        defaults = (value.__defaults__ or ()), (value.__kwdefaults__ or {}).values()
        return [*cells, *chain.from_iterable(defaults), *vars(value).values()]
    if isinstance(value, type | ModuleType | State) or not hasattr(value, "__dict__"):
        return None
    return [*vars(value).values()]


def _same(now: list[Any] | None, before: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return now is not None and len(now) == len(before) and all(map(is_, now, before))


class State:
    """The tensors and other values that an object holds, to find out whether they have changed.

    It searches the attributes of the object, and the attributes, items and closures of what it
    finds there. It does not see the global variables that a function reads.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = [*root.values()]
        self._objects: list[tuple[Any, list[Any]]] = []
        self._tensors: list[Tensor] = []
        seen, stack = set(), self._root[:]
        while stack:
            value = stack.pop()
            if type(value) in _PLAIN:
                continue
            if isinstance(value, Tensor):
                self._tensors.append(value)
            elif id(value) not in seen and (contents := _contents(value)) is not None:
                seen.add(id(value))
                self._objects.append((value, contents))
                if isinstance(value, nn.Module):  # not every dict that torch gives to a module
                    held = vars(value)
                    stack += [part for name, part in held.items() if name not in _INTERNAL]
                    contents = contents[len(held) :]
                stack += contents

    def is_unchanged(self, root: dict[str, Any]) -> bool:
        """Whether all objects hold what they held, versions of tensors aside."""
        if not _same([*root.values()], self._root):
            return False
        return all(_same(_contents(value), before) for value, before in self._objects)

    def versions(self) -> list[int | None] | None:
        """Returns the versions of the tensors, or None if there are tensors of inference mode."""
        found = versions(*self._tensors)
        return None if None in found else found


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """Returns the number of steps of all optimizers in this process.

    Fused optimizers, and some of Pyro's, change parameters without a new version. Replays of a CUDA
    graph are not seen.
    """
    return _optimizer_steps


def modes(x: Tensor) -> tuple[Any, ...]:
    """Returns the modes that change a computation on x: gradients, autocast, recording."""
    recording = torch.jit.is_tracing() or get_proxy_mode() is not None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return grad, inference, autocasting(x.device.type), recording


def autocasting(device: str) -> bool:
    """Whether autocast is enabled on a device. Some devices, such as "meta", do not support it."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which matrix products keep the precision of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()


def shallow_copy(module: M) -> M:
    """Copies a module, which then shares parameters and submodules, but not their registries."""
    new = copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict | set):
            vars(new)[name] = copy(value)
    return new


def replace_parameter(module: nn.Module, key: str, value: Tensor) -> None:
    """Puts any tensor in the place of the parameter that ``named_parameters`` calls ``key``."""
    path, _, name = key.rpartition(".")
    module.get_submodule(path)._parameters[name] = value  # type: ignore[assignment]


_RANDOM = (_DropoutNd, nn.RReLU)  # in training
# Activations of torch that are not element-wise: an output depends on several inputs.
_MIXING = {nn.GLU, nn.LogSoftmax, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin}
ELEMENT_WISE = {getattr(nn, name) for name in activation.__all__} - _MIXING | {nn.Identity}


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is one of torch's dropouts."""
    return isinstance(module, _DropoutNd)


def plain_modules(root: nn.Module) -> list[Any] | None:
    """Returns the class of a module, and each of its submodules with its class.

    Returns None if one of them has hooks or a replaced ``forward``, which may change its output, or
    if one of them is random.
    """
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return None
    parts: list[Any] = []
    stack: list[nn.Module | None] = [root]
    while stack:
        module = stack.pop()
        if module is None:
            continue
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        if module.training and isinstance(module, _RANDOM):
            return None
        parts += module, type(module)
        stack.extend(module._modules.values())
    return parts[1:]  # without the module itself: a reference to it would keep it alive
