#!/usr/bin/env bash
# Builds the documentation site into site/. A dead link, a missing anchor or a page outside the navigation is an error.
#
#   launch/docs.sh [--serve]
#
# --serve  show the site on a port of this machine's loopback instead, and build it anew when a page changes
#
# The programs for it are the extra `docs`, in the versions of launch/constraints.txt. They are installed into
# .venv-docs, in about 20 seconds: building the site needs neither MPI nor PETSc.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv-docs

fail() {
    printf 'docs.sh: %s\n' "$*" >&2
    exit 2
}

serve=no
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --serve) serve=yes ;;
        *) fail "unknown argument '$1' (known: --serve, --help)" ;;
    esac
    shift
done

wanted=$(cat pyproject.toml launch/constraints.txt | sha256sum)
if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
    printf 'docs.sh: making .venv-docs (20 seconds)\n'
    python3 -m venv --clear "$venv"
    mapfile -t packages < <("$venv/bin/python" - <<'EOF'
import pathlib, tomllib
print(*tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"], sep="\n")
EOF
    )
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install -qq \
        --constraint launch/constraints.txt "${packages[@]}"
    printf '%s\n' "$wanted" >"$venv/.installed"
fi

# Otherwise the theme prints a notice on every build.
export NO_MKDOCS_2_WARNING=1
if [ "$serve" = yes ]; then
    exec "$venv/bin/mkdocs" serve --config-file docs/mkdocs/mkdocs.yml
fi
# With --quiet no warning would be counted, and none would be an error.
"$venv/bin/mkdocs" build --strict --config-file docs/mkdocs/mkdocs.yml
elsewhere='<(script|img|iframe|source)[^>]* src="?(https?:)?//|<link[^>]* href="?(https?:)?//'
if fetched=$(grep -rEl --include='*.html' "$elsewhere" site); then
    printf 'docs.sh: these pages fetch something from elsewhere: %s\n' "$fetched" >&2
    exit 1
fi
printf 'docs.sh: the site is in site/ (%d pages)\n' "$(find site -name '*.html' | wc -l)"
