"""``kernel[grid](...)`` for a kernel that is compiled already, in few steps of Python.

Triton's own launch asks how each argument is specialised, writes the options as text and calls hooks that nobody set:
for small kernels that takes the host longer than the kernel takes the device. :func:`jit` decorates a kernel in the
place of ``triton.jit``. Of launches with one key, from which everything follows that Triton compiles a kernel by, the
first is Triton's own and gives the compiled kernel; later ones hand their arguments to its launcher. Whatever is not
known here to be the same launch is left to Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_fast.triton_kernels.target import interpreting

# Of Triton: what their launches specialise on, and what the launchers of their compiled kernels take, was read.
KNOWN_RELEASES = ("3.6", "3.7", "3.8", "3.9")
MOST_KEPT = 1024  # launches of a kernel: of sizes and strides, tokens among them

_OWN_KEY = (int, float, bool, str, NoneType)  # types of constexprs and options that a key takes as they are
_run = JITFunction.run


class Tiles(TensorDescriptor):
    """A tensor descriptor without Triton's checks, which take the host as long as a launch does.

    Who makes one has seen to it that rows are contiguous, and begin at multiples of 16 bytes.
    """

    def __post_init__(self) -> None:
        pass

    @staticmethod
    def of(tensor: Tensor, block_shape: list[int]) -> Tiles:
        return Tiles(tensor, tensor.shape, tensor.stride(), block_shape)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A compiled kernel, and what is the same in all launches with its key."""

    kernel: CompiledKernel
    driver: Any
    launcher: Callable[..., None]
    constexprs: tuple[Any, ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]  # that the kernel's text reads, and their values


@dataclass(frozen=True, slots=True)
class _Form:
    """The launches whose arguments have the same types, and keywords the same names, in one order."""

    key: Callable[..., tuple[Any, ...]]  # of the device, the arguments and the keywords' values
    kept: dict[tuple[Any, ...], _Kept]


class Kernel(JITFunction):
    """A kernel that keeps what its launches compiled."""

    def __init__(self, function: Callable[..., Any], **settings: Any) -> None:
        super().__init__(function, **settings)
        self._forms: dict[tuple[Any, ...], _Form | None] = {}

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            form = self.form(args, kwargs) if type(grid) is tuple and self._is_plain() else None
            if form is None:
                return self.run(*args, grid=grid, warmup=False, **kwargs)
            driver = triton.runtime.driver.active
            device = driver.get_current_device()
            key = form.key(device, args, kwargs.values())
            kept = form.kept.get(key)
            if kept is None or kept.driver is not driver or (kept.globals and _have_changed(kept.globals)):
                kernel = self.run(*args, grid=grid, warmup=False, **kwargs)
                self._keep(form, key, kernel, driver, len(args), kwargs)
                return kernel
            kernel = kept.kernel
            x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            kept.launcher(
                x, y, z, driver.get_current_stream(device), kernel.function, kernel.packed_metadata,
                None, None, None,  # what hooks are told, and the hooks before and after
                *args, *kept.constexprs,
            )  # fmt: skip
            return kernel

        return launch

    def _is_plain(self) -> bool:
        """Whether nothing is set that changes what a launch does, or that wants to see it."""
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return (
            getattr(self.run, "__func__", None) is _run
            and not self.pre_run_hooks
            and not runtime.debug
            and not knobs.compilation.instrumentation_mode
            and runtime.jit_cache_hook is None
            and runtime.add_stages_inspection_hook is None
            and not getattr(enter, "calls", enter)
            and not getattr(leave, "calls", leave)
        )

    def form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Form | None:
        """None where it is not known what Triton makes of such arguments."""
        types = (*map(type, args), *kwargs, *map(type, kwargs.values()))
        try:
            return self._forms[types]
        except KeyError:
            form = self._forms[types] = self._read(tuple(map(type, args)), kwargs)
            return form

    def _read(self, types: tuple[type, ...], kwargs: dict[str, Any]) -> _Form | None:
        """For arguments that are no constexprs, in front of all constexprs by name."""
        given, constexprs = self.params[: len(types)], self.params[len(types) :]
        if (
            len(types) > len(self.params)
            or any(parameter.is_constexpr for parameter in given)
            or any(not parameter.is_constexpr or parameter.name not in kwargs for parameter in constexprs)
            or any(type(value) not in _OWN_KEY for value in kwargs.values())
        ):
            return None
        known = [self._part(parameter, type_) for parameter, type_ in zip(given, types, strict=True)]
        parts = [part for part in known if part is not None]
        if len(parts) < len(known):
            return None
        # written out as Triton writes its binder: a loop over the arguments takes twice as long
        return _Form(eval(f"lambda device, args, named: (device, {''.join(parts)} *named)"), {})

    def _part(self, parameter: Any, type_: type) -> str | None:
        """What an argument adds to a key beside its type, in Python; None for a type that is not known.

        An integer adds its value, whatever Triton asks of it, but nothing where it is of a type by itself and not to be
        specialised. A float and a flag are passed by value, and None is compiled in.
        """
        argument = f"args[{parameter.num}]"
        if type_ in (Tensor, Parameter):
            return f"{argument}.dtype, {argument}.data_ptr() % 16, "
        if type_ is Tiles:
            return f"{argument}.base.dtype, *{argument}.block_shape, "
        if type_ is int:
            return "" if parameter.do_not_specialize and parameter.annotation_type else f"{argument}, "
        return "" if type_ in (float, bool, NoneType) else None

    def _keep(
        self, form: _Form, key: tuple[Any, ...], kernel: Any, driver: Any, given: int, kwargs: dict[str, Any]
    ) -> None:
        if type(kernel) is not CompiledKernel or kernel.metadata.target.backend != "cuda":
            return
        if len(form.kept) >= MOST_KEPT:
            form.kept.clear()
        constexprs = tuple(kwargs[name] for name in self.arg_names[given:])
        globals_ = tuple((found, name, found.get(name)) for (name, _), (_, found) in self.used_global_vals.items())
        form.kept[key] = _Kept(kernel, driver, kernel.run, constexprs, globals_)


def _have_changed(globals_: tuple[tuple[dict[str, Any], str, Any], ...]) -> bool:
    """Triton compares them, and refuses a launch after a change."""
    return any(found.get(name) is not value for found, name, value in globals_)


def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """``triton.jit`` for a kernel; functions that kernels call take ``triton.jit`` itself."""
    if function is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    is_known = triton.__version__.startswith(tuple(f"{release}." for release in KNOWN_RELEASES))
    decorator = Kernel if is_known and not interpreting() else triton.jit
    return decorator(function, do_not_specialize=do_not_specialize)
