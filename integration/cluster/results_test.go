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
package cluster_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// resultsEnv names the file that the table of cases and results is written to.
const resultsEnv = "GUEST_PULL_RESULTS"

// results collects what the table says.
var results table

type table struct {
	mu         sync.Mutex
	rows       []*row
	containerd string
	patches    []string
	runtime    string
	// Those of a machine; "" stands for this machine's.
	runc, linux string
}

type row struct {
	part, what string
	result     string
	took       time.Duration
}

// The parts of the table.
const (
	functional     = "Functional"
	compatibility  = "Compatibility"
	stability      = "Stability"
	authentication = "Authentication"
	housekeeping   = "Housekeeping"
	wholeNode      = "A whole node"
	stock          = "Stock containerd"
)

var parts = []string{functional, compatibility, stability, authentication, housekeeping, wholeNode, stock}

// record makes the test a row of the table: "part: what".
func record(t *testing.T, part, what string) {
	t.Helper()
	r := &row{part: part, what: what}
	results.mu.Lock()
	results.rows = append(results.rows, r)
	results.mu.Unlock()
	start := time.Now()
	t.Cleanup(func() {
		results.mu.Lock()
		defer results.mu.Unlock()
		r.took = time.Since(start)
		switch {
		case t.Failed():
			r.result = "FAIL"
		case t.Skipped():
			r.result = "not run"
		case part == stock:
			r.result = "seen"
		default:
			r.result = "pass"
		}
	})
}

// see notes the versions of a node.
func (r *table) see(n *harness.Node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.patches = n.Patches()
	r.runtime = n.RuntimeType()
	r.containerd = "unknown"
	if v, err := n.Client.Version(context.Background()); err == nil {
		r.containerd = v.Version
	}
}

// seeMachine notes the versions of a machine.
func (r *table) seeMachine(t *testing.T, n *machineNode) {
	t.Helper()
	_, patches, _ := strings.Cut(n.sh(t, "containerd guest-pull version"), "\npatches:\n")
	lines := strings.Split(n.sh(t, "containerd --version | cut -d' ' -f3; runc --version | sed -n 's/^runc version //p'; uname -r"), "\n")
	require.Len(t, lines, 4)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.patches, r.runtime = strings.Fields(patches), harness.StandIn
	r.containerd, r.runc, r.linux = lines[0], lines[1], lines[2]
}

// report prints the table and writes it to the file that resultsEnv names.
func (r *table) report(ctx context.Context, bin cluster.Binaries) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ran := false
	for _, row := range r.rows {
		ran = ran || row.result != "not run"
	}
	if !ran {
		return nil
	}
	versions, err := bin.Versions(ctx)
	if err != nil {
		return err
	}
	runc, linux := r.runc, r.linux
	if linux == "" {
		var uname unix.Utsname
		if err := unix.Uname(&uname); err != nil {
			return err
		}
		linux = unix.ByteSliceToString(uname.Release[:])
		runc = "unknown"
		if out, err := exec.CommandContext(ctx, "runc", "--version").Output(); err == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			runc = strings.TrimPrefix(first, "runc version ")
		}
	}
	patches := "no patches"
	if len(r.patches) > 0 {
		patches = fmt.Sprintf("%d patches", len(r.patches))
	}

	var b strings.Builder
	kubernetes := versions["kubelet"] + " (kubelet and kube-apiserver"
	if api := versions["kube-apiserver"]; api != versions["kubelet"] {
		kubernetes = versions["kubelet"] + " (kubelet; kube-apiserver " + api
	}
	gates := "default feature gates"
	if g := os.Getenv(gatesEnv); g != "" {
		gates = "feature gates " + g
	}
	fmt.Fprintf(&b, "Kubernetes %s, %s), etcd %s, containerd %s with %s, runtime %s, runc %s, Linux %s.\n\n",
		kubernetes, gates, versions["etcd"], strings.TrimPrefix(r.containerd, "v"), patches, r.runtime, runc, linux)
	fmt.Fprintf(&b, "| part | case | result | time |\n|---|---|---|---|\n")
	slices.SortStableFunc(r.rows, func(a, b *row) int {
		return slices.Index(parts, a.part) - slices.Index(parts, b.part)
	})
	for _, row := range r.rows {
		if row.result == "not run" {
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %.0f s |\n", row.part, row.what, row.result, row.took.Seconds())
	}
	fmt.Print("\n", b.String(), "\n")
	path := os.Getenv(resultsEnv)
	if path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}
