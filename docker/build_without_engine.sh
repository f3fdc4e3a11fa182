#!/usr/bin/env bash
# Builds the image of docker/Dockerfile without a container engine and without an image registry: Debian's own packages
# make the base image, and buildah builds in a chroot. For people with docker or podman, `docker build` does it all.
#
#   apt-get install buildah debootstrap runc
#   docker/build_without_engine.sh FOLDER
#   docker/run_without_engine.sh FOLDER RUNS fit --config configs/quickstart.yaml
#
# FOLDER takes 8 GB and keeps the image's storage. Needs root, for chroot. From the environment, all optional:
#   MIRROR, RELEASE      where Debian is taken from, and which (bookworm)
#   TORCH_INDEX, EXTRAS  as in the Dockerfile
#   PIP_CONF, CA_FILE    files that pip needs here; they stay out of the image
set -euo pipefail

folder=${1:?the folder to build in}
mkdir -p "$folder"
folder=$(realpath "$folder")
cd "$(dirname "$0")/.."

# vfs copies instead of mounting, so that it works on any file system and in any container
buildah=(buildah --root "$folder/storage" --runroot "$folder/state" --storage-driver vfs)

if ! "${buildah[@]}" inspect --type image localhost/base >/dev/null 2>&1; then
    echo "== base image"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
        "${RELEASE:-bookworm}" "$folder/base" "${MIRROR:-http://deb.debian.org/debian}" >"$folder/debootstrap.log" \
        || { tail "$folder/debootstrap.log"; exit 1; }
    rm -rf "$folder"/base/var/cache/apt/* "$folder"/base/var/lib/apt/lists/*
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add --quiet "$container" "$folder/base" / >/dev/null
    "${buildah[@]}" config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    "${buildah[@]}" commit --quiet --rm "$container" localhost/base
    rm -r "$folder/base"
fi

echo "== image"
"${buildah[@]}" rm --all >/dev/null  # such as the container of run_without_engine.sh, with the image before this one
"${buildah[@]}" build --isolation chroot --network host --file docker/Dockerfile --tag localhost/mhe-lightning \
    --build-arg BASE=localhost/base \
    ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} \
    ${EXTRAS:+--build-arg "EXTRAS=$EXTRAS"} \
    ${PIP_CONF:+--secret "id=pip,src=$PIP_CONF"} \
    ${CA_FILE:+--secret "id=ca,src=$CA_FILE"} \
    .
"${buildah[@]}" images
