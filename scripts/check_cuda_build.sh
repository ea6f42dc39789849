#!/usr/bin/env bash
# What the compiler made of the CUDA kernels, read from a built extension; needs no GPU.
#
#   scripts/check_cuda_build.sh [EXTENSION]        default: the one in vimnas_ds/
#
# Fails, naming the kernel, unless
#   - machine code for sm_80 and sm_90 is in it, with the same kernels;
#   - no kernel has a stack frame, local memory, or LDL/STL instructions;
#   - every vector instantiation loads, and if it writes matrices stores, 16 bytes at once.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
[[ -x "$PYTHON" ]] || PYTHON=python3

extension="${1:-}"
if [[ -z "$extension" ]]; then
  extension="$(compgen -G "$ROOT/vimnas_ds/_C*.so" | head -n 1 || true)"
fi
if [[ -z "$extension" || ! -f "$extension" ]]; then
  echo "check_cuda_build: no built extension ${extension:-in vimnas_ds/}" >&2
  exit 2
fi

cuobjdump="$(command -v cuobjdump || true)"
if [[ -z "$cuobjdump" ]]; then
  tools="$("$PYTHON" -c 'import importlib.util as u
spec = u.find_spec("triton")
print(spec.submodule_search_locations[0] if spec else "")')/backends/nvidia/bin"
  cuobjdump="$tools/cuobjdump"
  PATH="$tools:$PATH" # cuobjdump calls nvdisasm
fi
if [[ ! -x "$cuobjdump" ]]; then
  echo "check_cuda_build: cuobjdump is neither in PATH nor in triton's wheel" >&2
  exit 2
fi

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# arch <tab> kernel <tab> instruction counts and resources, one line per kernel
for arch in sm_80 sm_90; do
  "$cuobjdump" -res-usage -arch "$arch" "$extension" >"$scratch/$arch.usage" 2>&1 || true
  "$cuobjdump" -sass -arch "$arch" "$extension" >"$scratch/$arch.sass" 2>/dev/null || true
  awk -v arch="$arch" '
    FILENAME ~ /usage$/ && /Function .*:$/ { name = $2; sub(/:$/, "", name) }
    FILENAME ~ /usage$/ && /REG:/ {
      for (f = 1; f <= NF; ++f) { split($f, pair, ":"); use[name, pair[1]] = pair[2] }
    }
    FILENAME ~ /sass$/ && /Function : / { name = $3; names[name] }
    FILENAME ~ /sass$/ && /LDG\.E[A-Z0-9.]*\.128/ { ++wide_load[name] }
    FILENAME ~ /sass$/ && /STG\.E[A-Z0-9.]*\.128/ { ++wide_store[name] }
    FILENAME ~ /sass$/ && /[ \t](LDL|STL)[. ]/ { ++local_access[name] }
    END {
      for (name in names)
        print arch "\t" name "\t" use[name, "REG"] + 0 "\t" use[name, "STACK"] + 0 "\t" \
              use[name, "LOCAL"] + 0 "\t" local_access[name] + 0 "\t" wide_load[name] + 0 "\t" \
              wide_store[name] + 0 "\t" ((name, "REG") in use)
    }' "$scratch/$arch.usage" "$scratch/$arch.sass" >>"$scratch/kernels"
done

"$PYTHON" - "$scratch/kernels" <<'CHECK'
import re
import shutil
import subprocess
import sys
from pathlib import Path

#: kernels that move whole matrices -> whether they store vectors too
VECTOR_KERNELS = {
    "adamw_kernel": {None},
    "gelu_kernel": {None},
    "gate_kernel": {"GatedGelu", "HeadGate"},
    "column_kernel": {"GeluBackward", "BiasGradient", "GatedGeluBackward", "HeadGateBackward"},
    "norm_kernel": {None},
    "norm_backward_kernel": {None},
}
STORES_NOTHING_WIDE = {"BiasGradient"}


def demangle(names):
    if not names or not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True)
    return done.stdout.splitlines() if done.returncode == 0 else names


def describe(symbol):
    """(kernel, operation, elements per access) from the mangled name."""
    kernel = re.search(r"\d([a-z_]+_kernel)", symbol)
    operation = re.search(r"\d(GatedGeluBackward|GeluBackward|HeadGateBackward|BiasGradient"
                          r"|GatedGelu|HeadGate)", symbol)
    width = re.search(r"Li(\d+)E", symbol)
    return (
        kernel.group(1) if kernel else symbol,
        operation.group(1) if operation else None,
        int(width.group(1)) if width else 1,
    )


rows = [line.split("\t") for line in Path(sys.argv[1]).read_text().splitlines()]
problems, seen = [], {"sm_80": set(), "sm_90": set()}
types = {"sm_80": set(), "sm_90": set()}
readable = dict(zip((r[1] for r in rows), demangle([r[1] for r in rows])))
table = []
for arch, symbol, *numbers in sorted(rows):
    registers, stack, local, accesses, loads, stores, measured = map(int, numbers)
    kernel, operation, width = describe(symbol)
    name = re.sub(r"^void |vimnas::cuda::|\(.*\)$", "", readable[symbol])
    seen[arch].add(symbol)
    found = []
    if not measured:
        found.append("no resource usage reported")
    if stack or local or accesses:
        found.append(f"local memory (stack {stack}, local {local}, LDL/STL {accesses})")
    if width > 1 and kernel in VECTOR_KERNELS:
        types[arch].add((kernel, operation, width))
        if not loads:
            found.append("no 128-bit load")
        if not stores and operation not in STORES_NOTHING_WIDE:
            found.append("no 128-bit store")
    problems += [f"{arch} {name}: {what}" for what in found]
    table.append((name, arch, registers, stack + local, accesses, loads, stores))

print(f"{'kernel':<58} {'arch':<6} {'regs':>4} {'local':>5} {'LDL/STL':>7} "
      f"{'LDG.128':>7} {'STG.128':>7}")
for name, arch, *numbers in table:
    cells = (f"{n:>{w}}" for n, w in zip(numbers, (4, 5, 7, 7, 7)))
    print(f"{name:<58} {arch:<6} {' '.join(cells)}")

for arch, symbols in seen.items():
    if not symbols:
        problems.append(f"{arch}: no machine code in the extension")
    for kernel, operations in VECTOR_KERNELS.items():
        widths = (4,) if kernel == "adamw_kernel" else (4, 8)
        for wanted in [(kernel, o, w) for o in operations for w in widths]:
            if symbols and wanted not in types[arch]:
                label = "/".join(str(part) for part in wanted if part is not None)
                problems.append(f"{arch} {label}: the vector instantiation is missing")
if seen["sm_80"] and seen["sm_90"]:
    for symbol in seen["sm_80"] ^ seen["sm_90"]:
        problems.append(f"{readable[symbol]}: in one of sm_80, sm_90 only")

for problem in problems:
    print(f"check_cuda_build: {problem}", file=sys.stderr)
if problems:
    sys.exit(1)
print(f"{len(rows)} kernels in order: sm_80 and sm_90, 128-bit accesses, no local memory")
CHECK
