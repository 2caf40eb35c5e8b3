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
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/figures"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// A database that cannot be used makes containerd say so and serve no CRI, as it
// does for any snapshotter of its own: the node is NotReady, and its containers run
// on. The log names the file and the remedy, and the remedy works: nothing of the
// images is lost by it.
func TestDamagedDatabase(t *testing.T) {
	for _, damage := range []struct {
		name string
		do   func(t *testing.T, db string) (undo func())
	}{
		{"truncated to nothing but half a page", func(t *testing.T, db string) func() {
			require.NoError(t, os.Truncate(db, 2048))
			return nil
		}},
		{"truncated in the middle", func(t *testing.T, db string) func() {
			info, err := os.Stat(db)
			require.NoError(t, err)
			require.NoError(t, os.Truncate(db, info.Size()/2))
			return nil
		}},
		{"garbage", func(t *testing.T, db string) func() {
			require.NoError(t, os.WriteFile(db, []byte(strings.Repeat("not a database\n", 4096)), 0o600))
			return nil
		}},
		{"a directory", func(t *testing.T, db string) func() {
			require.NoError(t, os.Remove(db))
			require.NoError(t, os.Mkdir(db, 0o700))
			return nil
		}},
		{"read-only", func(t *testing.T, db string) func() {
			require.NoError(t, unix.Mount(db, db, "", unix.MS_BIND, ""))
			require.NoError(t, unix.Mount("", db, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			return func() { require.NoError(t, unix.Unmount(db, 0)) }
		}},
	} {
		t.Run(damage.name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := newNode(t, harness.Options{})
			img := push(t, reg, images.Spec{Name: "app", Layers: 3})
			old := run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, old, img)
			before, err := old.Status(ctx)
			require.NoError(t, err)
			require.NoError(t, n.Kill())
			db := filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "metadata.db")
			undo := damage.do(t, db)
			count(t, figures.Faults, 1)

			err = n.Up(ctx)
			require.Error(t, err, "the snapshotter started on a database that it cannot use")
			log := logged(t, n, "msg=\"failed to load plugin\"")
			require.NotEmpty(t, log)
			t.Logf("the log: %s", log[0])
			require.Contains(t, log[0], db)
			remedy := "move the file away and restart containerd"
			if undo != nil {
				remedy = "make it writable and restart containerd"
			}
			require.Contains(t, log[0], remedy)
			require.NotContains(t, log[0], "goroutine ", "a stack is no message")

			require.NoError(t, n.Down())
			if undo != nil {
				undo()
			} else {
				require.NoError(t, os.Rename(db, filepath.Join(t.TempDir(), "metadata.db")))
			}
			require.NoError(t, n.Up(ctx))
			reg.Reset()
			requireRuns(t, old, img)
			after, err := old.Status(ctx)
			require.NoError(t, err)
			require.Equal(t, before.StartedAt, after.StartedAt)
			fresh := run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
			requireRuns(t, fresh, img)
			require.Empty(t, reg.Log().By(registry.Host), "the host had to pull again")
		})
	}
}

// logged returns the lines of containerd's log that have a text.
func logged(t *testing.T, n *harness.Node, text string) []string {
	t.Helper()
	b, err := os.ReadFile(n.LogFile())
	require.NoError(t, err)
	var found []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, text) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// smallDisk is a file system of 1 MiB for the snapshotter's root.
type smallDisk struct {
	t    *testing.T
	path string
}

func newSmallDisk(t *testing.T) smallDisk {
	t.Helper()
	dir, err := os.MkdirTemp("", "gp-disk-") //nolint:usetesting // t.TempDir gives long paths with characters that mount options cannot have
	require.NoError(t, err)
	require.NoError(t, unix.Mount("gp-disk", dir, "tmpfs", 0, "size=1m,nr_inodes=2000,mode=0700"))
	t.Cleanup(func() {
		assert.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
		assert.NoError(t, os.Remove(dir))
	})
	return smallDisk{t, dir}
}

func (d smallDisk) filler() string { return filepath.Join(d.path, "filler") }

// fill takes all space that is left, and all inodes if asked.
func (d smallDisk) fill(inodes bool) {
	d.t.Helper()
	f, err := os.Create(d.filler())
	require.NoError(d.t, err)
	defer f.Close()
	block := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(block)
	}
	require.ErrorIs(d.t, err, unix.ENOSPC)
	if !inodes {
		return
	}
	require.NoError(d.t, os.Truncate(d.filler(), 0))
	err = nil
	for i := 0; err == nil; i++ {
		err = os.WriteFile(d.filler()+strconv.Itoa(i), nil, 0o600)
	}
	require.ErrorIs(d.t, err, unix.ENOSPC)
}

