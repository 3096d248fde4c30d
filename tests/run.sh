#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
#
#   sh tests/run.sh [pytest arguments]
#
# All tests as CI runs them, on a fresh machine too. As root on Debian it installs what they need;
# elsewhere it lists what it skips. Each CPython from 3.9 to 3.13 that is found has its turn: the
# newest with all tests and coverage, the oldest with all but the tests against other servers, those
# between with the tests that start no process. With arguments: the newest, only those tests.
set -eu
cd "$(dirname "$0")/.."
ROOT=$(pwd)
ENVS=${CMON_TEST_ENVS:-$ROOT/.test-envs}    # virtual environments, one for each Python
COVERAGE_LEAST=95
PACKAGES="ca-certificates chromium collectd-core curl dnsmasq-base gcc graphite-carbon influxdb
iproute2 libc6-dev libnss3-tools libxml2-utils man-db mount nginx-light openssh-client openssl
procps prometheus python3-venv tmux rsyslog rsyslog-gnutls victoria-metrics zsh"

say() { printf '\n=== %s\n' "$*"; }

# --- packages --------------------------------------------------------------------------------------

missing=
for package in $PACKAGES; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
        missing="$missing $package"
done
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing$missing"
    # The tests start their own servers at free ports: Debian must not start its.
    policy=
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq -y install --no-install-recommends $missing; } \
        >/tmp/cmon-apt.log 2>&1 || { tail -5 /tmp/cmon-apt.log; echo "SKIPPED: $missing"; }
    [ -z "$policy" ] || rm -f "$policy"
elif [ -n "$missing" ]; then
    say "SKIPPED: not root on Debian, so tests that need one of these are skipped:$missing"
fi

# --- interpreters ----------------------------------------------------------------------------------

find_python() {     # find_python 3.9: its path, if there is one
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python \
            /opt/python/"$1"*/bin/python3 /opt/local/bin/"python$1" python3; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        "$path" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1'
            or sys.implementation.name != 'cpython')" 2>/dev/null && echo "$path" && return
    done
}

environment() {     # environment 3.9 PATH: a Python that has pytest and coverage
    if [ ! -x "$ENVS/$1/bin/pytest" ]; then
        rm -rf "${ENVS:?}/$1"
        if "$2" -m venv "$ENVS/$1" >&2 &&
                "$ENVS/$1/bin/python" -m pip -q --disable-pip-version-check install pytest \
                    'coverage>=7.10' >&2; then
            # Measures every process that a test starts with this Python, `python -I` too. Where
            # nothing is measured, a process does not pay for the import.
            packages=$("$ENVS/$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')
            echo 'import os; os.getenv("COVERAGE_PROCESS_START") and' \
                '__import__("coverage").process_startup()' >"$packages/cmon_coverage.pth"
        elif "$2" -c 'import pytest' 2>/dev/null; then
            echo "$2"
            return
        else
            return
        fi
    fi
    echo "$ENVS/$1/bin/python"
}

versions= oldest= newest=
for version in 3.9 3.10 3.11 3.12 3.13; do
    path=$(find_python $version)
    [ -n "$path" ] || { echo "SKIPPED: CPython $version is not here"; continue; }
    python=$(environment $version "$path")
    [ -n "$python" ] || { echo "SKIPPED: CPython $version: no pytest"; continue; }
    versions="$versions $version=$python"
    oldest=${oldest:-$python} newest=$python
done
[ -n "$newest" ] || { echo "no Python from 3.9 to 3.13 with pytest" >&2; exit 1; }

pytest="-q -p no:cacheprovider -o faulthandler_timeout=240"
if [ $# -gt 0 ]; then
    exec "$newest" -m pytest $pytest "$@"
fi

# --- lint ------------------------------------------------------------------------------------------

failed=
for tool in ruff mypy; do
    command=$(command -v $tool) || command=
    if [ -z "$command" ] || [ "${CI:-}" = true ]; then
        [ -x "$ENVS/lint/bin/$tool" ] || { python3 -m venv "$ENVS/lint" &&
            "$ENVS/lint/bin/python" -m pip -q --disable-pip-version-check install ruff mypy; } || :
        [ ! -x "$ENVS/lint/bin/$tool" ] || command=$ENVS/lint/bin/$tool
    fi
    if [ -z "$command" ]; then
        echo "SKIPPED: $tool is not installed"
        [ "${CI:-}" != true ] || failed="$failed $tool"
        continue
    fi
    case $tool in
    ruff) arguments="check ." ;;
    mypy) arguments="--strict cmon_agent.py cmon_proxy.py cmon_forwarder.py cmon.py" ;;
    esac
    say "$tool $arguments"
    "$command" $arguments || failed="$failed $tool"
done

# --- tests -----------------------------------------------------------------------------------------

work=$(mktemp -d)
mkdir "$work/coverage"
trap 'rm -rf "$work"' EXIT
run_others() {      # one after the other, beside the newest: much of the time tests wait
    for one in $versions; do
        version=${one%%=*} python=${one#*=} what=--units
        [ "$python" != "$newest" ] || continue
        # What other servers make of our output does not depend on the Python.
        [ "$python" != "$oldest" ] || what="--ignore=tests/services --ignore=tests/test_soak.py
            --ignore=tests/test_forwarder_sinks.py"
        say "CPython $version: $(echo $what)"
        "$python" -m pytest $pytest $what || echo "tests-$version" >>"$work/failed"
    done
}
run_others >"$work/others" 2>&1 &
say "CPython $("$newest" -V | cut -d' ' -f2): all tests, with coverage"
status=0
{   # a process that a test starts finds these in its environment
    COVERAGE_PROCESS_START=$ROOT/tests/coverage.ini COVERAGE_FILE=$work/coverage/data \
        "$newest" -m pytest $pytest || echo $? >"$work/status"
} 2>&1 | tee "$work/log"
[ ! -s "$work/status" ] || { status=$(cat "$work/status"); failed="$failed tests"; }
wait
cat "$work/others"
[ ! -s "$work/failed" ] || failed="$failed $(tr '\n' ' ' <"$work/failed")"

say "coverage of the programs, at least $COVERAGE_LEAST % of lines"
export COVERAGE_FILE=$work/coverage/data
if "$newest" -c 'import coverage' 2>/dev/null; then
    "$newest" -m coverage combine -q --rcfile=tests/coverage.ini "$work/coverage" &&
        "$newest" -m coverage report --rcfile=tests/coverage.ini --fail-under=$COVERAGE_LEAST ||
        failed="$failed coverage"
    if [ -n "${CMON_COVERAGE_HTML:-}" ]; then
        "$newest" -m coverage html -q --rcfile=tests/coverage.ini -d "$CMON_COVERAGE_HTML"
    fi
else
    echo "SKIPPED: coverage is not installed"
    [ "${CI:-}" != true ] || failed="$failed coverage"
fi

say "${failed:+FAILED:}${failed:-all is well}"
tail -1 "$work/log"
[ -z "$failed" ] || exit $((status > 0 ? status : 1))
