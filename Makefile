# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# A source archive (make dist) says here what it is of.
-include release.mk
ARCHIVE := $(wildcard release.mk)

# The version of this project (semver) and the revision it is built from.
VERSION  ?= 0.2.0
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)$(shell git diff --quiet HEAD 2>/dev/null || echo .m)

# The minor version of containerd to build. go.mod has the version of one line, and
# patches/containerd/vLINE/go.mod that of another. A source archive is of one line.
LINE  ?= 2.4
LINES := $(if $(ARCHIVE),$(LINE),$(patsubst patches/containerd/v%,%,$(wildcard patches/containerd/v*)))
ifeq ($(filter $(LINE),$(LINES)),)
$(error there is no line $(LINE); LINE is one of: $(LINES))
endif
# all: containerd with the patches of patches/containerd; none: stock containerd.
PATCHES ?= all
# The programs that are built, besides the link to the mount helper.
PROGRAMS := containerd ctr containerd-shim-runc-v2 guest-pull-overlayfs

# Where the binaries go.
BIN     ?= bin
PREFIX  ?= /usr/local
DESTDIR ?=

GO        ?= go
BUILD_DIR := .build
# What is of one line only.
LINE_DIR := $(BUILD_DIR)/v$(LINE)
LINE_MODFILE := $(addprefix -modfile=,$(wildcard patches/containerd/v$(LINE)/go.mod))
LINE_TAG := containerd_$(subst .,_,$(LINE))
# For what runs the go command by itself, in whatever directory.
LINE_GOFLAGS := -tags=$(LINE_TAG) $(addprefix -modfile=,$(abspath $(wildcard patches/containerd/v$(LINE)/go.mod)))
CONTAINERD := github.com/containerd/containerd/v2
CONTAINERD_API := github.com/containerd/containerd/api
CONTAINERD_VERSION := $(shell $(GO) list -m $(LINE_MODFILE) -f '{{.Version}}' $(CONTAINERD))

.DEFAULT_GOAL := help

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
.PHONY: help

## ---------------------------------------------------------------- build

ifneq ($(ARCHIVE),)
# Its go.mod and vendor/ have the patched containerd.
PATCHED :=
MODFILE :=
ifneq ($(PATCHES),all)
$(error a source archive has no containerd without patches: use a checkout for PATCHES=$(PATCHES))
endif
else ifeq ($(PATCHES),none)
PATCHED :=
MODFILE = $(LINE_MODFILE)
else
PATCHED := patched
MODFILE = -modfile=$(LINE_DIR)/patched/go.mod
PATCH_LIST = $(shell $(PATCH) -list)
endif
PATCH = $(GO) run ./builder/patch -line $(LINE)

GO_LDFLAGS = -s -w \
	-X $(CONTAINERD)/version.Version=$(CONTAINERD_VERSION)+guest-pull.$(VERSION) \
	-X $(CONTAINERD)/version.Revision=$(REVISION) \
	-X main.guestPullVersion=$(VERSION) -X main.version=$(VERSION) \
	-X main.patches=$(PATCH_LIST)
# The tags of containerd's own static builds. $(1): more of them.
TAGS = netgo osusergo static_build urfave_cli_no_docs $(LINE_TAG)
# ARCH: of another machine, in Go's words (amd64, arm64, ppc64le, s390x).
GO_BUILD = CGO_ENABLED=0 $(addprefix GOARCH=,$(ARCH)) $(GO) build $(MODFILE) -trimpath -buildvcs=false -tags '$(TAGS) $(1)' -ldflags '$(GO_LDFLAGS)'

