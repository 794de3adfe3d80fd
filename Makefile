# What people and CI call. Each target installs what it needs (scripts/setup.sh says what and why) and may be run again:
# nothing is made twice. Root is needed for everything that starts a sandbox.

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
STILLBOX := target/release/stillbox

.PHONY: help run demo setup setup-test setup-bench criu build test test-dialects check bench soak vm-test container-test dist clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

run: setup build ## set up, start the server, show what it does, stay
	@scripts/run.sh stay

demo: setup build ## the same without staying; the exit code says whether it worked
	@scripts/run.sh once

setup: ## install the packages that building and running needs
	@scripts/setup.sh run

setup-test:
	@scripts/setup.sh test

setup-bench:
	@scripts/setup.sh bench

criu: setup ## the static CRIU that the binary embeds
	@criu/build.sh target/criu/criu

build: setup ## target/release/stillbox, one file
	@scripts/build.sh

test: setup-test build ## everything but the emulated machine: rules, wire, kernel, SDKs
	@scripts/test.sh

test-dialects: setup-test build ## every version of Novita's and HopX's SDKs, and s3fs
	@tests/sdk/run --dialects

vm-test: setup-test build ## the same binary on Debian's 6.1 kernel with cgroup v2, in an emulated machine
	@$(STILLBOX) template export base target/vm/base.tar.zst --data-dir $(CURDIR)/target/vm/data
	@tests/vm/run.sh $(STILLBOX) target/vm/base.tar.zst

container-test: build ## the Dockerfile: built by buildah on our own base, doctor and demo run in it
	@scripts/setup.sh container
	@scripts/container-test.sh

check: ## format, lints, layout, licences
	@scripts/check.sh

bench: setup-bench build ## the numbers of docs/SPECIFICATION.md on this machine
	@python3 tests/perf/start.py
	@python3 tests/perf/stopped_time.py
	@python3 tests/perf/interpreter.py
	@python3 tests/perf/hopx.py
	@python3 tests/perf/novita.py

soak: setup-test build ## 200 pauses and resumes of one busy sandbox: nothing is lost, nothing grows
	@tests/perf/soak

dist: setup build ## dist/: binary, base template, unit, checksums
	@scripts/dist.sh

clean: ## remove what was built (not the caches in ~/.cache/stillbox)
	@rm -rf dist target
