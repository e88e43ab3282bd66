# Sourced by the other scripts: makes .venv once, installs what `extras` names, and activates it.
#   source run_scripts/environment.sh [extras]
# A stamp of the files that decide what is installed makes a second call free.
# With MEGASTAB_ENV=active the Python on PATH is taken as it is (conda, modules, a container), and nothing is installed.
if [ "${MEGASTAB_ENV:-}" != active ]; then
    _extras="${1:-}"
    _python="${PYTHON:-python3}"
    "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed, $("$_python" --version) found; set PYTHON" >&2; exit 1; }
    [ -x .venv/bin/python ] || "$_python" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
    _stamp=".venv/installed-${_extras:-base}-$(cat setup.py run_scripts/requirements-torch.txt | cksum | cut -d' ' -f1)"
    if [ ! -e "$_stamp" ]; then
        echo "installing into .venv (once)"
        python -m pip install --quiet --disable-pip-version-check -r run_scripts/requirements-torch.txt setuptools wheel ninja
        # DeepSpeed's build imports torch, so it must see the one just installed.
        python -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed==0.19.8
        python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".${_extras:+[$_extras]}"
        touch "$_stamp"
    fi
fi

# Devices: the launcher's --num_gpus is the number of ranks on a CPU machine too.
MEGASTAB_DEVICES="$(python -c 'import megastab, torch; print(torch.cuda.device_count())')" || {
    echo "error: $(command -v python || echo python) cannot import megastab and torch${MEGASTAB_ENV:+; MEGASTAB_ENV=active takes the active Python as it is: activate the one they are installed in}" >&2
    exit 1
}
if [ "$MEGASTAB_DEVICES" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
fi
export MEGASTAB_DEVICES