func (d smallDisk) free() {
	d.t.Helper()
	fillers, err := filepath.Glob(d.filler() + "*")
	require.NoError(d.t, err)
	for _, f := range fillers {
		require.NoError(d.t, os.Remove(f))
	}
}

// With its disk full, the snapshotter pulls images (they need no space), says "no
// space left on device" where space is needed, and removes what it is told to
// remove at once or, if even that needs space, when there is some again. What was
// running runs on. Afterwards, everything works and nothing is left of what
// failed.
func TestFullDisk(t *testing.T) {
	for name, inodes := range map[string]bool{"blocks": false, "inodes": true} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			disk := newSmallDisk(t)
			n, reg := newNode(t, harness.Options{PluginConfig: fmt.Sprintf("root_path = %q", disk.path)})
			img := push(t, reg, images.Spec{Name: "app", Layers: 5})
			late := push(t, reg, images.Spec{Name: "late", Layers: 20, LayerSize: 1 << 10})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			old := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, old, img)
			created, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)
			doomed, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)
			before := snapshotDirs(t, disk.path)

			disk.fill(inodes)
			for _, step := range []struct {
				name string
				do   func() error
				full bool // needs space
			}{
				{"pull", func() error { _, err := pod.Pull(ctx, late.Ref); return err }, false},
				{"start a created container", func() error { return created.Start(ctx) }, false},
				{"exec", func() error { _, err := old.Exec(ctx, "true"); return err }, false},
				{"create", func() error { _, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref}); return err }, true},
				{"run a pod", func() error { _, err := n.RunPod(ctx, harness.PodSpec{Handler: harness.Guest}); return err }, true},
				{"collect", func() error { return n.GC(ctx) }, false},
				{"restart", func() error { return errors.Join(n.Signal(syscall.SIGKILL), n.Up(ctx)) }, false},
				{"create after a restart", func() error { _, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref}); return err }, true},
			} {
				err := step.do()
				count(t, figures.Faults, 1)
				if step.full {
					require.ErrorContains(t, err, "no space left on device", step.name)
					require.ErrorContains(t, err, disk.path, step.name)
					t.Logf("%s: %v", step.name, err)
				} else {
					require.NoError(t, err, step.name)
				}
			}
			requireRuns(t, old, img)
			requireRuns(t, created, img)
			// May need space: kubelet tries again.
			if err := doomed.Remove(ctx); err != nil {
				require.ErrorContains(t, err, "no space left on device")
				disk.free()
				require.NoError(t, doomed.Remove(ctx))
			}
			disk.free()

			require.NoError(t, n.GC(ctx))
			requireSnapshotDirs(t, disk.path, len(before)-1)
			requireRuns(t, run(t, pod, harness.ContainerSpec{Image: late.Ref, PullPolicy: harness.Never}), late)
			requireRuns(t, run(t, runPod(t, n, harness.PodSpec{Handler: harness.Guest}), harness.ContainerSpec{Image: img.Ref}), img)

			require.NoError(t, n.Empty(ctx))
			requireSnapshotDirs(t, disk.path, 0)
		})
	}
}

func snapshotDirs(t *testing.T, root string) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(root, "snapshots", "*"))
	require.NoError(t, err)
	return dirs
}

// requireSnapshotDirs holds that this many snapshots have a directory. What is
// removed in the background is given time.
func requireSnapshotDirs(t *testing.T, root string, want int) {
	t.Helper()
	var dirs []string
	for range 100 {
		if dirs = snapshotDirs(t, root); len(dirs) == want {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	require.Len(t, dirs, want, "directories of snapshots")
}

// tree lists what is below a directory.
func tree(t *testing.T, root string) []string {
	t.Helper()
	var all []string
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if path != root {
			all = append(all, path)
		}
		return err
	}))
	return all
}

// usage is what a containerd holds.
type usage struct {
	entries   int // files and directories of the plugin
	files     int // open file descriptors
	memory    int // resident, in KiB
	databases map[string]int64
}

