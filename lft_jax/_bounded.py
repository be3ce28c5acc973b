"""Compiled programs of models, of which only the last few are kept.

`jax.jit` keeps a program for as long as its function, and with it all that its arguments hold besides arrays: of a
model that is a closure, the weights. The function of a module stays for good, so models that are gone would not be
freed.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

#: Structures of arguments whose programs a function keeps.
KEPT = 8
#: Options of XLA on a CPU for quick compilation. LLVM's usual level, 3, takes half as long again, and loops that MLIR
#: emits nearly twice as long, for programs that are hardly faster: their time goes into convolutions and products of
#: matrices that are compiled already. Versions after 0.10 do not know the second one.
_QUICK = {"xla_backend_optimization_level": 1}
if (0, 10) <= jax.__version_info__ < (0, 11):
    _QUICK["xla_cpu_use_fusion_emitters"] = False
_ONCE = {"xla_backend_optimization_level": 0}
_compiling = threading.Lock()


class BoundedJit:
    """`jax.jit` that keeps the programs of the structures of arguments that were used last.

    A structure is all of the arguments but the arrays in them: static ones, functions, types. Programs for other shapes
    of the arrays are kept with it.

    Args:
      function: a pure function of pytrees, given by position.
      static: numbers of the arguments that are static, in ascending order from 0.
      kept: number of structures, at least 1.
      once: whether it runs about once for each time that it is compiled, so that optimizing it on a CPU takes longer
        than it saves.

    Examples:
      >>> import jax.numpy as jnp
      >>> apply = BoundedJit(lambda model, x: model(x), kept=2)
      >>> for factor in range(5):
      ...     y = apply(jax.tree_util.Partial(lambda x, factor=factor: factor * x), jnp.ones(()))
      >>> float(y), len(apply)
      (4.0, 2)
    """

    def __init__(
        self, function: Callable[..., Any], *, static: tuple[int, ...] = (), kept: int = KEPT, once: bool = False
    ):
        self._function, self._static, self._kept, self._once = function, static, kept, once
        self._programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._threads: dict[Any, threading.Thread] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        key, program, leaves = self._known(args)
        thread = self._threads.pop(key, None)
        if thread is not None:
            thread.join()
        return program(leaves)

    def prepare(self, *args: Any) -> None:
        """Traces the program, and compiles it in another thread; a call waits for it.

        Args:
          *args: of a call to come; arrays may be `jax.ShapeDtypeStruct`.
        """
        key, program, leaves = self._known(args)
        # JAX keeps what it compiles of a trace. Tracing depends on settings of this thread.
        thread = threading.Thread(target=_compile, args=(program.lower(leaves),))
        thread.start()
        with self._lock:
            if key in self._programs:  # another thread may have had so many others since
                self._threads[key] = thread

    def _known(self, args):
        """The program of these arguments, its key, and the arrays in them."""
        given = tuple(args[n] for n in self._static)
        leaves, structure = jax.tree.flatten([arg for n, arg in enumerate(args) if n not in self._static])
        # JAX takes options of XLA at the top only.
        nested = any(isinstance(x, jax.core.Tracer) for x in (*leaves, jnp.zeros(())))
        key = given, structure, nested
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = self._program(given, structure, nested)
                if len(self._programs) > self._kept:
                    last, _ = self._programs.popitem(last=False)
                    self._threads.pop(last, None)
            else:
                self._programs.move_to_end(key)
        return key, program, leaves

    def __len__(self) -> int:
        """The number of structures whose programs it keeps."""
        return len(self._programs)

    def compiled(self) -> int:
        """The number of programs that it keeps."""
        return sum(getattr(program, "_cache_size")() for program in self._programs.values())  # noqa: B009  no public name

    def _program(self, given, structure, nested):
        function, static = self._function, self._static
        options = None if nested else _options(self._once)

        def of_leaves(leaves):
            args = jax.tree.unflatten(structure, leaves)
            for number, value in zip(static, given, strict=True):
                args.insert(number, value)
            return function(*args)

        of_leaves.__name__ = getattr(function, "__name__", "program")  # in profiles
        return jax.jit(of_leaves, compiler_options=options)


def _compile(lowered):
    # One at a time, since the thread that asks for it compiles too; a call raises what fails here.
    with _compiling, contextlib.suppress(Exception):
        if threading.main_thread().is_alive():  # else the process waits for this, to end
            lowered.compile()


def _options(once=False):
    """Those of `_QUICK` that the user's XLA_FLAGS do not have."""
    if jax.default_backend() != "cpu":
        return None
    flags = os.environ.get("XLA_FLAGS", "")
    options = {**_QUICK, **_ONCE} if once else _QUICK
    return {name: value for name, value in options.items() if name not in flags} or None
