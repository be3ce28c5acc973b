"""Flags of XLA for tests, which spend nearly all their time on compilation: these more than halve it."""

import importlib.metadata

#: Versions after 0.10 abort at the last one, which they do not know.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
)