func measure(t *testing.T, n *harness.Node) usage {
	t.Helper()
	require.NoError(t, n.GC(t.Context()))
	u := usage{entries: len(tree(t, n.SnapshotterRoot(harness.Snapshotter))), databases: map[string]int64{}}
	proc := fmt.Sprintf("/proc/%d", n.Pid())
	fds, err := os.ReadDir(proc + "/fd")
	require.NoError(t, err)
	u.files = len(fds)
	status, err := os.ReadFile(proc + "/status")
	require.NoError(t, err)
	_, rss, found := strings.Cut(string(status), "VmRSS:")
	require.True(t, found)
	u.memory, err = strconv.Atoi(strings.Fields(rss)[0])
	require.NoError(t, err)
	for _, db := range []string{
		filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "metadata.db"),
		filepath.Join(n.Root(), "io.containerd.metadata.v1.bolt", "meta.db"),
	} {
		info, err := os.Stat(db)
		require.NoError(t, err)
		u.databases[filepath.Base(db)] = info.Size()
	}
	return u
}

// Containers come and go for as long as a node lives. A thousand of them must
// leave it as it was: no directory, no inode, no descriptor, no memory, and no
// database that goes on growing.
//
// GUEST_PULL_CONTAINERS is how many of them there are at once. The first lot
// warms up pools and databases, which keep their free pages; a second one must
// need no more.
func TestManyContainers(t *testing.T) {
	many := int(envNumber(t, "GUEST_PULL_CONTAINERS", 100))
	ctx := t.Context()
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 20, LayerSize: 1 << 10})
	drainEvents(t, n)
	const perPod = 25
	pods := make([]*harness.Pod, many/perPod)
	for i := range pods {
		pods[i] = runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	}
	_, err := pods[0].Pull(ctx, img.Ref)
	require.NoError(t, err)

	lot := func() {
		containers := make(chan *harness.Container, many)
		todo := make(chan *harness.Pod, many)
		for i := range many {
			todo <- pods[i%len(pods)]
		}
		close(todo)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for pod := range todo {
					c, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never})
					if assert.NoError(t, err) {
						containers <- c
					}
				}
			})
		}
		all.Wait()
		close(containers)
		require.Len(t, containers, many)
		snapshots, err := n.Snapshots(harness.CRI(ctx), harness.Snapshotter)
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(snapshots), many)
		for c := range containers {
			require.NoError(t, c.Remove(ctx))
		}
	}
	empty := measure(t, n)
	lot()
	warm := measure(t, n)
	lot()
	after := measure(t, n)
	t.Logf("%d containers, twice: %+v, %+v, %+v", many, empty, warm, after)
	require.Equal(t, empty.entries, warm.entries, "files and directories of the snapshotter")
	require.Equal(t, empty.entries, after.entries, "files and directories of the snapshotter")
	require.LessOrEqual(t, after.files, warm.files+5, "open files")
	// The collector of Go's garbage returns memory when it sees fit.
	require.LessOrEqual(t, after.memory, warm.memory+warm.memory/4+8<<10, "resident memory, KiB")
	for name, size := range warm.databases {
		require.LessOrEqual(t, after.databases[name], size+size/4, "size of %s", name)
	}
	require.Empty(t, reg.Log().By(registry.Host).In("app").Of(registry.Layer))
}

// drainEvents takes CRI's events, as kubelet does. Containerd would otherwise keep
// the last thousand, each with the state of all containers of its pod.
func drainEvents(t *testing.T, n *harness.Node) {
	t.Helper()
	events, err := n.Runtime.GetContainerEvents(t.Context(), &runtimeapi.GetEventsRequest{})
	require.NoError(t, err)
	go func() {
		for {
			if _, err := events.Recv(); err != nil {
				return // the test is over
			}
		}
	}()
}

// Sixteen pods start at once, as after a drain of another node. All of them
// get their images, some the same one, and the host none of the layers.
func TestSixteenPodsAtOnce(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			n, reg := newNode(t, path.options)
			var imgs []image
			for i := range 8 {
				imgs = append(imgs, push(t, reg, images.Spec{Name: fmt.Sprintf("app-%d", i), Layers: 20 + i, LayerSize: 1 << 10}))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			var all sync.WaitGroup
			pods := make([]*harness.Pod, 16)
			for i := range pods {
				all.Go(func() {
					var err error
					if pods[i], err = n.RunPod(ctx, harness.PodSpec{Handler: harness.Guest}); assert.NoError(t, err) {
						_, err = pods[i].Pull(ctx, imgs[i%len(imgs)].Ref)
						assert.NoError(t, err)
					}
				})
			}
			all.Wait()
			require.False(t, t.Failed())
			for i, p := range pods {
				img := imgs[i%len(imgs)]
				requireNotOnHost(t, n, img)
				requireRuns(t, run(t, p, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never}), img)
			}
		})
	}
}
