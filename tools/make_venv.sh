#!/bin/sh
# Make a virtual environment and install weightstore (editable) with the given extras into it.
#
#   usage: tools/make_venv.sh VENV EXTRAS      e.g.  tools/make_venv.sh .venv dev
#
# Which torch gets in, and why:
#   - the interpreter already has one: it is kept (the environment sees the interpreter's packages);
#   - no NVIDIA GPU here: the CPU build that constraints.txt pins. The index pip is set up with may not
#     carry CPU builds; TORCH_INDEX names an additional one that does;
#   - an NVIDIA GPU: the default build, which brings CUDA.
#
# Environment: PYTHON (default python3), TORCH_INDEX (URL), and all of pip's own PIP_* variables.
set -eu

venv=$1
extras=$2
python=${PYTHON:-python3}

say() { printf '%s\n' "make_venv: $*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    say "$("$python" --version 2>&1) is too old: weightstore needs Python 3.10 or newer. Name one: make PYTHON=python3.11 …"
    exit 1
}

system_packages=
parent=
has_torch='import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
if "$python" -c "$has_torch"; then
    say "keeping the torch that $("$python" -c 'import sys; print(sys.executable)') already has"
    system_packages=--system-site-packages
    # An interpreter that is a virtual environment itself does not hand its packages on that way.
    parent=$("$python" -c 'import sys, sysconfig as s; print(s.get_path("purelib") * (sys.prefix != sys.base_prefix))')
fi

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv $system_packages "$venv"
    else
        # Debian keeps ensurepip in a package of its own; a pip outside can install one inside.
        say "this Python has no ensurepip; installing pip into $venv with the pip at hand"
        "$python" -m venv $system_packages --without-pip "$venv" &&
            "$python" -m pip --python "$venv/bin/python" install --quiet pip || {
            rm -rf "$venv"
            say "could not make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv"
            exit 1
        }
    fi
fi

if [ -n "$parent" ]; then
    printf '%s\n' "$parent" >"$("$venv/bin/python" -c 'import sysconfig as s; print(s.get_path("purelib"))')/parent.pth"
fi

pip() { "$venv/bin/python" -m pip "$@"; }

constraints=
if "$venv/bin/python" -c "$has_torch"; then
    :
elif [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null 2>&1; then
    say "NVIDIA GPU found: installing the default build of torch"
else
    constraints="--constraint constraints.txt"
    say "no NVIDIA GPU found: installing the CPU build of torch"
    if ! pip install --quiet $constraints ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch; then
        say "the package index has no CPU build of torch (constraints.txt names it)."
        say "Installing the default build instead: it works without a GPU but brings gigabytes of CUDA libraries."
        say "To avoid that: make TORCH_INDEX=<URL of PyTorch's CPU index, see PyTorch's installation page>"
        constraints=
    fi
fi

pip install --quiet $constraints ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --editable ".[$extras]"