build: $(PATCHED) ## build containerd, ctr, the runc shim and the mount helper into bin/ (LINE=2.3, 2.4; PATCHES=none: stock containerd and the plugin)
	@mkdir -p $(BIN)
	@echo "building into $(BIN)/: containerd $(CONTAINERD_VERSION) with guest-pull $(VERSION), patches: $(PATCHES)"
	@$(GO_BUILD) -o $(BIN)/ ./builder/containerd $(CONTAINERD)/cmd/ctr
	@$(call GO_BUILD,no_grpc) -o $(BIN)/ $(CONTAINERD)/cmd/containerd-shim-runc-v2
	@$(GO_BUILD) -o $(BIN)/guest-pull-overlayfs ./overlayhelper
	@ln -sfn guest-pull-overlayfs $(BIN)/nydus-overlayfs-guest-pull
.PHONY: build

patched: ## copy containerd's source out of the module cache and apply the patches to the copy
	@$(PATCH)
.PHONY: patched

modules: ## make all go.mod and go.sum fit after a version in one of them was changed
	$(GO) mod tidy
	set -e; for modfile in $(wildcard patches/containerd/*/go.mod); do $(GO) mod tidy -modfile=$$modfile; done
	cd integration && $(GO) mod tidy
.PHONY: modules

install: ## install what `make build` built: PREFIX (/usr/local), DESTDIR; no configuration is touched
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 0755 $(addprefix $(BIN)/,$(PROGRAMS)) $(DESTDIR)$(PREFIX)/bin
	ln -sfn guest-pull-overlayfs $(DESTDIR)$(PREFIX)/bin/nydus-overlayfs-guest-pull
.PHONY: install

uninstall: ## remove what `make install` installed
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(PROGRAMS) nydus-overlayfs-guest-pull)
.PHONY: uninstall

clean: ## remove bin/ and .build/
	rm -rf $(BIN) $(BUILD_DIR)
.PHONY: clean

## ---------------------------------------------------------------- packages

DIST   ?= $(BUILD_DIR)/dist
ARCHES ?= amd64 arm64 ppc64le s390x
# All files in a package are dated as the last commit.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
TOOLS := $(BUILD_DIR)/tools
PACKAGE := containerd-guest-pull-$(LINE)
# containerd's version comes first, so that an upgrade of either sorts as one. A
# pre-release of this project sorts before the release.
PACKAGE_VERSION = $(CONTAINERD_VERSION:v%=%)+guestpull.$(subst -,~,$(VERSION))

# Built without paths of this machine, for an SBOM has the digest of its tool.
CYCLONEDX := $(TOOLS)/cyclonedx-gomod-v1.9.0

$(CYCLONEDX):
	CGO_ENABLED=0 GOBIN=$(abspath $(TOOLS)) $(GO) install -trimpath github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@$(@:$(TOOLS)/cyclonedx-gomod-%=%)
	mv $(TOOLS)/cyclonedx-gomod $@

PACKAGE_ENV = NAME=$(PACKAGE) LINE=$(LINE) VERSION=$(VERSION) REVISION=$(REVISION) CONTAINERD_VERSION=$(CONTAINERD_VERSION) \
	PACKAGE_VERSION=$(PACKAGE_VERSION) PATCH_LIST=$(PATCH_LIST) PATCHED=$(LINE_DIR)/patched TAGS='$(TAGS)' ARCHES='$(ARCHES)' \
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) CYCLONEDX=$(CYCLONEDX)

dist: ## make the source archives of both lines into .build/dist/: all that a build needs besides Go
	set -e; for line in $(LINES); do $(MAKE) --no-print-directory dist-line LINE=$$line; done
	$(CHECKSUMS)
.PHONY: dist

CHECKSUMS = cd $(DIST) && rm -f SHA256SUMS && sha256sum * >SHA256SUMS

dist-line: patched
	$(PACKAGE_ENV) builder/package/dist.sh $(LINE_DIR)/dist $(DIST)
.PHONY: dist-line

# What a package is made of, in a source archive.
UNITDIR ?= $(PREFIX)/lib/systemd/system
ZSHDIR  ?= $(PREFIX)/share/zsh/site-functions
CONFDIR ?= /etc/containerd/conf.d
CONFIG  ?= $(PREFIX)/share/containerd-guest-pull/config.toml

install-package: package-programs
	BIN='$(BIN)' TOOLS=$(LINE_DIR)/programs NAME=$(PACKAGE) LINE=$(LINE) DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' UNITDIR='$(UNITDIR)' \
		ZSHDIR='$(ZSHDIR)' CONFDIR='$(CONFDIR)' CONFIG='$(CONFIG)' builder/package/install.sh
.PHONY: install-package

# For this machine, whatever the package is for; with what writes man pages.
package-programs: override ARCH :=
package-programs: TAGS = netgo osusergo static_build $(LINE_TAG)
package-programs:
	@mkdir -p $(LINE_DIR)/programs
	@$(GO_BUILD) -o $(LINE_DIR)/programs/ $(CONTAINERD)/cmd/ctr $(CONTAINERD)/cmd/gen-manpages
	@$(GO_BUILD) -o $(LINE_DIR)/programs/go-md2man github.com/cpuguy83/go-md2man/v2
.PHONY: package-programs

package: packages-deps ## build .deb, .rpm and .tar.gz of both lines for four architectures, source packages, SBOMs and SHA256SUMS into .build/dist/
	rm -rf $(DIST)
	$(MAKE) --no-print-directory dist
	set -e; for line in $(LINES); do $(MAKE) --no-print-directory package-line LINE=$$line; done
	$(CHECKSUMS)
.PHONY: package

package-line: $(CYCLONEDX)
	$(PACKAGE_ENV) builder/package/package.sh $(LINE_DIR)/package $(DIST)
.PHONY: package-line

REPOSITORY ?= $(BUILD_DIR)/repository

repository: repository-deps ## lay out signed apt and dnf repositories of what `make package` made, in .build/repository/: KEY, of gpg
	KEY='$(KEY)' builder/package/repository.sh $(DIST) $(REPOSITORY)
.PHONY: repository

repository-deps:
	@$(MAKE) --no-print-directory deps DEBIAN_PACKAGES='apt-utils createrepo-c dpkg-dev gnupg rpm'
.PHONY: repository-deps

package-reproducible: ## build the packages twice, in different directories, and compare them (half an hour)
	builder/package/reproducible.sh ARCHES='$(ARCHES)' VERSION='$(VERSION)' REVISION='$(REVISION)' \
		SOURCE_DATE_EPOCH='$(SOURCE_DATE_EPOCH)' TOOLS='$(abspath $(TOOLS))'
.PHONY: package-reproducible

# Where this machine gets Debian's packages from.
DEBIAN_MIRROR = $(shell apt-get indextargets --format '$$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)

# Debians to install the packages in, and to build them in, with what the tests
# install in their caches. The Go that the packages are built with is in the backports
# of Debian 13; Debian 12 has none that is new enough, there the tests bring this
# machine's.
DEBIAN_ROOT := $(BUILD_DIR)/debian-%-3
BACKPORTS_trixie := golang-1.26-go

$(DEBIAN_ROOT):
	rm -rf $@.tmp
	debootstrap --variant=minbase --include=systemd,ca-certificates $* $@.tmp '$(DEBIAN_MIRROR)' >/dev/null
	echo force-unsafe-io >$@.tmp/etc/dpkg/dpkg.cfg.d/unsafe-io
	$(if $(BACKPORTS_$*),echo 'deb $(DEBIAN_MIRROR) $*-backports main' >$@.tmp/etc/apt/sources.list.d/backports.list)
	chroot $@.tmp sh -c 'apt-get update -qq && apt-get install -qq -y --download-only --no-install-recommends \
		runc fuse3 containerd rpm dnf createrepo-c gnupg build-essential debhelper fakeroot lintian rpmlint $(BACKPORTS_$*) >/dev/null'
	mv $@.tmp $@

# By a make of its own: deps may have been made already, with another list.
packages-deps:
	@$(MAKE) --no-print-directory deps DEBIAN_PACKAGES='cpio debhelper debootstrap dpkg-dev lintian qemu-user-static rpm xz-utils'
.PHONY: packages-deps

test-packages: packages-deps package ## install, upgrade, move, boot, remove and purge the packages in Debian roots, and check them with lintian (15 minutes)
	$(MAKE) test-packages-in DEBIAN=bookworm LINE=2.3
	$(MAKE) test-packages-in DEBIAN=trixie LINE=2.4
.PHONY: test-packages

# In one Debian, beginning with one line.
DEBIAN := bookworm
test-packages-in: export GOFLAGS := $(LINE_GOFLAGS)
test-packages-in: $(subst %,$(DEBIAN),$(DEBIAN_ROOT))
	DIST='$(abspath $(DIST))' DEBIAN_ROOT='$(abspath $<)' LINE=$(LINE) LINES='$(LINES)' ARCHES='$(ARCHES)' \
		$(GO) test -tags packages -count=1 -timeout 1h ./builder/package/
.PHONY: test-packages-in

# Named by the version, which has to be the tag of what is there.
release: ## everything of a release, from a clean, tagged tree: all tests, packages twice, repositories, signed checksums (builder/PACKAGING.md): KEY, of gpg
	builder/package/release.sh '$(VERSION)' '$(KEY)' '$(DIST)'
.PHONY: release

line: ## try the patches on any version of containerd: VERSION=v2.5.0 (patches/README.md)
	@$(PATCH) -try $(if $(filter command environment,$(origin VERSION)),$(VERSION),$(error VERSION has to name a version of containerd: make line VERSION=v2.5.0))
.PHONY: line

## ---------------------------------------------------------------- try and test

# What the demo and the tests run besides the binaries: runc, mount.fuse, a
# static shell for the images, mke2fs for a file system without d_type, a C
# compiler for the race detector.
DEBIAN_PACKAGES := runc fuse3 busybox-static e2fsprogs strace git ca-certificates gcc libc6-dev

deps: ## install the Debian packages that the demo and the tests need
	@missing=$$(for p in $(DEBIAN_PACKAGES); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		echo "installing Debian packages:" $$missing; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
.PHONY: deps

other-lines: ## build the other lines as well, into .build/vLINE/bin: the tests move a node between them
	set -e; for line in $(filter-out $(LINE),$(LINES)); do $(MAKE) build LINE=$$line BIN=$(BUILD_DIR)/v$$line/bin; done
.PHONY: other-lines

test-tools: ## build the test equipment (the stand-in guest) into .build/
	@echo "building the stand-in guest into $(BUILD_DIR)/"
	@cd integration && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -o ../$(BUILD_DIR)/containerd-shim-guest-v2 ./shim-guest
.PHONY: test-tools

RACE_BIN := $(LINE_DIR)/race

# Without checkptr, which -race brings: containerd's overlayfs does not start with it where
# a directory is small (continuity, fs/dtype_linux.go).
race: build ## build containerd with Go's race detector, and links to the other programs, into .build/vLINE/race/
	@mkdir -p $(RACE_BIN)
	@$(subst CGO_ENABLED=0,CGO_ENABLED=1,$(GO_BUILD)) -race -gcflags=all=-d=checkptr=0 -o $(RACE_BIN)/ ./builder/containerd
	@ln -sfn $(addprefix $(abspath $(BIN))/,$(filter-out containerd,$(PROGRAMS)) nydus-overlayfs-guest-pull) $(RACE_BIN)/
.PHONY: race

demo: deps build test-tools ## pull an image in a guest and see it happen (IMAGE=reference: an image of yours)
	@cd integration && IMAGE='$(IMAGE)' $(GO) run ./demo
.PHONY: demo

GOLANGCI_LINT_VERSION := v2.9.0
GOLANGCI_LINT := $(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION)

$(GOLANGCI_LINT):
	GOBIN=$(abspath $(TOOLS)) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	mv $(TOOLS)/golangci-lint $@

lint: $(GOLANGCI_LINT) ## run golangci-lint on every module
	GOFLAGS='$(LINE_GOFLAGS)' $(GOLANGCI_LINT) run --allow-parallel-runners ./...
	cd integration && ../$(GOLANGCI_LINT) run --allow-parallel-runners -c ../.golangci.yml ./...
.PHONY: lint

# A source archive's are those of who builds a package: without root, without a
# network, on whatever machine.
ifeq ($(ARCHIVE),)
RACE ?= -race
endif
UNIT_ROOT := $(if $(ARCHIVE),$(if $(filter 0,$(shell id -u)),-args -test.root),-args -test.root)

unit: export GOFLAGS := $(LINE_GOFLAGS)
unit: $(if $(ARCHIVE),,deps) ## run the unit and conformance tests, with the race detector
	$(GO) test $(RACE) ./plugin/ ./plugin/volume/... ./plugin/metrics/... ./overlayhelper/... ./builder/...
	$(GO) test $(RACE) ./plugin/users/ ./plugin/snapshotter/... $(UNIT_ROOT)
.PHONY: unit

# As QEMU calls the architectures.
EMULATED ?= aarch64 ppc64le s390x
GOARCH_aarch64 := arm64

unit-emulated: ## run the tests of the codec and the mount helper on other architectures, s390x among them, which is big-endian, under emulation
	@$(MAKE) --no-print-directory deps DEBIAN_PACKAGES=qemu-user-static
	set -e; $(foreach arch,$(EMULATED),CGO_ENABLED=0 GOARCH=$(or $(GOARCH_$(arch)),$(arch)) GOFLAGS='$(LINE_GOFLAGS)' \
		GUEST_PULL_EMULATOR=qemu-$(arch)-static $(GO) test -exec qemu-$(arch)-static ./plugin/volume ./overlayhelper;)
.PHONY: unit-emulated

# This test of 2.3 needs cgroup v2 and does not say so, as that of 2.4 does.
SKIP_UNIT_2.3 := $(if $(wildcard /sys/fs/cgroup/cgroup.controllers),,-skip '^TestCgroupNamespace$$')

unit-patched: patched ## run containerd's own tests of every package that a patch touches
	cd $(LINE_DIR)/patched/containerd && $(GO) test $(SKIP_UNIT_$(LINE)) $$(cd $(CURDIR) && $(PATCH) -packages)
.PHONY: unit-patched

INTEGRATION_TIMEOUT := 45m
integration: deps build other-lines test-tools bench-binaries bench-modfile ## run the built binaries against a registry, with runc and with the stand-in guest
	cd integration && $(GO) test -count=1 -timeout $(INTEGRATION_TIMEOUT) $$($(GO) list ./... | grep -v /bench$$)
	cd integration && $(GO) test -count=1 $(BENCH_MODFILE) ./bench
	$(MAKE) integration-race
.PHONY: integration

# Those in which most happens at the same time; all, for an empty one.
RACE_TESTS ?= ^(TestRestart|TestConcurrentPulls|TestSixteenPodsAtOnce|TestPatchPodsAtTheSameTime|TestUsersComeBack)
integration-race: race other-lines test-tools bench-binaries ## run integration tests against a containerd with the race detector (RACE_TESTS=: all)
	cd integration && GUEST_PULL_KILLS= GUEST_PULL_SHAPES= GUEST_PULL_CONTAINERS= GUEST_PULL_CONTAINERD=$(abspath $(RACE_BIN)) \
		$(GO) test -count=1 -timeout $(INTEGRATION_TIMEOUT) -run '$(RACE_TESTS)' .
.PHONY: integration-race

# A Kubernetes cluster of one node, built from source once: etcd, kube-apiserver
# and kubelet as released, by the versions in integration/kubernetes/go.mod.
KUBERNETES := $(BUILD_DIR)/kubernetes
KUBERNETES_VERSION = $(shell cd integration/kubernetes && $(GO) list -m -f '{{.Version}}' k8s.io/kubernetes)
KUBERNETES_BUILD = cd integration/kubernetes && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w \
	-X k8s.io/component-base/version.gitVersion=$(KUBERNETES_VERSION)'
E2E = cd integration && GUEST_PULL_CONTAINERD=$(abspath $(BIN)) GUEST_PULL_KUBERNETES=$(abspath $(KUBERNETES)) \
	GUEST_PULL_RESULTS=$(abspath $(BUILD_DIR))/$@$(if $(PATCHED),,-stock).md $(GO) test -count=1 -v ./cluster

kubernetes: ## build etcd, kube-apiserver and kubelet into .build/kubernetes (ten minutes, once)
	$(KUBERNETES_BUILD) -o $(abspath $(KUBERNETES))/ k8s.io/kubernetes/cmd/kube-apiserver k8s.io/kubernetes/cmd/kubelet
	$(KUBERNETES_BUILD) -o $(abspath $(KUBERNETES))/etcd go.etcd.io/etcd/server/v3
.PHONY: kubernetes

e2e-kubernetes-core: deps build test-tools kubernetes ## run the most important cases of e2e-kubernetes
	$(E2E) -timeout 20m -run '^TestCore'
.PHONY: e2e-kubernetes-core

e2e-kubernetes: deps build test-tools kubernetes ## deploy pods to a real kubelet, then see what stock containerd gets wrong there (PATCHES=none: only that)
ifneq ($(PATCHED),)
	$(E2E) -timeout 60m -skip '^(TestStock|TestMachine|TestPowerCuts)'
	$(MAKE) e2e-kubernetes PATCHES=none BIN=$(BUILD_DIR)/bin-stock
else
	$(E2E) -timeout 20m -run '^TestStock'
endif
.PHONY: e2e-kubernetes

# The latest patch of each minor version of kubelet that is supported, and gates that
# change what kubelet asks of containerd.
KUBELETS ?= v1.34.4 v1.35.4 v1.36.3 $(KUBERNETES_VERSION) \
	v1.34.4:ImageVolume=true,KubeletEnsureSecretPulledImages=true $(KUBERNETES_VERSION):RuntimeClassInImageCriApi=true

kubelets: deps build test-tools kubernetes ## run the most important cases with each of these kubelets (an hour, the first time); the table goes to README.md
	@mkdir -p $(BUILD_DIR)/kubelets
	GUEST_PULL_CONTAINERD=$(abspath $(BIN)) GUEST_PULL_KUBERNETES=$(abspath $(KUBERNETES)) \
		integration/kubernetes/versions.sh $(KUBELETS) >$(BUILD_DIR)/kubelets/table.md; \
		status=$$?; cat $(BUILD_DIR)/kubelets/table.md; exit $$status
ifeq ($(origin KUBELETS),file)
	@sed -i -e '/^<!-- kubelets -->$$/,/^<!-- \/kubelets -->$$/{//!d}' -e '/^<!-- kubelets -->$$/r $(BUILD_DIR)/kubelets/table.md' README.md
endif
.PHONY: kubelets

# A Debian for a virtual machine, with a kernel, whose initial RAM disk has what
# QEMU's needs, with what containerd's package depends on, and its suites run.
MACHINE_ROOT := $(BUILD_DIR)/machine-bookworm-3

$(MACHINE_ROOT):
	rm -rf $@.tmp
	debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,udev,openssh-server,kmod,procps,ca-certificates,runc,fuse3,busybox-static,iproute2,containernetworking-plugins,erofs-utils,linux-image-cloud-amd64,initramfs-tools,zstd \
		bookworm $@.tmp '$(DEBIAN_MIRROR)' >/dev/null
	echo MODULES=list >$@.tmp/etc/initramfs-tools/conf.d/machine
	printf '%s\n' ext4 virtio_pci virtio_blk >>$@.tmp/etc/initramfs-tools/modules
	unshare --mount sh -c 'mount -t proc none $@.tmp/proc && chroot $@.tmp update-initramfs -u' >/dev/null
	rm -rf $@.tmp/var/cache/apt/archives/*.deb $@.tmp/var/lib/apt/lists/*
	mv $@.tmp $@

machine-deps:
	@$(MAKE) --no-print-directory deps DEBIAN_PACKAGES='debootstrap e2fsprogs qemu-system-x86'
.PHONY: machine-deps

test-node: deps machine-deps package build test-tools kubernetes $(MACHINE_ROOT) ## boot a virtual machine with the package, systemd, cgroup v2 and kubelet, run pods in it, and cut its power (amd64; minutes with KVM, an hour without)
	cd integration && GUEST_PULL_CONTAINERD=$(abspath $(BIN)) $(GO) run ./upstream -build
	cd integration && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -o $(GUEST_PULL_UPSTREAM) ./upstream
	$(E2E) -timeout 6h -run '^(TestMachine|TestPowerCuts)'
test-node: export GUEST_PULL_MACHINE := $(abspath $(MACHINE_ROOT))
test-node: export GUEST_PULL_DEB := $(abspath $(DIST))/containerd-guest-pull-$(LINE)_*_amd64.deb
test-node: export GUEST_PULL_UPSTREAM := $(abspath $(LINE_DIR))/upstream/upstream
test-node: export GUEST_PULL_CONSOLE := $(abspath $(BUILD_DIR))
.PHONY: test-node

## ---------------------------------------------------------------- measure

# What the benchmarks compare with: stock containerd, and containerd with the
# plugin but without patches, both built with the flags of `make build`.
BENCH := $(LINE_DIR)/bench

bench-binaries: ## build what the benchmarks compare with into .build/vLINE/bench/
	@mkdir -p $(BENCH)/stock
	$(MAKE) build PATCHES=none BIN=$(BENCH)/unpatched
	$(GO_BUILD) -o $(BENCH)/stock/ $(CONTAINERD)/cmd/containerd
	for p in ctr containerd-shim-runc-v2 nydus-overlayfs-guest-pull; do ln -sfn ../unpatched/$$p $(BENCH)/stock/$$p; done
bench-binaries: MODFILE = $(LINE_MODFILE)
bench-binaries: PATCH_LIST =
.PHONY: bench-binaries

# The benchmarks themselves are linked with the patched containerd as well: some
# use its metadata store directly. -mod=mod: another line brings other sums.
BENCH_MODFILE = -mod=mod -modfile=../$(BENCH)/go.mod
BENCH_RUN = cd integration && $(GO) run $(BENCH_MODFILE) ./bench

bench-modfile: patched
	@mkdir -p $(BENCH)
	cp integration/go.mod integration/go.sum $(BENCH)/
	$(GO) mod edit -replace=$(CONTAINERD)=$(CURDIR)/$(LINE_DIR)/patched/containerd \
		-replace=$(CONTAINERD_API)=$(CONTAINERD_API)@$$($(GO) list $(LINE_MODFILE) -m -f '{{.Version}}' $(CONTAINERD_API)) $(BENCH)/go.mod
.PHONY: bench-modfile

bench: deps build test-tools bench-binaries bench-modfile ## measure everything against its peers (twelve minutes); results go to integration/bench/vLINE/
	$(BENCH_RUN) -out bench/v$(LINE)
.PHONY: bench

bench-short: deps build test-tools bench-binaries bench-modfile ## the same on a small scale (2 minutes), which `make test` runs too; only prints
	$(BENCH_RUN) -short
.PHONY: bench-short

## ---------------------------------------------------------------- prove

# The tests add to these what they have seen, and the last step prints the sums.
export GUEST_PULL_FIGURES := $(abspath $(BUILD_DIR))/figures
PRINT_FIGURES = @echo; cd integration && $(GO) run ./figures/print

new-figures:
	@mkdir -p $(BUILD_DIR) && rm -f $(GUEST_PULL_FIGURES)
.PHONY: new-figures

# Each fuzz target runs for so long.
FUZZTIME ?= 1m

fuzz: ## run each fuzz target for FUZZTIME (1m)
	cd integration && $(GO) run ./fuzz -time $(FUZZTIME)
.PHONY: fuzz

upstream: deps build test-tools ## run containerd's own integration suites and critest against bin/ and against stock containerd, and compare (half an hour)
	@dpkg-query -W containernetworking-plugins >/dev/null 2>&1 || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends containernetworking-plugins >/dev/null
	cd integration && GUEST_PULL_CONTAINERD=$(abspath $(BIN)) $(GO) run ./upstream
.PHONY: upstream

# What all of them have passed goes into the README's table of compatibility. $(1):
# the integration tests among it.
ROW = @mkdir -p $(LINE_DIR) && echo '| $(CONTAINERD_VERSION:v%=%) | $(words $(subst $(comma), ,$(PATCH_LIST))) | $(KUBERNETES_VERSION:v%=%) | pass | pass | $(1) | pass |' >$(LINE_DIR)/compatibility.md
comma := ,

test: new-figures lint unit unit-patched integration e2e-kubernetes-core ## lint, unit, conformance and integration tests, and a Kubernetes node (LINE=2.3, 2.4)
	$(call ROW,pass)
	$(PRINT_FIGURES)
.PHONY: test

test-line: deps patched ## what `make test` runs of one line, after it has run for another: what differs (LINE=2.3)
	$(MAKE) unit-patched
	GOFLAGS='$(LINE_GOFLAGS)' $(GO) vet ./plugin/... ./overlayhelper/... ./builder/...
	GOFLAGS='$(LINE_GOFLAGS)' $(GO) test ./plugin/ ./builder/containerd/
	GOFLAGS='$(LINE_GOFLAGS)' $(GO) test ./plugin/users/ ./plugin/snapshotter/... -args -test.root
	$(MAKE) build other-lines test-tools bench-binaries
	$(MAKE) integration-race
	cd integration && $(GO) test -count=1 -timeout $(INTEGRATION_TIMEOUT) -run '^TestPatch|^TestMoveBetweenLines$$|^TestUsers|^TestSandboxer|^TestEnable$$|^TestGuestConfig$$' .
	$(MAKE) e2e-kubernetes-core
	$(call ROW,those of what differs: pass)
	$(PRINT_FIGURES)
.PHONY: test-line

compatibility: ## write the README's table of what the last `make test` or `make test-line` of each line has seen
	@test -n '$(wildcard $(BUILD_DIR)/v*/compatibility.md)' || { echo 'no line has passed yet: run make test, make test-line LINE=..., or .ci/run' >&2; exit 1; }
	@{ echo '| containerd | patches | Kubernetes | unit and conformance tests | containerd'"'"'s own tests | integration tests | a Kubernetes node |'; \
		echo '|---|---|---|---|---|---|---|'; cat $(BUILD_DIR)/v*/compatibility.md; } >$(BUILD_DIR)/compatibility.md
	sed -i -e '/^<!-- lines -->$$/,/^<!-- \/lines -->$$/{//!d}' -e '/^<!-- lines -->$$/r $(BUILD_DIR)/compatibility.md' README.md
.PHONY: compatibility

test-all: export GUEST_PULL_KILLS := 200
test-all: export GUEST_PULL_SHAPES := 2000
test-all: export GUEST_PULL_CONTAINERS := 1000
test-all: export GUEST_PULL_CUTS := 50
test-all: export RACE_TESTS :=
test-all: INTEGRATION_TIMEOUT := 3h
test-all: new-figures lint unit unit-patched integration fuzz upstream e2e-kubernetes kubelets test-packages test-node package-reproducible ## all tests: what `make test` runs, on a large scale, containerd's own suites and the packages (hours); run it before a release
	$(call ROW,pass)
	$(PRINT_FIGURES)
.PHONY: test-all
