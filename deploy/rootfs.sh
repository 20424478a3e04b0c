#!/usr/bin/env bash
# What deploy/Containerfile adds to its base, as a folder: for clusters that take root file systems, where no image can
# be built. Its base is a root file system of Debian 12 with python3.11. Usage: deploy/rootfs.sh FOLDER
# Import it with the environment HOME=/tmp PYTHONDONTWRITEBYTECODE=1. PYTHON: a Python 3.11 with pip; pip's own
# PIP_EXTRA_INDEX_URL may name PyTorch's index of CPU builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# = 1 ] || { echo "got: $# arguments; wanted: one; do: deploy/rootfs.sh FOLDER" >&2; exit 2; }
root=$1 python=${PYTHON:-python3.11}
if [ -e "$root" ] && [ -n "$(ls -A "$root")" ]; then
    echo "got: $root, which is not empty; wanted: a new folder; do: name another" >&2
    exit 2
fi
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "got: $("$python" --version); wanted: Python 3.11, as in the base; do: PYTHON=/path/to/python3.11 $0 $root" >&2
    exit 2
}

packages=$root/usr/local/lib/python3.11/dist-packages
mkdir -p "$packages" "$root/usr/local/bin" "$root/etc" "$root/tmp"
chmod 1777 "$root/tmp"
"$python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile --ignore-installed \
    -c constraints.txt --target "$packages" '.[audit]'
rm -rf "$packages/bin"
printf '#!/usr/bin/python3\nfrom sfumato.cli.app import main\n\nmain()\n' >"$root/usr/local/bin/sfumato"
cp deploy/run-accuracy-measurement.py "$root/usr/local/bin/"
chmod 755 "$root"/usr/local/bin/*
ln -s usr/local/bin/run-accuracy-measurement.py "$root/"
printf 'root:x:0:0::/root:/usr/sbin/nologin\nsfumato:x:10001:10001::/tmp:/usr/sbin/nologin\n' >"$root/etc/passwd"
printf 'root:x:0:\nsfumato:x:10001:\n' >"$root/etc/group"
du -sh "$root"
