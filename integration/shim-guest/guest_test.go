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

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

const helper = "fuse.nydus-overlayfs-guest-pull"

func isTmpfs(t *testing.T, path string) bool {
	t.Helper()
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(path, &st))
	return st.Type == unix.TMPFS_MAGIC
}

// node is a containerd, a registry with one image, and the places to look at.
type node struct {
	*harness.Node
	reg    *registry.Registry
	image  string
	layers []string
}

func start(t *testing.T, o harness.Options) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it mounts and runs containers")
	}
	reg, err := registry.Start()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, reg.Close()) })
	img, err := images.Build(images.Spec{Name: "demo", Layers: 3})
	require.NoError(t, err)
	_, err = reg.Push("demo:1", img)
	require.NoError(t, err)
	layers, err := images.LayerDigests(img)
	require.NoError(t, err)
	pause, err := images.Pause()
	require.NoError(t, err)
	_, err = reg.Push("pause:1", pause)
	require.NoError(t, err)

	o.Registry = reg
	n := harness.New(t, o)
	if !n.StandIn() {
		t.Skip("RUNTIME names another runtime than the stand-in guest")
	}
	return &node{Node: n, reg: reg, image: reg.Ref("demo:1"), layers: layers}
}

func (n *node) record(t *testing.T, namespace, id string) guest.Record {
	t.Helper()
	r, err := n.Record(namespace, id)
	require.NoError(t, err)
	return r
}

// rootfs is the mount that the snapshotter would give.
func rootfs(t *testing.T, fsType string) []mount.Mount {
	t.Helper()
	o, err := volume.GuestPull("dummy", map[string]string{"from": "test"}).Option()
	require.NoError(t, err)
	dir := t.TempDir()
	return []mount.Mount{{
		Type:    fsType,
		Source:  "overlay",
		Options: []string{"workdir=" + dir, "upperdir=" + dir, "lowerdir=" + dir, o},
	}}
}

func (n *node) container(ctx context.Context, t *testing.T, id string, annotations map[string]string, args []string, opts ...oci.SpecOpts) containerd.Container {
	t.Helper()
	c, err := n.Client.NewContainer(ctx, id,
		containerd.WithRuntime("io.containerd.guest.v2", nil),
		containerd.WithNewSpec(append([]oci.SpecOpts{
			oci.WithProcessArgs(args...),
			oci.WithDefaultPathEnv,
			oci.WithUIDGID(1000, 1000),
			oci.WithAnnotations(annotations),
			oci.WithHostNamespace(specs.NetworkNamespace),
			oci.WithCgroup(n.CgroupParent() + "/" + id),
		}, opts...)...))
	require.NoError(t, err)
	t.Cleanup(func() {
		err := c.Delete(context.WithoutCancel(ctx))
		assert.True(t, err == nil || errdefs.IsNotFound(err), "%v", err)
	})
	return c
}

// hostMounts returns the mounts of the host below the node's state.
func (n *node) hostMounts(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	var found []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], n.State()+"/io.containerd.runtime.v2.task") {
			found = append(found, line)
		}
	}
	return found
}

// gone waits until no process is left in a mount namespace, so that the guest
// and its tmpfs are gone, and no bundle on the host.
func (n *node) gone(t *testing.T, r guest.Record) {
	t.Helper()
	require.Eventually(t, func() bool {
		links, err := filepath.Glob("/proc/[0-9]*/ns/mnt")
		require.NoError(t, err)
		inside := slices.ContainsFunc(links, func(l string) bool {
			ns, err := os.Readlink(l)
			return err == nil && ns == r.MountNamespace
		})
		bundles, err := filepath.Glob(filepath.Join(n.State(), "io.containerd.runtime.v2.task", r.Namespace, "*"))
		require.NoError(t, err)
		return !inside && len(bundles) == 0
	}, 20*time.Second, 50*time.Millisecond, "the guest %s is still there", r.MountNamespace)
	assert.Empty(t, n.hostMounts(t))
}

