"""Compiles the native kernels: one library for each instruction set, from the same sources. A build hook of hatchling.

Without a C compiler, or for another processor than x86-64, the package is built without them and serves through torch;
DELTASERVE_BUILD_NATIVE=1 makes that an error, 0 leaves them out.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "kernels" / "deltaserve_kernels" / "native"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
INSTRUCTION_SETS = {
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
}
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


def compile_all() -> list[Path]:
    """The libraries that could be built. Raises RuntimeError where the compiler fails on a set that it knows."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    built = []
    for name, flags in INSTRUCTION_SETS.items():
        probe = [*compiler, *flags, "-x", "c", "-fsyntax-only", "/dev/null"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            continue  # an old compiler
        library = FOLDER / f"lib{name}.so"
        sources = sorted(str(path) for path in (FOLDER / "src").glob("*.c"))
        partial = library.with_suffix(f".{os.getpid()}")
        command = [*compiler, *FLAGS, *flags, *sources, "-lpthread", "-lm", "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
        partial.replace(library)
        built.append(library)
    return built


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        wish = os.environ.get("DELTASERVE_BUILD_NATIVE", "")
        if wish == "0":
            return
        fits = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
        try:
            built = compile_all() if fits else []
        except (OSError, RuntimeError) as error:
            if wish == "1":
                raise
            self.app.display_warning(f"native kernels are left out: {error}")
            return
        if not built and wish == "1":
            raise RuntimeError("native kernels: no instruction set of this machine's compiler fits")
        if built:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{platform.machine()}"
            build_data["artifacts"] += [str(path.relative_to(ROOT)) for path in built]


if __name__ == "__main__":
    for path in compile_all():
        print(path)  # noqa: T201 (a command)
