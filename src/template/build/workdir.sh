# A WORKDIR step, run as root: the folder with the parents that it lacks, owned by whoever runs the steps.
# Given: TARGET, OWNER.
set -e
if [ -d "$TARGET" ]; then exit 0; fi
first_new=$TARGET
while [ ! -e "$(dirname "$first_new")" ]; do first_new=$(dirname "$first_new"); done
mkdir -p "$TARGET"
chown -R "$OWNER" "$first_new"
