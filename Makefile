# Run `make` or `make help` for the list of targets.

GO          ?= go
FUZZTIME    ?= 10s
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
# For what runs where there is no libc. Compiled as the packages are, it is compiled once.
STATIC      := CGO_ENABLED=0 GOFLAGS="$${GOFLAGS:-} -trimpath"


SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build packages demo test test-packages test-vm test-instructions record-instructions vmrun build-static lint check vulncheck fuzz bench bench-scale bench-instructions bench-synflood soak soak-reload deps clean need-go need-root

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: need-go ## build bin/nlb
	@$(GO) build -o bin/nlb ./cmd/nlb

packages: need-go ## make dist/nlb_VERSION_amd64.deb, an .rpm and the bill of materials; the same bytes from the same commit
	@GO=$(GO) deploy/package/build dist

demo: need-root need-go ## show on one screen what nlb does, with real packets; root, about 10 s
	@deploy/install-packages demo
	@$(MAKE) build
	@$(GO) build -o bin/nlb-demo ./bench/demo
	@exec bin/nlb-demo -nlb bin/nlb

test: need-root need-go deps check ## everything that is checked: lint, vulnerabilities, all tests with the race detector; root
	@GO=$(GO) .ci/test

# The tests have it in an overlay over this machine; here it is a Debian with nothing else in it.
test-packages: need-root need-go deps ## install, upgrade and remove the .deb in a Debian that mmdebstrap makes for it; root, network
	@root=$$(mktemp -d); trap 'rm -rf "$$root"' EXIT; \
	mmdebstrap --quiet --variant=minbase --include=systemd,nftables,iproute2,procps,curl,busybox-static,kmod bookworm "$$root"; \
	NLB_PACKAGE_ROOT=$$root $(GO) test -count=1 -v -timeout 10m -run '^TestLifeOfAPackage$$' ./deploy/package

# Each of them boots once for all packages. Without CGO: there is no libc in a guest.
KERNEL ?= 6.1,6.12
test-vm: need-go deps vmrun build-static ## run tests in emulated machines: KERNEL=6.1,6.12, all of .ci/vm-tests or [PKG=./p] [RUN=regexp]
	@GO=$(GO) bin/vmrun -kernel $(KERNEL) -suite .ci/vm-tests -file bin/nlb-static -file docs/compare.md -timeout 24m $(if $(RUN),-run '$(RUN)') $(PKG)

# Without CGO, as above: the test binary is what runs in its guest. One boot has the
# guest to itself, since only there the clock counts instructions.
test-instructions: need-go deps build-static ## count instructions in an emulated machine, and fail if nlb takes 2 % more than is recorded
	@$(STATIC) $(GO) test -v -count=1 -timeout 20m -run '^TestGuest' ./bench/counting

record-instructions: need-go deps build-static ## record what test-instructions counts, in bench/counting/testdata
	@$(STATIC) $(GO) test -count=1 -timeout 20m -run '^TestGuestRatios$$' ./bench/counting -update

SOAK ?= 30m
soak: need-root need-go deps ## live through SOAK (30m) of reloads, drains and deaths under load; NLB_SEED=N has the same ones again; root
	@NLB_SOAK=$(SOAK) $(GO) test -v -count=1 -timeout 24h -run '^TestSoak$$' ./internal/e2e

soak-reload: need-root need-go deps ## make 100,000 connections by each client_ip over 200 reloads and 20 upgrades, of which none may fail; root, under 10 min
	@NLB_LONG=1 $(GO) test -v -count=1 -timeout 1h -run '^TestNobodyNotices$$' ./internal/e2e

build-static: need-go ## build bin/nlb-static, which runs where there is no libc
	@$(STATIC) $(GO) build -o bin/nlb-static ./cmd/nlb

vmrun: need-go ## build bin/vmrun, which runs a test binary in an emulated machine
	@$(STATIC) $(GO) build -o bin/vmrun ./internal/vm/vmrun

lint: need-go ## gofmt, go vet, staticcheck, shellcheck
	@unformatted=$$(gofmt -l .); \
		if [[ -n $$unformatted ]]; then echo "gofmt -w would change:"; echo "$$unformatted"; exit 1; fi
	@$(GO) vet ./...
	@$(GO) run $(STATICCHECK) ./...
	@$(GO) -C deploy/tools vet ./...
	@grep -rlE '^#!.*sh$$' .ci bench deploy | xargs shellcheck

check: lint vulncheck ## lint, and known vulnerabilities where their database is reachable

# The tool's modules and the database come from different places: without either
# there is nothing to run. A finding fails.
vulncheck: need-go
	@if curl -fsS -m 10 -o /dev/null https://vuln.go.dev/index/db.json 2>/dev/null && \
		$(GO) run $(GOVULNCHECK) -version >/dev/null 2>&1; \
	then $(GO) run $(GOVULNCHECK) ./...; \
	else echo "govulncheck: not reachable, not run"; fi

fuzz: need-root need-go ## fuzz each parser for FUZZTIME (10s); root
	@grep -rn --include='*_test.go' '^func Fuzz' . | sed -E 's|^(.*)/[^/]*:[0-9]+:func (Fuzz[A-Za-z0-9]*).*|\1 \2|' | \
		while read -r package name; do \
			echo "$$package $$name"; \
			$(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package"; \
		done

bench: need-root ## race nlb against what one would use instead, and write a report; root, under 10 min; choose by bench/run.sh --help
	@bench/run.sh

bench-scale: need-root need-go ## measure what a thousand listeners cost; root
	@$(GO) test -run '^$$' -bench Scale -benchtime 1x ./balancer/nft

# Without CGO: there is no libc in a guest. Root only where deps has to install.
bench-instructions: need-go deps build-static ## count what a packet and a connection cost in instructions, in emulated machines; about 2 min
	@$(STATIC) $(GO) build -buildvcs=auto -o bin/nlb-instructions ./bench/instructions
	@exec bin/nlb-instructions -nlb bin/nlb-static

bench-synflood: need-root build ## measure honest connections during a SYN flood, with the SYN proxy and without; about 2 min; root
	@$(GO) run ./bench/synflood -nlb bin/nlb

deps: ## install the Debian packages that the tests need (deploy/packages)
	@deploy/install-packages test

clean: ## remove what was built
	@rm -rf bin dist

need-root:
	@if [[ $$(id -u) != 0 ]]; then \
		echo 'This needs root, because it makes network namespaces: sudo env PATH="$$PATH" make $(MAKECMDGOALS)'; exit 1; fi

need-go:
	@if ! command -v $(GO) >/dev/null; then \
		echo "This needs Go 1.26 or later, and there is no \"$(GO)\" in PATH: see https://go.dev/doc/install"; exit 1; fi
