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
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// CRI returns a context for CRI's containerd namespace.
func CRI(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, CRINamespace)
}

// Mounts returns the mounts of a CRI container's root file system, as the
// snapshotter gives them.
func (n *Node) Mounts(ctx context.Context, containerID string) ([]mount.Mount, error) {
	ctx = CRI(ctx)
	c, err := n.Client.ContainerService().Get(ctx, containerID)
	if err != nil {
		return nil, err
	}
	return n.Client.SnapshotService(c.Snapshotter).Mounts(ctx, c.SnapshotKey)
}

// Record returns what the stand-in guest wrote down of a container.
func (n *Node) Record(namespace, containerID string) (guest.Record, error) {
	return guest.ReadRecord(n.records(), namespace, containerID)
}

// Snapshots lists the snapshots of a snapshotter in the context's namespace.
func (n *Node) Snapshots(ctx context.Context, snapshotter string) ([]snapshots.Info, error) {
	var infos []snapshots.Info
	err := n.Client.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		infos = append(infos, i)
		return nil
	})
	return infos, err
}

// Blobs returns which of these digests are in the content store, in whatever
// namespace: it looks for the files.
func (n *Node) Blobs(digests ...string) []string {
	return slices.DeleteFunc(slices.Clone(digests), func(d string) bool {
		algorithm, hex, _ := strings.Cut(d, ":")
		_, err := os.Stat(filepath.Join(n.root(), "io.containerd.content.v1.content", "blobs", algorithm, hex))
		return err != nil
	})
}

// GC runs containerd's garbage collector and returns when it is done.
func (n *Node) GC(ctx context.Context) error {
	ctx = CRI(ctx)
	l := n.Client.LeasesService()
	lease, err := l.Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Minute))
	if err != nil {
		return err
	}
	return l.Delete(ctx, lease, leases.SynchronousDelete)
}

// Empty removes all pods, containers and images, in the way that kubelet and
// other well behaved clients do, and runs the garbage collector.
func (n *Node) Empty(ctx context.Context) error {
	err := errors.Join(n.removePods(ctx), n.removeContainers(ctx), n.removeImages(ctx))
	return errors.Join(err, n.GC(ctx))
}

func (n *Node) removePods(ctx context.Context) error {
	pods, err := n.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return wrap("ListPodSandbox", err)
	}
	var errs []error
	for _, p := range pods.GetItems() {
		errs = append(errs, (&Pod{ID: p.Id, node: n}).Remove(ctx))
	}
	return errors.Join(errs...)
}

// removeContainers removes what other clients than CRI have made.
func (n *Node) removeContainers(ctx context.Context) error {
	return n.eachNamespace(ctx, func(ctx context.Context) error {
		containers, err := n.Client.Containers(ctx)
		if err != nil {
			return err
		}
		var errs []error
		for _, c := range containers {
			task, err := c.Task(ctx, nil)
			if err == nil {
				_, err = task.Delete(ctx, containerd.WithProcessKill)
			}
			if err != nil && !errdefs.IsNotFound(err) {
				errs = append(errs, err)
			}
			errs = append(errs, c.Delete(ctx, containerd.WithSnapshotCleanup))
		}
		return errors.Join(errs...)
	})
}

func (n *Node) removeImages(ctx context.Context) error {
	images, err := n.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return wrap("ListImages", err)
	}
	var errs []error
	for _, i := range images.GetImages() {
		errs = append(errs, n.RemoveImage(ctx, i.Id))
	}
	errs = append(errs, n.eachNamespace(ctx, func(ctx context.Context) error {
		images, err := n.Client.ImageService().List(ctx)
		if err != nil {
			return err
		}
		var errs []error
		for _, i := range images {
			if err := n.Client.ImageService().Delete(ctx, i.Name); err != nil && !errdefs.IsNotFound(err) {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	}))
	return errors.Join(errs...)
}

func (n *Node) eachNamespace(ctx context.Context, f func(context.Context) error) error {
	all, err := n.Client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, ns := range all {
		if err := f(namespaces.WithNamespace(ctx, ns)); err != nil {
			errs = append(errs, fmt.Errorf("namespace %s: %w", ns, err))
		}
	}
	return errors.Join(errs...)
}

// Leftovers lists what an empty node must not have, one line each: the
// [Node.Objects]; directories of them on disk, sockets, mounts, processes and
// cgroups. It is nil for a node that is as it was when it was new. Containerd has to
// be running.
func (n *Node) Leftovers(ctx context.Context) ([]string, error) {
	found, err := n.Objects(ctx)
	if err != nil {
		return nil, err
	}
	report := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for _, pattern := range []string{
		n.join("root", "io.containerd.content.v1.content", "blobs", "*", "*"),
		n.join("root", "io.containerd.content.v1.content", "ingest", "*"),
		n.join("root", "io.containerd.grpc.v1.cri", "*", "*"),
		n.join("state", "io.containerd.grpc.v1.cri", "*", "*"),
		n.join("root", "io.containerd.runtime.v2.task", "*", "*"),
		n.join("state", "io.containerd.runtime.v2.task", "*", "*"),
		n.join("root", "io.containerd.snapshotter.v1.*", "snapshots", "*"),
		n.join("runc", "*", "*"),
		n.join("s", "*"),
		n.join("tmp", "*"),
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			within := ""
			if strings.HasPrefix(filepath.Base(p), ".") {
				// A bundle whose removal did not come to its end: what kept it?
				entries, _ := os.ReadDir(p)
				within = fmt.Sprintf(", with %v", entries)
			}
			report("file %s%s", p, within)
		}
	}
	mounts, err := n.mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		report("mount %s (%s)", m.Mountpoint, m.FSType)
	}
	for _, p := range n.processes() {
		report("process %s", p)
	}
	return found, nil
}

