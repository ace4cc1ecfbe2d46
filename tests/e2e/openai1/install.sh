#!/usr/bin/env bash
# Installs the last openai 1.x, which many programs still use, into a virtual environment of its
# own: .tools/openai1 of this tree. Does nothing where it is installed already.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
target="$(cd "$here/../../.." && pwd)/.tools/openai1"

if [ ! -x "$target/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$target"
fi
"$target/bin/python" -m pip install --quiet --disable-pip-version-check \
  --requirement "$here/requirements.txt"
