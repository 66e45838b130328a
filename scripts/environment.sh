# Sourced by demo and test: makes the Python environment of this checkout and sets PYTHON to its interpreter.
#
#   MACE_FAST_VENV          where the environment is made (default: .venv in the checkout)
#   MACE_FAST_PYTHON        the Python that makes it (default: the newest of python3.13 to python3.10, or python3)
#   MACE_FAST_SYSTEM_SITE   1: the environment also sees the packages of that Python, such as a torch installed there
#   MACE_FAST_TORCH         the requirement that torch is installed by (default: torch==2.13.*, the version tested here)
#
# A machine without an NVIDIA GPU gets torch's CPU build (200 MB and not 3 GB). A second run finds everything in place.

say() { printf '%s\n' "[environment] $*" >&2; }
fail() { printf '%s\n' "error: $*" >&2; exit 1; }

cpu_wheels="https://download.pytorch.org/whl/cpu"
torch_requirement="${MACE_FAST_TORCH:-torch==2.13.*}"

find_python() {
    local candidate
    for candidate in ${MACE_FAST_PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later found (${MACE_FAST_PYTHON:-python3}); install one (Debian, Ubuntu: apt install python3" \
        "python3-venv) or name it in MACE_FAST_PYTHON"
}

require_compiler() {
    local candidate
    for candidate in ${CXX:-c++ g++ clang++}; do
        if command -v "$candidate" >/dev/null; then return; fi
    done
    fail "no C++ compiler found (${CXX:-c++, g++, clang++}); the CPU kernels are compiled here." \
        "Debian, Ubuntu: apt install g++. Fedora: dnf install gcc-c++"
}

# The major CUDA version that the driver serves, or nothing where there is no usable NVIDIA GPU.
driver_cuda_major() {
    if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
        nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[^:]*Version: *\([0-9]*\).*/\1/p' | head -n 1
    fi
}

reachable() {
    "$PYTHON" - "$1" <<'END' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5)
END
}

# Version of the torch that pip would install, and whether it is a build that brings CUDA along; downloads nothing large.
torch_choice() {
    "$PYTHON" -m pip install --quiet --dry-run --ignore-installed --no-deps --report - "$torch_requirement" 2>/dev/null |
        "$PYTHON" -c '
import json, sys
metadata = json.load(sys.stdin)["install"][0]["metadata"]
needs = " ".join(metadata.get("requires_dist", []))
print(metadata["version"], "cuda" if "nvidia-" in needs or "cuda-" in needs else "cpu")'
}

install_torch_cpu() {
    if reachable "$cpu_wheels/torch/"; then
        say "no NVIDIA GPU: installing the CPU build of $torch_requirement from $cpu_wheels"
        "$PYTHON" -m pip install --quiet --index-url "$cpu_wheels" "$torch_requirement"
        return
    fi
    local version kind
    read -r version kind < <(torch_choice) || fail "pip finds no $torch_requirement; is the network up?"
    if [ "$kind" = cuda ]; then
        say "no NVIDIA GPU, and $cpu_wheels cannot be reached: only the CUDA build $version is to be had (about 3 GB)."
        say "Ctrl-C now to stop, and install a CPU build of torch first to avoid it (MACE_FAST_SYSTEM_SITE=1 uses it)."
    else
        say "no NVIDIA GPU: installing torch $version, a CPU build"
    fi
    "$PYTHON" -m pip install --quiet "$torch_requirement"
}

install_torch_cuda() {
    if [ "$1" -ge 13 ]; then
        say "NVIDIA GPU with a driver for CUDA $1: installing $torch_requirement with CUDA (about 3 GB)"
        "$PYTHON" -m pip install --quiet "$torch_requirement"
    else
        # PyPI's torch is built for CUDA 13, which this driver cannot run; torch's own index keeps builds for CUDA 12.
        say "NVIDIA GPU with a driver for CUDA $1: installing torch built for CUDA 12.6 (about 3 GB)"
        "$PYTHON" -m pip install --quiet --index-url https://download.pytorch.org/whl/cu126 "torch>=2.4,<2.14"
    fi
}

# make_environment EXTRA: the environment with mace_fast, editable, and its extra; sets PYTHON.
make_environment() {
    local extra="$1" venv="${MACE_FAST_VENV:-$checkout/.venv}" base gpu stamp
    require_compiler
    base=$(find_python) || exit 1
    gpu=$(driver_cuda_major)
    PYTHON="$venv/bin/python"
    # The environment is remade when what it was made from changes; one stamp for each extra, as test adds to demo.
    stamp="$("$base" -c 'import sys; print(sys.version)') gpu=$gpu torch=$torch_requirement $(sha256sum <"$checkout/pyproject.toml")"
    if [ -x "$PYTHON" ] && [ "$(cat "$venv/.mace_fast_${extra:-demo}" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    if ! [ -x "$PYTHON" ]; then
        "$base" -c 'import ensurepip' 2>/dev/null ||
            fail "$base cannot make environments (no ensurepip). Debian, Ubuntu: apt install python3-venv"
        say "making $venv with $("$base" --version) ($base)"
        "$base" -m venv ${MACE_FAST_SYSTEM_SITE:+--system-site-packages} "$venv"
    fi
    # Older pips download whole wheels to read their metadata.
    "$PYTHON" -m pip install --quiet --upgrade 'pip>=23.2'
    if "$PYTHON" -c 'import torch' 2>/dev/null; then
        say "using the torch that is there: $("$PYTHON" -c 'import torch; print(torch.__version__)')"
    elif [ -n "$gpu" ]; then
        install_torch_cuda "$gpu"
    else
        install_torch_cpu
    fi
    local extras="$extra"
    if [ -n "$gpu" ]; then
        if [ "$gpu" -ge 13 ]; then extras="$extras${extras:+,}cuda"; else extras="$extras${extras:+,}cuda12"; fi
    fi
    say "installing mace_fast${extras:+ [$extras]} and what it needs"
    PYTHONWARNINGS=ignore "$PYTHON" -m pip install --quiet --editable "$checkout${extras:+[$extras]}"
    printf '%s' "$stamp" >"$venv/.mace_fast_${extra:-demo}"
    say "ready: $venv"
}
