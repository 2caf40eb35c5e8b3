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

package integration_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// stockEnv names the directory of stock containerd, instead of the one that `make
// bench-binaries` builds.
const stockEnv = "GUEST_PULL_STOCK"

func stockBinaries(t *testing.T) string {
	t.Helper()
	dir := os.Getenv(stockEnv)
	if dir == "" {
		var err error
		dir, err = harness.Peer("stock")
		require.NoError(t, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
		t.Skipf("there is no stock containerd to move from and back to: %v; run `make bench-binaries`, or set %s", err, stockEnv)
	}
	return dir
}

// proxyDaemon is a guest-pull snapshotter of the older kind: a process of its own
// that containerd talks to through a socket, here in the test's process. What it
// does and what it leaves on disk is what those do: each layer is a row and a
// directory, under its chain ID.
type proxyDaemon struct {
	root   string
	socket string
	ms     *storage.MetaStore
	server *grpc.Server
}

func startProxyDaemon(t *testing.T, root, socket string) *proxyDaemon {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Join(root, "snapshots"), 0o700))
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	d := &proxyDaemon{root: root, socket: socket, ms: ms, server: grpc.NewServer()}
	snapshotsapi.RegisterSnapshotsServer(d.server, snapshotservice.FromSnapshotter(d))
	go d.server.Serve(l) // ends with Stop
	t.Cleanup(func() { d.stop(t) })
	return d
}

// stop is systemctl stop.
func (d *proxyDaemon) stop(t *testing.T) {
	d.server.Stop()
	require.NoError(t, d.ms.Close())
}

func (d *proxyDaemon) dir(id, name string) string {
	return filepath.Join(d.root, "snapshots", id, name)
}

func (d *proxyDaemon) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	var s storage.Snapshot
	err := d.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if s, err = storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, opts...); err != nil {
			return err
		}
		return errors.Join(os.MkdirAll(d.dir(s.ID, "fs"), 0o755), os.MkdirAll(d.dir(s.ID, "work"), 0o711))
	})
	if err != nil {
		return nil, err
	}
	if target, ok := info.Labels[snapshots.LabelSnapshotRef]; ok {
		if err := d.Commit(ctx, target, key, opts...); err != nil && !errdefs.IsAlreadyExists(err) {
			return nil, err
		}
		return nil, fmt.Errorf("target snapshot %q: %w", target, errdefs.ErrAlreadyExists)
	}
	return d.mounts(s)
}

func (d *proxyDaemon) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return d.Prepare(ctx, key, parent, opts...)
}

func (d *proxyDaemon) mounts(s storage.Snapshot) ([]mount.Mount, error) {
	var lower []string
	for _, id := range s.ParentIDs {
		lower = append(lower, d.dir(id, "fs"))
	}
	option, err := volume.GuestPull("guest-pull", map[string]string{}).Option()
	if err != nil {
		return nil, err
	}
	return []mount.Mount{{Type: "fuse.nydus-overlayfs-guest-pull", Source: "overlay", Options: []string{
		"workdir=" + d.dir(s.ID, "work"), "upperdir=" + d.dir(s.ID, "fs"), "lowerdir=" + strings.Join(lower, ":"), option,
	}}}, nil
}

func (d *proxyDaemon) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var s storage.Snapshot
	err := d.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		s, err = storage.GetSnapshot(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	return d.mounts(s)
}

func (d *proxyDaemon) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return d.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, err := storage.CommitActive(ctx, key, name, snapshots.Usage{Size: 4096, Inodes: 1}, opts...)
		return err
	})
}

func (d *proxyDaemon) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = d.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

func (d *proxyDaemon) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = d.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

func (d *proxyDaemon) Usage(context.Context, string) (snapshots.Usage, error) {
	return snapshots.Usage{Size: 4096, Inodes: 1}, nil
}

func (d *proxyDaemon) Remove(ctx context.Context, key string) error {
	return d.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, _, err := storage.Remove(ctx, key) // the directory stays, as theirs do
		return err
	})
}

func (d *proxyDaemon) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return d.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

func (d *proxyDaemon) Close() error { return nil }

// directories lists what a snapshotter's root has of snapshots.
func directories(t *testing.T, root string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(root, "snapshots", "*"))
	require.NoError(t, err)
	return found
}