// alive reports whether a process runs. One that nobody has reaped yet does not.
func alive(pid uint32) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func TestTask(t *testing.T) {
	n := start(t, harness.Options{})
	ctx := namespaces.WithNamespace(t.Context(), "test")
	c := n.container(ctx, t, "one", map[string]string{"io.kubernetes.cri.image-name": n.image},
		[]string{"sh", "-c", "echo out; echo err >&2; id; cat /etc/image-name; cat; exit 7"})

	var stdout, stderr bytes.Buffer
	stdin, feed, err := os.Pipe()
	require.NoError(t, err)
	defer feed.Close()
	task, err := c.NewTask(ctx, cio.NewCreator(cio.WithStreams(stdin, &stdout, &stderr), cio.WithFIFODir(t.TempDir())),
		containerd.WithRootFS(rootfs(t, helper)))
	require.NoError(t, err)
	exit, err := task.Wait(ctx)
	require.NoError(t, err)
	require.NoError(t, task.Start(ctx))

	r := n.record(t, "test", "one")
	assert.Equal(t, n.image, r.Image.Name)
	assert.Equal(t, helper, r.Mount.Type)
	assert.Equal(t, map[string]string{"from": "test"}, r.Volume.ImagePull.Metadata)
	assert.ElementsMatch(t, n.layers, n.reg.Log().By(registry.Guest).Of(registry.Layer).OK().References())
	assert.Empty(t, n.reg.Log().By(registry.Host))

	// Nothing of the guest is on the host.
	assert.Empty(t, n.hostMounts(t))
	bundle := filepath.Join(n.State(), "io.containerd.runtime.v2.task/test/one")
	for _, dir := range []string{"rootfs", guestDir} {
		entries, err := os.ReadDir(filepath.Join(bundle, dir))
		require.NoError(t, err)
		assert.Empty(t, entries, dir)
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	require.NoError(t, err)
	assert.NotEqual(t, own, r.MountNamespace)

	var out bytes.Buffer
	process, err := task.Exec(ctx, "exec", &specs.Process{
		Args: []string{"/bin/sh", "-c", "echo hello from $(cat /etc/image-name)"}, Cwd: "/",
		Env: []string{"PATH=/bin"}, Capabilities: &specs.LinuxCapabilities{},
	}, cio.NewCreator(cio.WithStreams(nil, &out, io.Discard), cio.WithFIFODir(t.TempDir())))
	require.NoError(t, err)
	done, err := process.Wait(ctx)
	require.NoError(t, err)
	require.NoError(t, process.Start(ctx))
	status := <-done
	assert.Zero(t, status.ExitCode())
	_, err = process.Delete(ctx)
	require.NoError(t, err)
	assert.Equal(t, "hello from demo\n", out.String())

	require.NoError(t, task.Pause(ctx))
	s, err := task.Status(ctx)
	require.NoError(t, err)
	assert.Equal(t, containerd.Paused, s.Status)
	require.NoError(t, task.Resume(ctx))
	_, err = task.Metrics(ctx)
	require.NoError(t, err)

	_, err = feed.WriteString("fed\n")
	require.NoError(t, err)
	require.NoError(t, feed.Close())
	require.NoError(t, task.CloseIO(ctx, containerd.WithStdinCloser))
	status = <-exit
	assert.EqualValues(t, 7, status.ExitCode())
	_, err = task.Delete(ctx)
	require.NoError(t, err)
	assert.Equal(t, "out\nuid=1000(app) gid=1000(app) groups=1000(app)\ndemo\nfed\n", stdout.String())
	assert.Equal(t, "err\n", stderr.String())
	n.gone(t, r)
}

// A container is killed together with its shim's guest by containerd's "shim
// delete", which runs on the host and finds no guest any more.
func TestShimIsKilled(t *testing.T) {
	n := start(t, harness.Options{})
	ctx := namespaces.WithNamespace(t.Context(), "test")
	c := n.container(ctx, t, "one", map[string]string{"io.kubernetes.cri.image-name": n.image}, []string{"sleep", "1000"})
	task, err := c.NewTask(ctx, cio.NullIO, containerd.WithRootFS(rootfs(t, helper)))
	require.NoError(t, err)
	exit, err := task.Wait(ctx)
	require.NoError(t, err)
	require.NoError(t, task.Start(ctx))
	r := n.record(t, "test", "one")
	require.True(t, alive(task.Pid()))

	require.NoError(t, syscall.Kill(r.ShimPID, syscall.SIGKILL))
	<-exit
	n.gone(t, r)
	assert.False(t, alive(task.Pid()))
	_, err = c.Task(ctx, nil)
	assert.True(t, errdefs.IsNotFound(err), "%v", err)

	// The ID can be used again.
	task, err = c.NewTask(ctx, cio.NullIO, containerd.WithRootFS(rootfs(t, helper)))
	require.NoError(t, err)
	exit, err = task.Wait(ctx)
	require.NoError(t, err)
	require.NoError(t, task.Start(ctx))
	r = n.record(t, "test", "one")
	require.NoError(t, task.Kill(ctx, syscall.SIGKILL))
	status := <-exit
	assert.EqualValues(t, 137, status.ExitCode())
	_, err = task.Delete(ctx)
	require.NoError(t, err)
	n.gone(t, r)
}

// What Kata refuses has to reach the client of containerd as an error, and leave
// no shim behind.
func TestTaskRefused(t *testing.T) {
	n := start(t, harness.Options{})
	ctx := namespaces.WithNamespace(t.Context(), "test")
	named := map[string]string{"io.kubernetes.cri.image-name": n.image}
	plain := rootfs(t, helper)
	plain[0].Options = plain[0].Options[:3]
	for i, tc := range []struct {
		annotations map[string]string
		rootfs      []mount.Mount
		args        []string
		err         string
		invalid     bool
	}{
		{annotations: named, rootfs: rootfs(t, "fuse.guest-pull-overlayfs"), err: `mount type "fuse.guest-pull-overlayfs"`, invalid: true},
		{annotations: named, rootfs: append(rootfs(t, helper), rootfs(t, helper)...), err: "got 2", invalid: true},
		{annotations: named, rootfs: plain, err: "mount option", invalid: true},
		{rootfs: rootfs(t, helper), err: "io.kubernetes.cri.image-name", invalid: true},
		{annotations: map[string]string{"io.kubernetes.cri.image-name": n.reg.Ref("none:1")}, rootfs: rootfs(t, helper), err: "none:1"},
		{annotations: named, rootfs: rootfs(t, helper), args: []string{"/no/such/program"}, err: "/no/such/program"},
	} {
		t.Run(tc.err, func(t *testing.T) {
			if tc.args == nil {
				tc.args = []string{"true"}
			}
			c := n.container(ctx, t, fmt.Sprintf("refused-%d", i), tc.annotations, tc.args)
			task, err := c.NewTask(ctx, cio.NullIO, containerd.WithRootFS(tc.rootfs))
			if err == nil {
				t.Cleanup(func() { _, _ = task.Delete(ctx, containerd.WithProcessKill) })
			}
			require.ErrorContains(t, err, tc.err)
			assert.Equal(t, tc.invalid, errdefs.IsInvalidArgument(err), "%v", err)
			require.Eventually(t, func() bool {
				bundles, err := filepath.Glob(filepath.Join(n.State(), "io.containerd.runtime.v2.task/test/*"))
				require.NoError(t, err)
				return len(bundles) == 0 && len(n.shims(t)) == 0
			}, 10*time.Second, 50*time.Millisecond, "something is left of it")
		})
	}
}

// shims returns the processes of this binary that serve the node.
func (n *node) shims(t *testing.T) []int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	require.NoError(t, err)
	var pids []int
	for _, p := range all {
		cmdline, err := os.ReadFile(p + "/cmdline")
		if err != nil {
			continue
		}
		if args := string(cmdline); strings.Contains(args, "containerd-shim-guest-v2") && strings.Contains(args, n.Socket()) {
			pid, err := strconv.Atoi(filepath.Base(p))
			require.NoError(t, err)
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestPod(t *testing.T) {
	n := start(t, harness.Options{})
	pod, err := n.RunPod(t.Context(), harness.PodSpec{Handler: harness.Guest})
	require.NoError(t, err)
	sandbox := n.record(t, harness.CRINamespace, pod.ID)
	assert.True(t, sandbox.Sandbox)
	assert.Nil(t, sandbox.Image)

	user := int64(1000)
	spec := harness.ContainerSpec{
		Image:     n.image,
		RunAsUser: &user,
		Command:   []string{"sh", "-c", "id -u; touch /tmp/mine; ls /tmp; cat /etc/image-name; exec sleep 1000"},
	}
	var containers []*harness.Container
	for i := range 2 {
		c, err := pod.Run(t.Context(), spec)
		require.NoError(t, err)
		containers = append(containers, c)
		logs, err := c.WaitLogs(t.Context(), "demo")
		require.NoError(t, err)
		assert.Equal(t, "1000\nmine\ndemo\n", logs)

		r := n.record(t, harness.CRINamespace, c.ID)
		assert.Equal(t, sandbox.ShimPID, r.ShimPID, "the containers of a pod share its guest")
		assert.Equal(t, sandbox.MountNamespace, r.MountNamespace)
		assert.Equal(t, pod.ID, r.SandboxID)
		assert.Equal(t, i > 0, r.Image.Reused)
		assert.Equal(t, r.HostChainID, r.Image.ChainID)
		assert.NotEmpty(t, r.HostChainID)
	}
	assert.Len(t, n.reg.Log().By(registry.Guest).Of(registry.Layer).OK(), len(n.layers), "pulled once for the pod")
	assert.Empty(t, n.reg.Log().By(registry.Host).Of(registry.Layer))
	assert.Empty(t, n.hostMounts(t))

	// A writable layer is the container's own.
	_, err = containers[0].Exec(t.Context(), "touch", "/tmp/first")
	require.NoError(t, err)
	out, err := containers[1].Exec(t.Context(), "ls", "/tmp")
	require.NoError(t, err)
	assert.Equal(t, "mine\n", out)

	// What a removed container wrote does not stay in the guest's memory.
	inGuest := fmt.Sprintf("/proc/%d/root%s/io.containerd.runtime.v2.task/k8s.io/%s/%s/containers", sandbox.ShimPID, n.State(), pod.ID, guestDir)
	assert.DirExists(t, filepath.Join(inGuest, containers[0].ID))
	require.NoError(t, containers[0].Stop(t.Context(), 0))
	require.NoError(t, containers[0].Remove(t.Context()))
	_, err = os.Stat(filepath.Join(inGuest, containers[0].ID))
	assert.ErrorIs(t, err, fs.ErrNotExist)

	// The shim, and so the guest, outlives containerd.
	require.NoError(t, n.Kill())
	require.NoError(t, n.Up(t.Context()))
	out, err = containers[1].Exec(t.Context(), "cat", "/etc/image-name")
	require.NoError(t, err)
	assert.Equal(t, "demo\n", out)
	c, err := pod.Run(t.Context(), spec)
	require.NoError(t, err)
	assert.Equal(t, sandbox.ShimPID, n.record(t, harness.CRINamespace, c.ID).ShimPID)

	require.NoError(t, pod.Stop(t.Context()))
	require.NoError(t, pod.Remove(t.Context()))
	n.gone(t, sandbox)
	assert.Empty(t, n.shims(t))
}

// A runtime handler chooses its guest's configuration as it does with Kata, by
// the option ConfigPath. The two flavours differ on the mount type that needs a
// patched Go shim: one host serves both, and only one of them starts pods.
func TestFlavours(t *testing.T) {
	rust := filepath.Join(t.TempDir(), "rust.json")
	records := t.TempDir()
	require.NoError(t, os.WriteFile(rust, []byte(`{"flavour":"rust","record_dir":"`+records+`"}`), 0o600))
	shim, err := filepath.Abs("../../.build/containerd-shim-guest-v2")
	require.NoError(t, err)
	n := start(t, harness.Options{
		PluginConfig: `mount_type = "fuse.guest-pull-overlayfs"`,
		ExtraConfig: `[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest-rust]
runtime_type = "io.containerd.guest.v2"
runtime_path = "` + shim + `"
snapshotter = "guest-pull"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest-rust.options]
ConfigPath = "` + rust + `"
`})
	_, err = n.RunPod(t.Context(), harness.PodSpec{Handler: harness.Guest})
	require.ErrorContains(t, err, `mount type "fuse.guest-pull-overlayfs"`)

	pod, err := n.RunPod(t.Context(), harness.PodSpec{Handler: "guest-rust"})
	require.NoError(t, err)
	c, err := pod.Run(t.Context(), harness.ContainerSpec{Image: n.image})
	require.NoError(t, err)
	_, err = c.WaitLogs(t.Context(), "hello from demo")
	require.NoError(t, err)
	r, err := guest.ReadRecord(records, harness.CRINamespace, c.ID)
	require.NoError(t, err)
	assert.Equal(t, guest.FlavourRust, r.Flavour)
	assert.Equal(t, "fuse.guest-pull-overlayfs", r.Mount.Type)
}

// The guest makes the root file system, and the OCI configuration says whether
// the container may write to it.
func TestReadonlyRootfs(t *testing.T) {
	n := start(t, harness.Options{})
	ctx := namespaces.WithNamespace(t.Context(), "test")
	for id, tc := range map[string]struct {
		opts []oci.SpecOpts
		out  string
	}{
		"writable": {out: "written\n"},
		"readonly": {opts: []oci.SpecOpts{oci.WithRootFSReadonly()}, out: "touch: /tmp/x: Read-only file system\n"},
	} {
		c := n.container(ctx, t, id, map[string]string{"io.kubernetes.cri.image-name": n.image},
			[]string{"sh", "-c", "touch /tmp/x 2>&1 && echo written"}, tc.opts...)
		var out bytes.Buffer
		task, err := c.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, &out, io.Discard), cio.WithFIFODir(t.TempDir())),
			containerd.WithRootFS(rootfs(t, helper)))
		require.NoError(t, err)
		exit, err := task.Wait(ctx)
		require.NoError(t, err)
		require.NoError(t, task.Start(ctx))
		<-exit
		_, err = task.Delete(ctx)
		require.NoError(t, err)
		assert.Equal(t, tc.out, out.String())
	}
}

func TestPodLosesItsShim(t *testing.T) {
	n := start(t, harness.Options{})
	pod, err := n.RunPod(t.Context(), harness.PodSpec{Handler: harness.Guest})
	require.NoError(t, err)
	c, err := pod.Run(t.Context(), harness.ContainerSpec{Image: n.image})
	require.NoError(t, err)
	_, err = c.WaitLogs(t.Context(), "hello from demo")
	require.NoError(t, err)
	sandbox := n.record(t, harness.CRINamespace, pod.ID)

	require.NoError(t, syscall.Kill(sandbox.ShimPID, syscall.SIGKILL))
	_, err = c.Wait(t.Context())
	require.NoError(t, err)
	n.gone(t, sandbox)
	require.NoError(t, pod.Stop(t.Context()))
	require.NoError(t, pod.Remove(t.Context()))
}
