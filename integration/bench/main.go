/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

// Command bench measures the guest-pull snapshotter against its peers, and prints
// one table. It needs root, and what `make build`, `make test-tools` and
// `make bench-binaries` build.
//
// Every figure is a ratio: the same is done with this project and with a peer, in
// turns, on the same machine, in the same run. What is measured, and against
// whom, is said in the files of the measurements:
//
//   - layers.go: preparing a layer, and how that grows with the node
//   - pull.go: pulls over CRI, and what they take from the registry
//   - container.go: containers over CRI, disk space
//   - waits.go: how often containerd waits for the disk
//   - full.go: a node with many images and containers
//   - pods.go: many pods at once
//   - gc.go: garbage collection
//   - daemon.go: memory, start and size of containerd
//   - helper.go: the mount helper
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// scale is how much is measured.
type scale struct {
	layerRounds int

	growth       []int // snapshots on the node
	growthRounds int

	pulls      []int // layers of the images
	layerSize  int   // bytes
	pullRounds int

	containerRounds int

	gcImages, gcRounds int

	startRounds                    int
	settle                         time.Duration
	memoryLayers, memoryContainers int

	helperRounds int

	waitPulls  []int // layers of the images
	waitRounds int

	fullImages, fullContainers, callRounds int

	pods, podRounds int
}

var (
	full = scale{
		layerRounds:     40,
		growth:          []int{10, 1000, 10_000, 100_000},
		growthRounds:    20,
		pulls:           []int{1, 5, 20, 60},
		layerSize:       4 << 20,
		pullRounds:      7,
		containerRounds: 60,
		gcImages:        1000,
		gcRounds:        2,
		startRounds:     9,
		settle:          2 * time.Second,
		memoryLayers:    10_000, memoryContainers: 1000,
		helperRounds: 100,
		waitPulls:    []int{1, 5, 20},
		waitRounds:   5,
		fullImages:   1000, fullContainers: 200,
		callRounds: 20,
		pods:       100, podRounds: 3,
	}
	short = scale{
		layerRounds:     2,
		growth:          []int{10, 1000},
		growthRounds:    2,
		pulls:           []int{1, 60},
		layerSize:       16 << 10,
		pullRounds:      1,
		containerRounds: 2,
		gcImages:        20,
		gcRounds:        1,
		startRounds:     1,
		settle:          100 * time.Millisecond,
		memoryLayers:    200, memoryContainers: 10,
		helperRounds: 3,
		waitPulls:    []int{1, 20},
		waitRounds:   1,
		fullImages:   20, fullContainers: 4,
		callRounds: 2,
		pods:       4, podRounds: 1,
	}
)

// bench is one run.
type bench struct {
	*report
	scale    scale
	dir      string // for all files
	binaries binaries
	reg      *registry.Registry
	node     *harness.Node
}

// binaries are the directories of the containerds that are compared.
type binaries struct {
	ours      string // with the plugin and the patches
	unpatched string // with the plugin alone
	stock     string
}

func main() {
	if runChild() {
		return
	}
	isShort := flag.Bool("short", false, "measure little, to see that everything works")
	out := flag.String("out", "", "the directory for results.md, results.json and pictures/; empty for none")
	only := flag.String("only", "", "which measurements to make: some of helper,layers,growth,gc,daemons,pulls,containers,waits,full,pods")
	flag.Parse()
	// Everything is cleaned up on Ctrl-C as well.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(ctx, *isShort, *only, *out); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, isShort bool, only, out string) error {
	if only != "" && out != "" {
		return errors.New("-out would replace the results of all measurements; leave out -only")
	}
	s := full
	if isShort {
		s = short
	}
	r := newReport(os.Stderr, isShort)
	err := measure(ctx, r, s, only)
	fmt.Println()
	// What there is when it fails is worth seeing too.
	if err := errors.Join(err, r.writeTable(os.Stdout)); err != nil || out == "" {
		return err
	}
	return r.save(out)
}

// measure makes measurements: those of a list of names, or all.
func measure(ctx context.Context, r *report, s scale, only string) (err error) {
	if err := log.SetLevel("error"); err != nil { // of containerd's packages
		return err
	}
	b := &bench{report: r, scale: s}
	if b.binaries, err = findBinaries(); err != nil {
		return err
	}
	if r.Versions, r.Patches, err = b.binaries.versions(ctx); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "gpb-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.reg, err = registry.Start(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.reg.Close()) }()

	for _, m := range []struct {
		name string
		make func(context.Context) error
	}{
		{"layers", b.layers},
		{"growth", b.growth},
		{"pulls", b.onNode(b.pulls)},
		{"containers", b.onNode(b.containers)},
		{"waits", b.onNode(b.waits)},
		{"full", b.full},
		{"pods", b.pods},
		{"gc", b.gc},
		{"daemons", b.daemons},
		{"helper", b.helper},
	} {
		if only != "" && !slices.Contains(strings.Split(only, ","), m.name) {
			continue
		}
		if err := m.make(ctx); err != nil {
			return fmt.Errorf("%s: %w", b.section, err)
		}
	}
	return nil
}

// onNode gives a measurement a node.
func (b *bench) onNode(measurement func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		b.node, err = harness.Start(ctx, harness.Options{
			Registry: b.reg, Binaries: b.binaries.ours, ExtraConfig: quiet,
		})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.node.Close()) }()
		if err := measurement(ctx); err != nil {
			return fmt.Errorf("%w\n%s", err, b.node.LogTail(10))
		}
		return nil
	}
}

// quiet is containerd's default log level, which the tests' nodes do not have.
const quiet = "[debug]\nlevel = \"info\"\n"

// findBinaries finds them in the source tree. GUEST_PULL_CONTAINERD may name
// another directory for this project's own, as for the tests.
func findBinaries() (binaries, error) {
	ours, err := harness.Binaries()
	if err != nil {
		return binaries{}, err
	}
	unpatched, err := harness.Peer("unpatched")
	if err != nil {
		return binaries{}, err
	}
	stock, err := harness.Peer("stock")
	if err != nil {
		return binaries{}, err
	}
	b := binaries{ours: ours, unpatched: unpatched, stock: stock}
	for what, dir := range map[string]string{"make build": b.ours, "make bench-binaries": b.unpatched, "make  bench-binaries": b.stock} {
		if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
			return b, fmt.Errorf("%w; run `%s`", err, what)
		}
	}
	return b, nil
}

// versions says what is compared: the versions, and the patches.
func (b binaries) versions(ctx context.Context) (versions, patches []string, err error) {
	out, err := exec.CommandContext(ctx, filepath.Join(b.ours, "containerd"), "guest-pull", "version").Output()
	if err != nil {
		return nil, nil, fmt.Errorf("ask %s for its version: %w", b.ours, err)
	}
	before, after, _ := strings.Cut(string(out), "patches:")
	for line := range strings.Lines(before) {
		versions = append(versions, strings.TrimSpace(line))
	}
	return versions, strings.Fields(after), nil
}
