# SPDX-License-Identifier: MPL-2.0
# `make` alone prints the targets. None of them is needed to run the programs.

PYTHON = python3
PROGRAMS = cmon_agent.py cmon_proxy.py cmon_forwarder.py cmon.py

# $(call if_found,TOOL,COMMAND): what is not installed is said, not failed
if_found = @if command -v $(1) >/dev/null 2>&1; then echo '$(2)'; $(2); \
	else echo 'SKIPPED: $(2): $(1) is not installed'; fi

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

test:		## all tests, as a fresh machine and CI run them (installs what they need when root)
	sh tests/run.sh

check:		## compile, ruff, mypy, manifests
	$(PYTHON) -m py_compile $(PROGRAMS)
	$(call if_found,ruff,ruff check $(PROGRAMS) tests)
	$(call if_found,mypy,mypy --strict $(PROGRAMS))
	$(call if_found,xmllint,xmllint --noout --nonet --nowarning --dtdvalid tests/smf.dtd smf/*.xml)
	sh -n smf/cmon-agent-setup

golden:		## rewrite tests/golden from the captures; then read the diff
	$(PYTHON) -m pytest tests/test_golden.py tests/test_monitor.py tests/test_top.py --rewrite

bench:		## print the measurements (minutes; best on an idle machine)
	for bench in server agent proxy forwarder; do $(PYTHON) bench/$$bench.py || exit 1; done

docs:		## rewrite the generated docs and dashboards from the code
	$(PYTHON) tests/make_docs.py

demo:		## a compute node, a proxy and a tenant on this machine, until Ctrl-C
	$(PYTHON) cmon.py demo

.PHONY: help test check golden bench docs demo
