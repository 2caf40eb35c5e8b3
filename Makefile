# Copyright The guest-pull Authors.
# Licensed under the Apache License, Version 2.0.

# The version of this project (semver) and the revision it is built from.
VERSION  ?= 0.1.0
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)$(shell git diff --quiet HEAD 2>/dev/null || echo .m)

# all: containerd with the patches of patches/containerd; none: stock containerd.
PATCHES ?= all
# Where the binaries go.
BIN     ?= bin
PREFIX  ?= /usr/local
DESTDIR ?=

GO        ?= go
BUILD_DIR := .build
CONTAINERD := github.com/containerd/containerd/v2
CONTAINERD_VERSION := $(shell $(GO) list -m -f '{{.Version}}' $(CONTAINERD))

.DEFAULT_GOAL := help

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
.PHONY: help

## ---------------------------------------------------------------- build

ifeq ($(PATCHES),none)
PATCHED :=
MODFILE :=
else
PATCHED := patched
MODFILE = -modfile=$(BUILD_DIR)/patched/go.mod
PATCH_LIST = $(shell $(GO) run ./builder/patch -list)
endif

GO_LDFLAGS = -s -w \
	-X $(CONTAINERD)/version.Version=$(CONTAINERD_VERSION)+guest-pull.$(VERSION) \
	-X $(CONTAINERD)/version.Revision=$(REVISION) \
	-X main.guestPullVersion=$(VERSION) -X main.version=$(VERSION) \
	-X main.patches=$(PATCH_LIST)
# The tags of containerd's own static builds. $(1): more of them.
TAGS = netgo osusergo static_build urfave_cli_no_docs
GO_BUILD = CGO_ENABLED=0 $(GO) build $(MODFILE) -trimpath -buildvcs=false -tags '$(TAGS) $(1)' -ldflags '$(GO_LDFLAGS)'

build: $(PATCHED) ## build containerd, ctr, the runc shim and the mount helper into bin/ (PATCHES=none: stock containerd and the plugin)
	@mkdir -p $(BIN)
	$(GO_BUILD) -o $(BIN)/ ./builder/containerd $(CONTAINERD)/cmd/ctr
	$(call GO_BUILD,no_grpc) -o $(BIN)/ $(CONTAINERD)/cmd/containerd-shim-runc-v2
	$(GO_BUILD) -o $(BIN)/guest-pull-overlayfs ./overlayhelper
	ln -sfn guest-pull-overlayfs $(BIN)/nydus-overlayfs-guest-pull
.PHONY: build

patched: ## copy containerd's source out of the module cache and apply the patches to the copy
	$(GO) run ./builder/patch -out $(BUILD_DIR)/patched
.PHONY: patched