// Objects lists what containerd says that it has, one line each: pods, containers,
// images, snapshots, content, leases.
func (n *Node) Objects(ctx context.Context) ([]string, error) {
	var found []string
	report := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }

	pods, err := n.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	for _, p := range pods.GetItems() {
		report("pod %s (%s)", p.Metadata.Name, p.State)
	}
	containers, err := n.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	for _, c := range containers.GetContainers() {
		report("CRI container %s (%s)", c.Metadata.Name, c.State)
	}

	snapshotters, err := n.snapshotters(ctx)
	if err != nil {
		return nil, err
	}
	err = n.eachNamespace(ctx, func(ctx context.Context) error {
		ns, _ := namespaces.Namespace(ctx)
		containers, err := n.Client.ContainerService().List(ctx)
		if err != nil {
			return err
		}
		for _, c := range containers {
			report("%s: container %s", ns, c.ID)
		}
		images, err := n.Client.ImageService().List(ctx)
		if err != nil {
			return err
		}
		for _, i := range images {
			report("%s: image %s", ns, i.Name)
		}
		leases, err := n.Client.LeasesService().List(ctx)
		if err != nil {
			return err
		}
		for _, l := range leases {
			report("%s: lease %s %v", ns, l.ID, l.Labels)
		}
		for _, s := range snapshotters {
			infos, err := n.Snapshots(ctx, s)
			if err != nil {
				return fmt.Errorf("snapshotter %s: %w", s, err)
			}
			for _, i := range infos {
				report("%s: %s snapshot %s %s (parent %q)", ns, s, i.Kind, i.Name, i.Parent)
			}
		}
		return n.Client.ContentStore().Walk(ctx, func(i content.Info) error {
			report("%s: content %s (%d bytes) %v", ns, i.Digest, i.Size, i.Labels)
			return nil
		})
	})
	return found, err
}

// CheckEmpty is nil when the node has no [Node.Leftovers]. What is removed in
// the background is given time.
func (n *Node) CheckEmpty(ctx context.Context) error {
	return poll(ctx, func() error {
		found, err := n.Leftovers(ctx)
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("left over on the node:\n  %s", strings.Join(found, "\n  "))
		}
		return err
	})
}

// snapshotters names the snapshotters that work on this machine.
func (n *Node) snapshotters(ctx context.Context) ([]string, error) {
	r, err := n.Client.IntrospectionService().Plugins(ctx, "type==io.containerd.snapshotter.v1")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range r.GetPlugins() {
		if p.InitErr == nil {
			names = append(names, p.ID)
		}
	}
	return names, nil
}

func (n *Node) mounts() ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(mountinfo.PrefixFilter(n.dir))
}

func (n *Node) unmountAll() error {
	mounts, err := n.mounts()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

type proc struct {
	pid     int
	command string
}

func (p proc) String() string { return fmt.Sprintf("%d: %s", p.pid, p.command) }

// processes finds the processes that the node has started, however they are
// related: they have its mark in their environment, or are in its cgroups.
// Containerd itself is not among them.
func (n *Node) processes() []proc {
	var found []proc
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is fine
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == n.Pid() || pid == os.Getpid() {
			continue
		}
		// Whatever cannot be read is gone.
		env, _ := os.ReadFile(filepath.Join(dir, "environ"))   // see above
		cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup")) // see above
		if !slices.ContainsFunc(bytes.Split(env, []byte{0}), func(v []byte) bool { return string(v) == markEnv+"="+n.id }) &&
			!bytes.Contains(cgroup, []byte(n.CgroupParent()+"/")) {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline")) // see above
		if len(cmdline) > 0 {
			found = append(found, proc{pid, strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))})
		}
	}
	return found
}

// killProcesses kills what is left of the node's processes. It looks several
// times, as a process may be starting another one.
func (n *Node) killProcesses(ctx context.Context) error {
	return poll(ctx, func() error {
		left := n.processes()
		for _, p := range left {
			syscall.Kill(p.pid, syscall.SIGKILL) // looked at again
		}
		if len(left) > 0 {
			return fmt.Errorf("processes do not end: %v", left)
		}
		return nil
	})
}

// removeCgroups removes the parent of the pods' cgroups, from every hierarchy.
// On a real node that is kubelet's work.
func (n *Node) removeCgroups(ctx context.Context) error {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return err
	}
	return poll(ctx, func() error {
		var errs []error
		for _, m := range mounts {
			errs = append(errs, RemoveCgroup(filepath.Join(m.Mountpoint, n.id)))
		}
		return errors.Join(errs...)
	})
}

// MakeCgroup makes the pod's cgroup in every hierarchy, as kubelet does. Runtimes make
// it if it is not there, but for a guest that does nothing (guest.Config.Idle).
func (p *Pod) MakeCgroup() error {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	for _, m := range mounts {
		err = errors.Join(err, os.MkdirAll(filepath.Join(m.Mountpoint, p.Config.Linux.CgroupParent), 0o755))
	}
	return err
}

// RemoveCgroup removes a cgroup, by its directory, and those below it. Only
// directories can be removed: the files of a cgroup go with it.
func RemoveCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	for _, d := range slices.Backward(dirs) {
		if rmErr := unix.Rmdir(d); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("rmdir %s: %w", d, rmErr))
		}
	}
	return err
}

// Transactions returns how many transactions a bbolt database has committed so far.
// Each one writes pages and waits for the disk twice. Nobody else may have the
// database open.
func Transactions(path string) (int, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	id := 0
	err = db.View(func(tx *bolt.Tx) error {
		id = tx.ID()
		return nil
	})
	return id, errors.Join(err, db.Close())
}