// recorded lists the snapshots that containerd's database has of a snapshotter.
// Containerd has to be down: it need not know the snapshotter any more.
func recorded(t *testing.T, n *harness.Node, snapshotter string) (keys []string) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(n.Root(), "io.containerd.metadata.v1.bolt", "meta.db"), 0o600, &bolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	require.NoError(t, err)
	defer db.Close()
	require.NoError(t, db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("v1"))
		for _, name := range []string{harness.CRINamespace, "snapshots", snapshotter} {
			if b != nil {
				b = b.Bucket([]byte(name))
			}
		}
		if b == nil {
			return nil
		}
		return b.ForEach(func(k, _ []byte) error {
			keys = append(keys, string(k))
			return nil
		})
	}))
	return keys
}

// A node moves from stock containerd with a proxy daemon to this containerd, and
// later back to stock containerd with nothing. On the way its containers keep
// running, its images stay usable, and in the end nothing is left.
func TestMoveFromProxyDaemonAndBack(t *testing.T) {
	ctx := t.Context()
	stock := stockBinaries(t)
	reg := newRegistry(t)
	dir := t.TempDir()
	root := filepath.Join(dir, "containerd-guest-pull-grpc")
	daemon := startProxyDaemon(t, root, filepath.Join(dir, "proxy.sock"))
	const proxyPlugin = "[proxy_plugins.guest-pull]\ntype = \"snapshot\"\naddress = %q\n"

	// With the daemon.
	n := harness.New(t, harness.Options{
		Registry: reg, Binaries: stock, PullHint: harness.HintImageSpec,
		// What its documentation has one set; containerd's CRI then pulls by itself.
		ExtraConfig: fmt.Sprintf(proxyPlugin, daemon.socket) + "[plugins.'io.containerd.cri.v1.images']\ndisable_snapshot_annotations = false\n",
	})
	app := push(t, reg, images.Spec{Name: "app", Layers: 4})
	late := push(t, reg, images.Spec{Name: "late", Layers: 3})
	plain := push(t, reg, images.Spec{Name: "plain", Layers: 2})
	// Stock containerd has one pause image for both kinds of pods only if runc's
	// comes first.
	runcPod := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
	runcContainer := run(t, runcPod, harness.ContainerSpec{Image: plain.Ref})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	runs := run(t, pod, harness.ContainerSpec{Image: app.Ref})
	created, err := pod.Create(ctx, harness.ContainerSpec{Image: app.Ref})
	require.NoError(t, err)
	requireRuns(t, runs, app)
	requireRuns(t, runcContainer, plain)
	require.Empty(t, n.Blobs(app.Layers[1:]...))
	before, err := runs.Status(ctx)
	require.NoError(t, err)
	require.Greater(t, len(directories(t, root)), len(app.Layers), "this daemon keeps a directory for each layer")

	// To this containerd.
	require.NoError(t, n.Down())
	daemon.stop(t)
	ours, err := harness.Binaries()
	require.NoError(t, err)
	require.NoError(t, n.Reconfigure(ctx, func(o *harness.Options) { o.Binaries = ours }))
	r := check(t, n)
	require.True(t, r.has("proxy-plugin"), "the section that has to go: %+v", r.errors())
	require.NoError(t, n.Reconfigure(ctx, func(o *harness.Options) {
		o.ExtraConfig = ""
		o.PluginConfig = fmt.Sprintf("root_path = %q\n", root)
		if len(n.Patches()) > 0 {
			o.PullHint = harness.HintNone
		}
	}))
	require.Empty(t, check(t, n).errors())
	require.NoError(t, n.Up(ctx))
	require.Empty(t, check(t, n).errors())

	reg.Reset()
	after, err := runs.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, after.State)
	require.Equal(t, before.StartedAt, after.StartedAt)
	requireRuns(t, runs, app)
	requireRuns(t, runcContainer, plain)
	require.NoError(t, created.Start(ctx))
	requireRuns(t, created, app)
	// The image is used without another pull, in the old pod and in a new one.
	requireRuns(t, run(t, pod, harness.ContainerSpec{Image: app.Ref, PullPolicy: harness.Never}), app)
	fresh := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, fresh, harness.ContainerSpec{Image: app.Ref, PullPolicy: harness.Never})
	requireRuns(t, c, app)
	require.ElementsMatch(t, app.Layers, reg.Log().By(registry.Guest).Of(registry.Layer).OK().In(app.Name).References())
	mounts, err := n.Mounts(ctx, c.ID)
	require.NoError(t, err)
	require.Equal(t, app.ChainID, decodeVolume(t, mounts[0].Options).ImagePull.Metadata[volume.MetadataChainID])
	require.Empty(t, reg.Log().By(registry.Host), "the host pulled again")
	requireRuns(t, run(t, fresh, harness.ContainerSpec{Image: late.Ref}), late)
	require.Empty(t, reg.Log().By(registry.Host).Of(registry.Layer).References())

	// What the daemon left goes with its last user.
	require.NoError(t, runs.Stop(ctx, 10*time.Second))
	require.NoError(t, pod.Remove(ctx))
	require.NoError(t, fresh.Remove(ctx))
	lateDigest, err := late.Digest()
	require.NoError(t, err)
	for _, i := range status(t, n).Images {
		if i.Digest != lateDigest.String() {
			require.NoError(t, n.RemoveImage(ctx, i.Name))
		}
	}
	require.NoError(t, n.GC(ctx))
	require.Equal(t, app.Layers[0], late.Layers[0])
	require.Len(t, directories(t, root), 1, "of the layer that another image has in common with the removed one")
	for _, s := range status(t, n).Snapshots {
		t.Errorf("snapshot %s of container %q is left", s.Key, s.Container)
	}

	// Back to stock containerd, without any guest-pull snapshotter. One image
	// was forgotten.
	require.NoError(t, n.Down())
	require.NoError(t, n.Reconfigure(ctx, func(o *harness.Options) {
		o.Binaries, o.GuestSnapshotter, o.PluginConfig, o.PullHint = stock, "overlayfs", "", harness.HintImageSpec
	}))
	require.NoError(t, n.Up(ctx))
	requireRuns(t, runcContainer, plain)
	requireRuns(t, run(t, runPod(t, n, harness.PodSpec{Handler: harness.Runc}), harness.ContainerSpec{Image: plain.Ref, PullPolicy: harness.Never}), plain)
	require.NoError(t, n.RemoveImage(ctx, late.Ref))
	require.NoError(t, n.GC(ctx))
	requireRuns(t, run(t, runcPod, harness.ContainerSpec{Image: late.Ref}), late)
	require.NoError(t, n.Empty(ctx))
	require.NoError(t, n.CheckEmpty(ctx))
	require.NoError(t, n.Down())
	require.Empty(t, recorded(t, n, harness.Snapshotter), "in containerd's database")
	require.NoError(t, os.RemoveAll(root), "the last step")
	require.NoError(t, n.Up(ctx))
}

