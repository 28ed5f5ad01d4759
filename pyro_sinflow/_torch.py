"""All uses of private names of torch, and all inspection of modules and tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from operator import is_
from types import CellType, FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.distributions.transforms import _InverseTransform
from torch.nn.modules import activation
from torch.nn.modules import module as _module
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import handle_torch_function, has_torch_function

_PLAIN = {bool, int, float, str, type(None), dict, OrderedDict, set, torch.Size}
InverseTransform = _InverseTransform
_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_is_batched = torch._C._functorch.is_legacy_batchedtensor
P = ParamSpec("P")
R = TypeVar("R")


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


def can_branch_on(*tensors: Tensor) -> bool:
    """Whether Python may branch on the values of tensors.

    It may not if the tensors are not concrete (:func:`is_concrete`), if ``torch.jit.trace`` records
    them, or if they carry tangents of forward-mode differentiation or a batch of
    ``is_grads_batched``.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if isinstance(t, FakeTensor) or t.is_meta or _is_batched(t):
            return False
    return True


def can_fuse(*tensors: Tensor) -> bool:
    """Whether a fused operation may replace operations of torch.

    It may if all tensors are plain tensors or parameters, and no transformation other than
    reverse-mode differentiation is active.
    """
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            return False
    return can_branch_on(*tensors)


def differentiation_levels() -> int:
    """Returns the number of active transforms that differentiate (grad, jvp, forward mode)."""
    levels = int(forward_ad._current_level >= 0)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        kinds = torch._C._functorch.TransformType
        stack = torch._C._functorch.get_interpreter_stack() or ()
        levels += sum(i.key() in (kinds.Grad, kinds.Jvp) for i in stack)
    return levels


def honours_torch_function(function: Callable[P, R]) -> Callable[P, R]:
    """Lets tensor subclasses override a function by ``__torch_function__``."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and has_torch_function(args):
            return handle_torch_function(call, args, *args, **kwargs)
        return function(*args, **kwargs)

    return call


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


def _held(value: Any) -> dict[Any, Any] | None:
    """Returns what a sequence, partial, method, closure or other object holds."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, partial):
        return dict(enumerate((value.func, *value.args, *value.keywords.values())))
    if isinstance(value, MethodType):
        return {0: value.__self__}
    if isinstance(value, FunctionType):
        cells = [c for c in value.__closure__ or () if c != CellType()]  # without empty cells
        return dict(enumerate(c.cell_contents for c in cells))
    return None if isinstance(value, type | State) else getattr(value, "__dict__", None)


class State:
    """The tensors and modules that an object holds, to find out whether they have changed.

    It searches the attributes of the object, and the attributes, items and closures of what it
    finds there. It also records the training modes and hooks of modules. It does not see the global
    variables that a function reads.

    Args:
        root: The attributes of the object. No reference to them is kept.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root: list[tuple[str, Any]] = []  # the items of the root
        self._places: list[tuple[dict[Any, Any], Any]] = []
        self._values: list[Any] = []  # the values at these places
        self._containers: list[dict[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._add(None, root)
        self._lengths = [*map(len, self._containers)]
        self._is_known = not any(t.is_inference() for t in self._tensors)  # those have no versions

    def _keep(self, container: dict[Any, Any] | None, key: Any, value: Any) -> None:
        if container is None:
            self._root.append((key, value))
        else:
            self._places.append((container, key))
            self._values.append(value)

    def _add(self, container: dict[Any, Any] | None, values: dict[Any, Any]) -> None:
        if container is not None:
            self._containers.append(container)
        for key, value in values.items():
            if type(value) in _PLAIN:
                continue
            if isinstance(value, Tensor):
                self._keep(container, key, value)
                self._tensors.append(value)
            elif (held := _held(value)) is not None:
                self._keep(container, key, value)
                if id(value) not in self._seen:
                    self._seen.add(id(value))
                    self._add(held, held)
        if "_modules" in values:
            self._keep(container, "training", values["training"])
            for name in _PARTS:
                self._add(values[name], values[name])

    def versions(self, root: dict[str, Any]) -> list[int] | None:
        """Returns the versions of the tensors, or None if anything else has changed."""
        if not self._is_known or [*map(len, self._containers)] != self._lengths:
            return None
        for key, value in self._root:
            if root.get(key) is not value:
                return None
        now = [container.get(key) for container, key in self._places]
        if not all(map(is_, now, self._values)):
            return None
        return [2 * t._version + t.requires_grad for t in self._tensors]


def modes(x: Tensor) -> tuple[Any, ...]:
    """Returns the modes that change a computation on the device of x: gradients, autocast."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocasting(x.device.type)


def autocasting(device: str) -> bool:
    """Whether autocast is enabled on a device. Some devices, such as "meta", do not support it."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which matrix products keep the precision of x."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasting(device) else nullcontext()


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
