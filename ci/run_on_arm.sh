#!/usr/bin/env bash
# ./doit on an emulated ARM processor: runs packages for aarch64 where there is none, engine and all. On Debian 12:
#
#     apt-get install qemu-user
#     ci/run_on_arm.sh verify-package artifacts/packages/tiny-q4f16_1-aarch64-v8.2
#     CPU=neoverse-n1 FEATURES="fp asimd asimddp" ci/run_on_arm.sh verify-package ...
#
# The first use downloads an aarch64 Python and what this project needs, 500 MB, to artifacts/arm. qemu shows a program
# the host's /proc/cpuinfo, so that FEATURES say here what CPU (qemu-aarch64 -cpu help) has.
set -euo pipefail
cd "$(dirname "$0")/.."
cpu=${CPU:-max} features=${FEATURES:-fp asimd asimddp i8mm}
home=$PWD/artifacts/arm root=$PWD/artifacts/arm/root python=3.11 # Debian 12's

if [ ! -e "$home/complete" ]; then
    mkdir -p "$home"/{lists/partial,cache/archives/partial,debs,root/proc}
    touch "$home/status"
    cat > "$home/apt.conf" << END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$home";
Dir::State::status "$home/status";
Dir::Cache "$home/cache";
END
    export APT_CONFIG=$home/apt.conf
    apt-get update -qq
    (cd "$home/debs" && apt-get download -qq python$python-minimal libpython$python-minimal libpython$python-stdlib \
        libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libssl3 libffi8 liblzma5 libbz2-1.0 libsqlite3-0 libuuid1 libcrypt1)
    for package in "$home"/debs/*.deb; do dpkg -x "$package" "$root"; done
    .venv/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("mlcbuild") if "extra" not in r), sep="\n")' \
        > "$home/requirements.txt"
    .venv/bin/python -m pip install --quiet --upgrade --target "$home/site" --only-binary=:all: --python-version $python \
        $(for minor in $(seq 17 36); do echo "--platform manylinux_2_${minor}_aarch64"; done) --platform manylinux2014_aarch64 \
        --constraint ci/constraints.txt --requirement "$home/requirements.txt"
    touch "$home/complete"
fi
printf 'processor\t: 0\nFeatures\t: %s\n' "$features" > "$root/proc/cpuinfo"
PYTHONPATH=$home/site:$PWD exec qemu-aarch64 -cpu "$cpu" -L "$root" "$root/usr/bin/python$python" -m doit "$@"
