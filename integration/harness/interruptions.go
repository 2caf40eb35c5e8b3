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

package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/sandbox"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Interruptions counts what containerd leaves on a node when it ends in the middle
// of something, and passes over when it starts again. It leaves the same with runc
// on overlayfs: no snapshotter has to do with it.
type Interruptions struct {
	Leases    int // of pulls; they end by themselves, in containerd's design after a day
	Sandboxes int // that were not made, and have a lease only
	Bundles   int // hidden directories
	Ingests   int // directories of downloads that were not written down yet, or not any more
	Shims     int // that it had not written down yet
	States    int // of runc, of containers that have no process
	Networks  int // network namespaces of sandboxes that it had not written down yet
}

// Add adds what was left at another time.
func (i *Interruptions) Add(o Interruptions) {
	i.Leases += o.Leases
	i.Sandboxes += o.Sandboxes
	i.Bundles += o.Bundles
	i.Ingests += o.Ingests
	i.Shims += o.Shims
	i.States += o.States
	i.Networks += o.Networks
}

// ForgetInterruptions does to a node what time and a reboot do, and returns what it
// removed. It also runs the garbage collector. Whatever else is left stays. Nothing
// may be under way on the node.
func (n *Node) ForgetInterruptions(ctx context.Context) (Interruptions, error) {
	var i Interruptions
	err := errors.Join(n.removeLeases(ctx, &i), n.removeHiddenBundles(&i), n.removeHalfIngests(&i), n.GC(ctx))
	return i, errors.Join(err, n.endLostShims(ctx, &i), n.removeLostStates(&i), n.removeLostNetworks(ctx, &i), n.removeDeadSockets())
}

// removeLeases removes the leases that end by themselves, and those that CRI makes
// for a sandbox before the sandbox itself, without an end (containerd,
// internal/cri/server/sandbox_run.go). Any other lease without an end is an orphan.
func (n *Node) removeLeases(ctx context.Context, i *Interruptions) error {
	ctx = CRI(ctx)
	pods, err := n.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return wrap("ListPodSandbox", err)
	}
	service := n.Client.LeasesService()
	all, err := service.List(ctx)
	if err != nil {
		return err
	}
	for _, l := range all {
		isSandbox := len(l.Labels) == 0 && containerID.MatchString(l.ID)
		isPod := func(p *runtimeapi.PodSandbox) bool { return p.Id == l.ID }
		switch {
		case l.Labels["containerd.io/gc.expire"] != "":
			i.Leases++
		case isSandbox && !slices.ContainsFunc(pods.GetItems(), isPod):
			i.Sandboxes++
		default:
			continue
		}
		if err := service.Delete(ctx, leases.Lease{ID: l.ID}); err != nil {
			return err
		}
	}
	return nil
}

// removeHiddenBundles: containerd hides a bundle before it removes it
// (core/runtime/v2/bundle.go, atomicDelete), and passes hidden ones over when it
// starts.
func (n *Node) removeHiddenBundles(i *Interruptions) error {
	hidden := n.bundles(".*")
	var err error
	for _, dir := range hidden {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	i.Bundles += len(hidden)
	return err
}

// removeHalfIngests removes the directories of downloads without the file that says
// which. The content store writes it after it makes the directory, and removes it
// before (plugins/content/local/store.go); without it, the garbage collector logs
// "failed to read ingest ref" each time and leaves the directory.
func (n *Node) removeHalfIngests(i *Interruptions) error {
	ingests, err := filepath.Glob(n.join("root", "io.containerd.content.v1.content", "ingest", "*"))
	if err != nil {
		return err
	}
	for _, dir := range ingests {
		if _, err := os.Stat(filepath.Join(dir, "ref")); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		i.Ingests++
	}
	return nil
}

var (
	containerID = regexp.MustCompile(`^[0-9a-f]{64}$`)
	shimCommand = regexp.MustCompile(`^\S*/containerd-shim-\S+ .*-id ([0-9a-f]{64})( |$)`)
)

// endLostShims ends the shims that containerd started and, killed before it had
// written down their address, does not know. Those of pods that went away just now
// are given time to end.
func (n *Node) endLostShims(ctx context.Context, i *Interruptions) error {
	lost := func() []proc {
		return slices.DeleteFunc(n.processes(), func(p proc) bool {
			m := shimCommand.FindStringSubmatch(p.command)
			return m == nil || n.knows(m[1])
		})
	}
	killed := map[int]bool{}
	began := time.Now()
	return poll(ctx, func() error {
		left := lost()
		for _, p := range left {
			if time.Since(began) < 5*time.Second || killed[p.pid] {
				continue
			}
			if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
			killed[p.pid] = true
			i.Shims++
		}
		if len(left) > 0 {
			return fmt.Errorf("shims that containerd does not know do not end: %v", left)
		}
		return nil
	})
}

// removeLostStates removes what runc wrote down of containers whose creation was cut
// short.
func (n *Node) removeLostStates(i *Interruptions) error {
	states, err := filepath.Glob(n.join("runc", "*", "*"))
	if err != nil {
		return err
	}
	for _, dir := range states {
		if n.knows(filepath.Base(dir)) {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		i.States++
	}
	return nil
}

// removeDeadSockets removes the sockets on which no shim listens any more.
func (n *Node) removeDeadSockets() error {
	sockets, err := filepath.Glob(n.join("s", "*"))
	if err != nil {
		return err
	}
	for _, socket := range sockets {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			continue
		}
		if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// removeLostNetworks: containerd makes the network namespace of a sandbox and then
// writes its path down, which waits for the disk (internal/cri/server/sandbox_run.go,
// NewNetNS and the update of the sandbox store after it). One that no sandbox has
// written down goes with a reboot.
func (n *Node) removeLostNetworks(ctx context.Context, i *Interruptions) error {
	paths, err := filepath.Glob(n.join("state", "io.containerd.grpc.v1.cri", "netns", "*"))
	if err != nil || len(paths) == 0 {
		return err
	}
	sandboxes, err := n.Client.SandboxStore().List(CRI(ctx))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if slices.ContainsFunc(sandboxes, func(s sandbox.Sandbox) bool {
			for _, e := range s.Extensions {
				if bytes.Contains(e.GetValue(), []byte(path)) {
					return true
				}
			}
			return false
		}) {
			continue
		}
		i.Networks++
		err = errors.Join(err, unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	}
	return err
}

// knows reports whether containerd has a bundle for a container, or for a sandbox
// that a shim made.
func (n *Node) knows(id string) bool { return len(n.bundles(id)) > 0 }

// bundles returns the bundles in the state directory whose name matches a pattern.
func (n *Node) bundles(pattern string) (found []string) {
	for _, plugin := range []string{"io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"} {
		dirs, err := filepath.Glob(filepath.Join(n.State(), plugin, "*", pattern))
		if err != nil {
			panic(err) // the pattern is malformed
		}
		found = append(found, dirs...)
	}
	return found
}
