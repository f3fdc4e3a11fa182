#!/usr/bin/env bash
# Runs `mhe` in the image that build_without_engine.sh has made, by runc alone: as user 1000, without capabilities or a
# network, on a read-only root file system. Needs root.
#
#   docker/run_without_engine.sh FOLDER RUNS fit --config configs/quickstart.yaml
#
# FOLDER is what the image was built in; RUNS becomes /app/runs and /app/prepared in the container.
set -euo pipefail

folder=$(realpath "${1:?the folder that the image was built in}")
mkdir -p "${2:?the folder for runs}/runs" "$2/prepared"
runs=$(realpath "$2")
shift 2
chown 1000:1000 "$runs/runs" "$runs/prepared"

buildah=(buildah --root "$folder/storage" --runroot "$folder/state" --storage-driver vfs)
# one container for all runs: nothing is written to it
root=$("${buildah[@]}" mount mhe-run 2>/dev/null) || {
    "${buildah[@]}" from --pull-never --name mhe-run localhost/mhe-lightning >/dev/null
    root=$("${buildah[@]}" mount mhe-run)
}
bundle=$(mktemp -d)
trap 'rm -r "$bundle"' EXIT

runc spec --bundle "$bundle"
"${buildah[@]}" inspect --type image localhost/mhe-lightning >"$bundle/image.json"
python3 - "$bundle" "$root" "$runs" "$@" <<'END'
import json
import sys

bundle, root, runs, *arguments = sys.argv[1:]
with open(f"{bundle}/image.json") as file:
    image = json.load(file)["OCIv1"]["config"]
with open(f"{bundle}/config.json") as file:
    spec = json.load(file)
user, group = map(int, image["User"].split(":"))
spec["root"] = {"path": root, "readonly": True}
spec["process"].update(
    terminal=False,
    user={"uid": user, "gid": group},
    args=[*image["Entrypoint"], *arguments],
    env=[*image["Env"], "OMP_NUM_THREADS=1"],
    cwd=image["WorkingDir"],
    capabilities={},
    noNewPrivileges=True,
)
spec["process"].pop("rlimits", None)
spec["mounts"] += [
    {"destination": f"/app/{name}", "source": f"{runs}/{name}", "type": "bind", "options": ["bind", "rw", "nosuid"]}
    for name in ("runs", "prepared")
]
spec["mounts"] += [
    {"destination": path, "source": "tmpfs", "type": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
    for path in ("/tmp", "/cache")
]
with open(f"{bundle}/config.json", "w") as file:
    json.dump(spec, file)
END
runc run --bundle "$bundle" "mhe-$$"
