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
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// Every other test ends with a look for leftovers, which is worth what it finds:
// each kind of leftover is planted here, seen, and taken away.
func TestLeftovers(t *testing.T) {
	ctx := CRI(t.Context())
	reg, err := registry.Start()
	require.NoError(t, err)
	defer reg.Close()
	n := New(t, Options{Registry: reg})
	require.NoError(t, n.CheckEmpty(ctx))

	requireSeen := func(what string) {
		t.Helper()
		found, err := n.Leftovers(ctx)
		require.NoError(t, err)
		require.Contains(t, strings.Join(found, "\n"), what)
	}
	lease, err := n.Client.LeasesService().Create(ctx, leases.WithID("planted-lease"), leases.WithExpiration(time.Minute))
	require.NoError(t, err)
	requireSeen("planted-lease")
	leased := leases.WithLease(ctx, lease.ID)
	require.NoError(t, content.WriteBlob(leased, n.Client.ContentStore(), "planted", strings.NewReader("planted"), ocispec.Descriptor{}))
	requireSeen("content sha256:")
	_, err = n.Client.SnapshotService(Snapshotter).Prepare(leased, "planted-snapshot", "")
	require.NoError(t, err)
	requireSeen("planted-snapshot")
	requireSeen(filepath.Join(n.SnapshotterRoot(Snapshotter), "snapshots"))
	_, err = n.Client.SnapshotService("overlayfs").View(leased, "planted-view", "")
	require.NoError(t, err)
	requireSeen("overlayfs snapshot View planted-view")
	var infos []snapshots.Info
	infos, err = n.Snapshots(ctx, "overlayfs")
	require.NoError(t, err)
	require.Len(t, infos, 1)

	require.NoError(t, unix.Mount("planted", n.shims(), "tmpfs", 0, ""))
	requireSeen("mount " + n.shims())
	require.NoError(t, os.WriteFile(filepath.Join(n.shims(), "planted-socket"), nil, 0o600))
	requireSeen("planted-socket")
	require.NoError(t, unix.Unmount(n.shims(), 0))

	cmd := exec.Command("sleep", "1000")
	cmd.Env = n.env()
	require.NoError(t, cmd.Start())
	requireSeen("sleep 1000")
	require.NoError(t, n.killProcesses(ctx))
	require.Error(t, cmd.Wait(), "the process was killed")

	pod, err := n.RunPod(ctx, PodSpec{Name: "planted-pod", Handler: Guest})
	require.NoError(t, err)
	requireSeen("pod planted-pod")
	requireSeen("image " + reg.Ref("pause:1"))
	requireSeen("process ")
	require.NoError(t, pod.Remove(ctx))

	require.NoError(t, n.Client.LeasesService().Delete(ctx, lease))
	require.NoError(t, n.Empty(ctx))
	require.NoError(t, n.CheckEmpty(ctx))
}

// Whatever state a node is in, Close ends all of it.
func TestClose(t *testing.T) {
	reg, err := registry.Start()
	require.NoError(t, err)
	defer reg.Close()
	for name, before := range map[string]func(*Node) error{
		"running": func(*Node) error { return nil },
		"stopped": (*Node).Down,
		"killed":  (*Node).Kill,
	} {
		t.Run(name, func(t *testing.T) {
			n, err := Start(t.Context(), Options{Registry: reg})
			require.NoError(t, err)
			_, err = n.RunPod(t.Context(), PodSpec{Handler: Guest})
			require.NoError(t, err)
			require.NoError(t, before(n))
			require.NoError(t, n.Close())
			require.Empty(t, n.processes())
			mounts, err := n.mounts()
			require.NoError(t, err)
			require.Empty(t, mounts)
			require.NoDirExists(t, n.Dir())
			cgroups, err := filepath.Glob("/sys/fs/cgroup/*" + n.CgroupParent())
			require.NoError(t, err)
			require.Empty(t, cgroups)
		})
	}
}

// Whoever runs the tests without the binaries is told which command makes them;
// a containerd that does not start says why.
func TestStartErrors(t *testing.T) {
	empty := t.TempDir()
	_, err := Start(t.Context(), Options{Binaries: empty})
	require.ErrorContains(t, err, filepath.Join(empty, "containerd"))
	require.ErrorContains(t, err, "GUEST_PULL_CONTAINERD")

	_, err = Start(t.Context(), Options{ExtraConfig: "not toml"})
	require.ErrorContains(t, err, "ExtraConfig")

	_, err = Start(t.Context(), Options{ExtraConfig: "oom_score = 'high'"})
	require.ErrorContains(t, err, "containerd ended")
	require.ErrorContains(t, err, "OOMScore")
}
