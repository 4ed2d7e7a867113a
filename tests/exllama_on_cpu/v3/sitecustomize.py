"""Lets ExLlamaV3 be imported without a card: Python runs this at its start when PYTHONPATH names this folder.

The library takes a compiled module by the end of its file's name, so ext_on_cpu.py is
handed out under the name exllamav3_ext with an origin that ends in .so. Other kernels are
written in Triton, which needs a card: after a module with such kernels is imported, the
functions that launch them are replaced. Nothing is imported before the library asks for it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
EXTENSION = "exllamav3_ext"
ATTENTION = ("paged_attn_triton_decode", "paged_attn_triton_prefill", "varlen_attn_triton")
# Modules of the library: which of our modules has the functions, and which those are.
REPLACED = {
    "exllamav3.modules.attention_fn.triton_paged": ("attention_on_cpu", ATTENTION),
    "exllamav3.modules.gated_delta_net_fn.conv1d": ("hybrid_on_cpu", ("causal_conv1d_update_slotted_triton",)),
}
# This one cannot be imported without a card at all.
INSTEAD = {EXTENSION: "ext_on_cpu.py", "exllamav3.vendor.fla": "hybrid_on_cpu.py"}


class Instead(importlib.machinery.SourceFileLoader):
    """A source file of ours under a name of the library's."""

    def get_filename(self, name: str | None = None) -> str:
        return str(self.path)


class WithoutTriton(importlib.machinery.SourceFileLoader):
    """The library's own module, with the launching functions replaced."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        ours, names = REPLACED[module.__name__]
        for name in names:
            setattr(module, f"real_{name}", getattr(module, name))  # fails where the library has no such function
            setattr(module, name, getattr(importlib.import_module(ours), name))


class Finder:
    """Answers for a few names; all others are found as always."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name in INSTEAD:
            loader = Instead(name, str(HERE / INSTEAD[name]))
            return importlib.machinery.ModuleSpec(name, loader, origin=str(HERE / f"{name}.so"))
        if name not in REPLACED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin:
            spec.loader = WithoutTriton(name, spec.origin)
        return spec


# Launches that join several matrices or a whole layer into one; without them the library takes its plain way.
PLAIN = {"EXL3_BC_ATTN": "0", "EXL3_QKV_SLICE": "0", "EXL3_MGEMM_K_THRESHOLD": "99", "EXL3_MGEMM_N_THRESHOLD": "0"}
os.environ.update(PLAIN)
sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