// A node moves to another line of containerd, and back, with pods of both kinds that
// run and with images. Each containerd opens the databases of the other.
func TestMoveBetweenLines(t *testing.T) {
	others, err := harness.OtherLines()
	require.NoError(t, err)
	if len(others) == 0 {
		t.Skip("there is no containerd of another line to move to; run `make other-lines`")
	}
	own, err := harness.Binaries()
	require.NoError(t, err)
	for _, other := range others {
		t.Run(filepath.Base(filepath.Dir(other)), func(t *testing.T) {
			ctx := t.Context()
			reg := newRegistry(t)
			n := harness.New(t, harness.Options{Registry: reg})
			app := push(t, reg, images.Spec{Name: "app", Layers: 4})
			both := push(t, reg, images.Spec{Name: "both", Layers: 3})
			type running struct {
				pod *harness.Pod
				c   *harness.Container
				img image
			}
			var all []running
			start := func(handler string, img image, policy harness.PullPolicy) {
				t.Helper()
				pod := runPod(t, n, harness.PodSpec{Handler: handler})
				c := run(t, pod, harness.ContainerSpec{Image: img.Ref, PullPolicy: policy})
				requireRuns(t, c, img)
				all = append(all, running{pod, c, img})
			}
			start(harness.Guest, app, harness.IfNotPresent)
			start(harness.Guest, both, harness.IfNotPresent)
			start(harness.Runc, both, harness.IfNotPresent)
			reg.Reset()

			for _, to := range []string{other, own} {
				require.NoError(t, n.Down())
				require.NoError(t, n.Reconfigure(ctx, func(o *harness.Options) { o.Binaries = to }))
				require.NoError(t, n.Up(ctx))
				require.Empty(t, check(t, n).errors())
				for _, r := range all {
					requireRuns(t, r.c, r.img)
				}
				// All images are there: for the pods that run, and for new ones.
				again := run(t, all[0].pod, harness.ContainerSpec{Image: app.Ref, PullPolicy: harness.Never})
				requireRuns(t, again, app)
				start(harness.Guest, app, harness.Never)
				start(harness.Guest, both, harness.Never)
				start(harness.Runc, both, harness.Never)
				require.Empty(t, reg.Log().By(registry.Host), "the host pulled again")
				// What the one made, the other removes.
				require.NoError(t, again.Stop(ctx, 10*time.Second))
				require.NoError(t, all[0].pod.Remove(ctx))
				all = all[1:]
			}
			require.NoError(t, n.Empty(ctx))
			require.NoError(t, n.CheckEmpty(ctx))
		})
	}
}
