#!/bin/sh
# SPDX-License-Identifier: MPL-2.0
#
#   sh tests/run.sh [pytest arguments]
#
# All tests as CI runs them, on a fresh machine too. As root on Debian it installs what they need;
# elsewhere it lists what it skips. Each CPython from 3.9 to 3.13 that is found has its turn: the
# newest with all tests and coverage, the oldest with those that start programs once each but not
# against other servers, those between with the tests that start no process. Three runs are under
# way at a time. A few tests that fail run once more when nothing else runs; what passes then is
# listed at the end. With arguments: the newest, only those tests.
set -eu
cd "$(dirname "$0")/.."
ROOT=$(pwd)
ENVS=${CMON_TEST_ENVS:-$ROOT/.test-envs}    # virtual environments, one for each Python
COVERAGE_LEAST=95
PACKAGES="ca-certificates chromium collectd-core curl dnsmasq-base gcc graphite-carbon influxdb
iproute2 libc6-dev libnss3-tools libxml2-utils man-db mount nginx-light openssh-client openssl
procps prometheus python3-venv tmux rsyslog rsyslog-gnutls victoria-metrics zsh"

say() { printf '\n=== %s\n' "$*"; }

command -v npm >/dev/null 2>&1 || PACKAGES="$PACKAGES nodejs npm"    # for statsd

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

quiet="-q --disable-pip-version-check" needed="pytest coverage>=7.10"
environment() {     # environment 3.9 PATH: a Python that has pytest and coverage
    if [ ! -x "$ENVS/$1/bin/pytest" ]; then
        rm -rf "${ENVS:?}/$1"
        if { "$2" -m venv --without-pip "$ENVS/$1" &&       # quicker by two thirds
                "$2" -m pip $quiet --python "$ENVS/$1/bin/python" install $needed; } 2>/dev/null ||
                { "$2" -m venv --clear "$ENVS/$1" &&
                "$ENVS/$1/bin/python" -m pip $quiet install $needed; } >&2; then
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

pytest="-q -o faulthandler_timeout=240"
if [ $# -gt 0 ]; then
    exec "$newest" -m pytest $pytest -p no:cacheprovider "$@"
fi

work=$(mktemp -d)
mkdir "$work/coverage"
trap 'rm -rf "$work"' EXIT

# --- lint ------------------------------------------------------------------------------------------

lint() {
    for tool in ruff mypy; do
        command=$(command -v $tool) || command=
        if [ -z "$command" ] || [ "${CI:-}" = true ]; then
            [ -x "$ENVS/lint/bin/$tool" ] || { python3 -m venv "$ENVS/lint" &&
                "$ENVS/lint/bin/python" -m pip $quiet install ruff mypy; } || :
            [ ! -x "$ENVS/lint/bin/$tool" ] || command=$ENVS/lint/bin/$tool
        fi
        if [ -z "$command" ]; then
            echo "SKIPPED: $tool is not installed"
            [ "${CI:-}" != true ] || echo $tool >>"$work/failed"
            continue
        fi
        case $tool in
        ruff) arguments="check ." ;;
        mypy) arguments="--strict cmon_agent.py cmon_proxy.py cmon_forwarder.py cmon.py" ;;
        esac
        say "$tool $arguments"
        "$command" $arguments || echo $tool >>"$work/failed"
    done
}

# --- tests -----------------------------------------------------------------------------------------

tests() {           # tests RUN=PYTHON [arguments]: a run of pytest, those of its tests
    run=${1%%=*} python=${1#*=} measured=
    shift
    case $run in
    # The newest has two runs beside each other, of the same length: much of the time tests wait.
    *-first) what="--ignore=tests/services --ignore-glob=tests/test_[s-z]*" measured=yes ;;
    *-second) what="--ignore-glob=tests/test_[a-r]*" measured=yes ;;
    *)
        what=--units
        [ "$python" != "$oldest" ] || what=--fewer
        # What other servers and tools make of our output does not depend on the Python.
        for other in services test_soak.py test_forwarder_sinks.py test_rules.py; do
            what="$what --ignore=tests/$other"
        done ;;
    esac
    say "CPython $run: $what${measured:+, with coverage}" "$@"
    [ -z "$measured" ] || {     # a process that a test starts finds these in its environment
        export COVERAGE_PROCESS_START="$ROOT/tests/coverage.ini"
        export COVERAGE_FILE="$work/coverage/data"
    }
    "$python" -m pytest $pytest -o cache_dir="$work/cache-$run" $what "$@" ||
        echo $? >"$work/status-$run"
}

FEW=5
again() {           # again RUN=PYTHON: the tests that failed, if they are few, without other load
    run=${1%%=*} python=${1#*=}
    [ -s "$work/status-$run" ] || return 0
    failed_tests=$("$python" - "$work/cache-$run/v/cache/lastfailed" "$FEW" <<'END'
import json, sys
names = json.load(open(sys.argv[1]))
if len(names) <= int(sys.argv[2]) and all("::" in name for name in names):
    print("\n".join(names))
END
    ) || failed_tests=
    if [ "$(cat "$work/status-$run")" = 1 ] && [ -n "$failed_tests" ]; then
        rm "$work/status-$run"
        (tests "$1" --last-failed --last-failed-no-failures none)
    fi
    if [ -s "$work/status-$run" ]; then
        echo "tests-$run" >>"$work/failed"
    else
        echo "$failed_tests" | sed "s/^/    CPython $run: /" >>"$work/again"
    fi
}

others= first= second=
for one in $versions; do
    version=${one%%=*} python=${one#*=}
    if [ "$python" = "$newest" ]; then
        first=$version-first=$python second=$version-second=$python
    else
        others="$others $one"
    fi
done
{
    lint
    for one in $others; do (tests "$one"); done
} >"$work/others" 2>&1 &
(tests "$second") >"$work/second" 2>&1 &
(tests "$first") 2>&1 | tee "$work/first"
wait
cat "$work/second" "$work/others"
for one in $first $second $others; do
    again "$one"
done
failed=
[ ! -s "$work/failed" ] || failed=" $(tr '\n' ' ' <"$work/failed")"

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

if [ -s "$work/again" ]; then
    say "PASSED ONLY WHEN RUN AGAIN, alone; a test that depends on chance is a bug:"
    cat "$work/again"
fi
say "${failed:+FAILED:}${failed:-all is well}"
tail -q -n 1 "$work/first" "$work/second"
[ -z "$failed" ] || exit 1
