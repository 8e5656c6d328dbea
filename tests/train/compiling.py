"""Triton's kernels, compiled for GPUs that need not be there: its interpreter takes more than its compiler does."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

CAPABILITIES = (80, 90)
ROOT = Path(__file__).resolve().parents[2]


def compiled(
    kernel: JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    capability: int,
) -> str:
    """A kernel's first form. Arguments that `types` has nothing of are pointers to places; all pointers are aligned."""
    names = [one.name for one in kernel.params]
    given = {**dict.fromkeys(names, "*i64"), **dict.fromkeys(constants, "constexpr"), **types}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if given[name].startswith("*")}
    source = ASTSource(kernel, {name: given[name] for name in names}, dict(constants), aligned)
    made = compile(source, GPUTarget("cuda", capability, 32), dict(options))
    assert made.asm["cubin"]
    return made.asm["ttir"]


def products(ir: str) -> tuple[list[str], list[str]]:
    """The lines that multiply whole numbers, and those of them that do so in 32 bits."""
    lines = [line for line in ir.splitlines() if "arith.muli" in line]
    return lines, [line for line in lines if "i32" in line.rpartition(":")[2]]


def apart(code: str) -> None:
    """Run code that compiles in a process of its own, where Triton is not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
