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
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/machine"
)

// What make test-node says of a machine: the directory of its Debian root file system,
// the pattern of this project's package, and the directory for what the console printed.
const (
	machineEnv = "GUEST_PULL_MACHINE"
	debEnv     = "GUEST_PULL_DEB"
	consoleEnv = "GUEST_PULL_CONSOLE"
	// The program upstream, and the directory of what it has built.
	upstreamEnv = "GUEST_PULL_UPSTREAM"
)

// machineNode is a node that is a machine of its own.
type machineNode struct {
	*node
	m   *cluster.Machine
	deb string
}

// newMachine boots a machine, with more of containerd's configuration and more files. When the test ends, its pods are deleted the way users
// do it, and nothing of them may be left.
func newMachine(t *testing.T, config string, files map[string]machine.File) *machineNode {
	t.Helper()
	root, deb := os.Getenv(machineEnv), os.Getenv(debEnv)
	if root == "" || deb == "" {
		t.Skip("needs a virtual machine: make test-node runs it in one")
	}
	debs, err := filepath.Glob(deb)
	require.NoError(t, err)
	require.Len(t, debs, 1, deb)

	accelerator, err := machine.Accelerator(t.Context(), root)
	require.NoError(t, err)
	t.Logf("accelerator: %s", accelerator)
	if accelerator != "kvm" {
		old := podTimeout
		podTimeout = 10 * time.Minute
		t.Cleanup(func() { podTimeout = old })
	}
	dir := t.TempDir()
	reg := newRegistry(t)
	began := time.Now()
	m, err := control.StartMachine(t.Context(), cluster.MachineOptions{
		Root: root, Package: debs[0], Guest: "../../.build/containerd-shim-guest-v2",
		Dir: dir, Registry: reg, Accelerator: accelerator, Config: config, Files: files,
	})
	keep := func() {
		if t.Failed() {
			to := filepath.Join(os.Getenv(consoleEnv), strings.ReplaceAll(t.Name(), "/", "_")+".console.log")
			b, err := os.ReadFile(filepath.Join(dir, "console.log"))
			if err == nil {
				err = os.WriteFile(to, b, 0o644)
			}
			t.Logf("the machine's console is in %s (%v)", to, err)
		}
	}
	if err != nil {
		assert.NoError(t, err)
		keep()
		t.FailNow()
	}
	t.Logf("made and booted in %s", time.Since(began).Round(time.Second))
	n := &machineNode{node: &node{Kubelet: m.Kubelet, reg: reg}, m: m, deb: debs[0]}
	n.blobs = func(digests ...string) []string {
		have := n.sh(t, "cd "+cluster.ContainerdRoot+"/io.containerd.content.v1.content/blobs; find . -type f")
		return slices.DeleteFunc(slices.Clone(digests), func(d string) bool {
			return !strings.Contains(have, "./"+strings.Replace(d, ":", "/", 1)+"\n")
		})
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		if t.Failed() {
			n.explain(ctx, t)
			log, err := m.Run(ctx, "journalctl --no-pager -b -n 100 -u containerd -u kubelet; systemctl --failed --no-pager; df; findmnt")
			t.Logf("the machine's journal (%v):\n%s", err, log)
		}
		assert.NoError(t, m.Close(ctx))
		keep()
	})
	results.seeMachine(t, n)
	return n
}

// sh runs a script in the machine.
func (n *machineNode) sh(t *testing.T, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := n.m.Run(ctx, script)
	require.NoError(t, err)
	return out
}

const (
	pidOf = "systemctl show --property=MainPID --value containerd"
	// What "containerd guest-pull enable" writes.
	handlersFile = "/etc/containerd/conf.d/60-guest-pull-handlers.toml"
)

// enable has the handler pull in the guest, as an administrator does it.
func (n *machineNode) enable(t *testing.T) {
	t.Helper()
	before := n.sh(t, "find /etc/containerd -type f -exec sha256sum {} +; "+pidOf)
	dry := n.sh(t, "containerd guest-pull enable --dry-run "+harness.Guest)
	require.Contains(t, dry, "handler "+harness.Guest+": snapshotter overlayfs -> "+harness.Snapshotter)
	require.Equal(t, before, n.sh(t, "find /etc/containerd -type f -exec sha256sum {} +; "+pidOf), "a dry run changes something")
	out := n.sh(t, "containerd guest-pull enable "+harness.Guest+" --restart")
	require.Contains(t, out, "written, and containerd.service was restarted")
	require.Equal(t, before, n.sh(t, "find /etc/containerd -type f -not -path "+handlersFile+" -exec sha256sum {} +; echo "+lastLine(before)),
		"enable changes files that are not its own")
	require.NotEqual(t, lastLine(before), lastLine(n.sh(t, pidOf)), "containerd was not restarted")
	n.sh(t, "containerd guest-pull check")
}

// disable takes that back. Pods of the handler are in the way, and are named.
func (n *machineNode) disable(t *testing.T, img image) {
	t.Helper()
	n.run(t, n.Pod("in-the-way", harness.Guest, main(img)))
	out := n.sh(t, "! containerd guest-pull disable "+harness.Guest+" --restart 2>&1; test -e "+handlersFile)
	require.Contains(t, out, "in-the-way of handler "+harness.Guest)
	require.Contains(t, out, "nothing was changed")
	require.Equal(t, img.Name+"\n", n.exec(t, "in-the-way", "main", "cat", "/etc/image-name"))
	n.requireEmpty(t)
	require.Contains(t, n.sh(t, "containerd guest-pull disable "+harness.Guest+" --restart; test ! -e "+handlersFile), "was restarted")
	require.NoError(t, n.m.Ready(t.Context()))
	n.run(t, n.Pod("as-before", harness.Runc, main(img)))
	n.requireRuns(t, "as-before", "main", img)
	require.Empty(t, n.snapshots(t, harness.Snapshotter))
}

// upstreamTree is where the machine has what the program upstream needs of a source tree.
const upstreamTree = "/srv/upstream"

// What containerd's own CRI suite needs a machine for: cgroup v2, swap, two memory
// nodes, processes that are less likely to be killed than those that started them, erofs.
// (What a user namespace with mapped mounts needs is a newer runc than Debian's.)
var (
	needMachine = []string{
		"TestPrivilegedContainerCgroupMountOptions", "TestUpdateContainerResources_MemorySwap",
		"TestNriLinuxMemsetAdjustment", "TestNriLinuxMemsetAdjustmentUpdate",
	}
	// These start a containerd of their own, and so are always with runc.
	needMachineOnce = []string{
		"TestContainerCgroupWritable", "TestIssue10244LoopbackV2", "TestOOMEventMonitor", "TestReload100Pods",
		"TestRunContainerWithVolatileOption", "TestRuntimeHandlerUnpackWithSnapshotLabels",
	}
)

// upstreamFiles are the files of that tree.
func upstreamFiles(t *testing.T) map[string]machine.File {
	t.Helper()
	program := os.Getenv(upstreamEnv)
	if os.Getenv(machineEnv) == "" {
		return nil // and the test is skipped
	}
	built := filepath.Dir(program)
	line := filepath.Base(filepath.Dir(built)) // .build/v2.4/upstream/upstream
	files := map[string]machine.File{
		upstreamTree + "/integration/go.mod":                  {},
		upstreamTree + "/integration/upstream/exceptions.txt": {},
		upstreamTree + "/upstream":                            {Copy: program, Mode: 0o755},
		upstreamTree + "/.build/containerd-shim-guest-v2":     {Copy: "../../.build/containerd-shim-guest-v2", Mode: 0o755},
	}
	tools, err := filepath.Glob(filepath.Join(built, "tools", "*"))
	require.NoError(t, err)
	require.NotEmpty(t, tools, "%s: make test-node builds it", upstreamEnv)
	// A case mounts it from there.
	files["/usr/local/bin/loopback-v2"] = machine.File{Copy: filepath.Join(built, "tools", "loopback-v2"), Mode: 0o755}
	for _, f := range append(tools, filepath.Join(built, "cri-integration.test")) {
		to, err := filepath.Rel(built, f)
		require.NoError(t, err)
		files[filepath.Join(upstreamTree, ".build", line, "upstream", to)] = machine.File{Copy: f, Mode: 0o755}
	}
	return files
}

// suite runs these cases of containerd's CRI suite, with runc and with the guest.
func (n *machineNode) suite(t *testing.T) {
	t.Helper()
	// Not for ever: kubelet does not start with swap.
	n.sh(t, "modprobe erofs; dd if=/dev/zero of=/swap bs=1M count=256 status=none; chmod 600 /swap; mkswap /swap >/dev/null; swapon /swap")
	run := func(suite string, cases []string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		out, err := n.m.Run(ctx, fmt.Sprintf(`cd %s
			GUEST_PULL_CONTAINERD=/usr/bin timeout 55m ./upstream -built -strict -suite %s -run '^(%s)$' || { cat .build/*/upstream/results/%[2]s.*.some.log; exit 1; }
			sed -n 's/^--- PASS: \(.*\) .*/passed: \1/p' .build/*/upstream/results/%[2]s.guest-pull*.some.log`,
			upstreamTree, suite, strings.Join(cases, "|")))
		require.NoError(t, err)
		t.Log(out)
		for _, c := range cases {
			require.Contains(t, out, "passed: "+c+"\n")
		}
	}
	run("cri", slices.Concat(needMachine, needMachineOnce))
	run("cri-guest", needMachine)
	n.sh(t, "swapoff /swap; rm /swap; test ! -e /sys/fs/cgroup/gp-upstream-*")
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// orphans are the snapshots of containers that no container has, as the program that
// users look with says, and directories that no snapshot has.
func (n *machineNode) orphans(t *testing.T) []string {
	t.Helper()
	var status struct {
		Directories int
		Snapshots   []struct {
			Key    string
			Orphan bool
		} `json:"container_snapshots"`
	}
	require.NoError(t, json.Unmarshal([]byte(n.sh(t, "containerd guest-pull status --json")), &status))
	var found []string
	for _, s := range status.Snapshots {
		if s.Orphan {
			found = append(found, s.Key)
		}
	}
	if status.Directories != len(status.Snapshots) {
		found = append(found, fmt.Sprintf("%d directories for %d snapshots", status.Directories, len(status.Snapshots)))
	}
	return found
}

// requireNoOrphans: kubelet removes the sandboxes of dead pods each minute, and
// containerd collects what is then not in use.
func (n *machineNode) requireNoOrphans(t *testing.T) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		require.NoError(c, n.Node.GC(t.Context()))
		require.Empty(c, n.orphans(t))
	}, podTimeout, 2*time.Second)
}

// requireEmpty removes all pods and images, and then nothing may be left of them.
func (n *machineNode) requireEmpty(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*podTimeout)
	defer cancel()
	require.NoError(t, n.DeletePods(ctx))
	// What a killed pull held stays under a lease that ends after a day.
	leases, err := n.Node.Client.LeasesService().List(harness.CRI(ctx))
	require.NoError(t, err)
	for _, l := range leases {
		require.NoError(t, n.Node.Client.LeasesService().Delete(harness.CRI(ctx), l))
	}
	require.NoError(t, n.Node.Empty(ctx))
	// Containerd removes the working directories of containers that ran when the machine
	// went down, but looks for them only in namespaces that have had a task since, and so
	// not in the first start after it (core/runtime/v2, LoadExistingShims).
	_, err = n.m.Run(ctx, "systemctl restart containerd")
	require.NoError(t, err)
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		left, err := n.Node.Objects(ctx)
		require.NoError(c, err)
		require.Empty(c, left)
		files, err := n.m.Run(ctx, "cd "+cluster.ContainerdRoot+`
			# Of what was never made there is nothing either.
			for d in io.containerd.content.v1.content/blobs io.containerd.runtime.v2.task io.containerd.grpc.v1.cri \
				/run/containerd/io.containerd.grpc.v1.cri /run/containerd/io.containerd.runtime.v2.task; do
				! test -d $d || find $d -mindepth 2
			done
			for d in io.containerd.content.v1.content/ingest io.containerd.snapshotter.v1.*/snapshots; do
				! test -d $d || find $d -mindepth 1
			done
			findmnt --noheadings --raw --output TARGET | grep -e /run/containerd -e /var/lib/containerd || true
			ls /var/lib/kubelet/pods
			ps -eo pid,args | grep [c]ontainerd-shim || true
			systemctl list-units --plain --no-legend 'cri-containerd-*'`)
		require.NoError(c, err)
		require.Empty(c, files)
	}, podTimeout, 2*time.Second)
}

// One machine, as people run them, from its first boot on.
func TestMachine(t *testing.T) {
	n := newMachine(t, "", upstreamFiles(t))
	ok := func(name, what string, f func(t *testing.T)) {
		if !t.Run(name, func(t *testing.T) {
			record(t, wholeNode, what)
			f(t)
		}) {
			t.FailNow()
		}
	}

	ok("enable", "one command, with kubelet there: the handler pulls in the guest, systemd has restarted containerd, no other file is changed", n.enable)

	ok("boot", "systemd boots, cgroup v2, the package's containerd and kubelet run, check finds nothing", func(t *testing.T) {
		require.Equal(t, "cgroup2fs\n", n.sh(t, "stat -f -c %T /sys/fs/cgroup"))
		require.Empty(t, n.sh(t, "systemctl list-units --failed --plain --no-legend"))
		require.Equal(t, "active\nactive\n", n.sh(t, "systemctl is-active containerd kubelet"))
		require.Contains(t, n.sh(t, "/usr/bin/containerd --version; dpkg-query -S /usr/bin/containerd"), "+guest-pull.")
		n.sh(t, "containerd guest-pull check")
	})

	ok("pause", "the pause image first pulled for a guest pod, then used by a runc pod", func(t *testing.T) {
		for _, handler := range []string{harness.Guest, harness.Runc} {
			img := n.push(t, images.Spec{Name: "of-" + handler})
			n.run(t, n.Pod("pause-"+handler, handler, main(img)))
			n.requireRuns(t, "pause-"+handler, "main", img)
			n.requireNoWarnings(t, "pause-"+handler)
			if handler == harness.Guest {
				n.requireOnlyInGuest(t, img)
				n.requireNothingOnHost(t)
			}
		}
	})

	ok("cgroups", "pods of both kinds are systemd's slices and scopes, with their limits", func(t *testing.T) {
		for _, handler := range []string{harness.Guest, harness.Runc} {
			img := n.push(t, images.Spec{Name: "limits-" + handler})
			c := main(img)
			c.Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi"), corev1.ResourceCPU: resource.MustParse("500m")}
			p := n.run(t, n.Pod("limits-"+handler, handler, c))
			_, id, _ := strings.Cut(p.Status.ContainerStatuses[0].ContainerID, "://")
			cgroup := strings.TrimSpace(n.sh(t, "systemctl show --property=ControlGroup --value cri-containerd-"+id+".scope"))
			require.Regexp(t, `^/kubepods\.slice/kubepods-pod.*\.slice/cri-containerd-.*\.scope$`, cgroup)
			require.Equal(t, "67108864\n50000 100000\n", n.sh(t, "cd /sys/fs/cgroup"+cgroup+"; cat memory.max cpu.max"))
		}
	})

	for _, order := range [][]string{
		{harness.Guest, harness.Runc, harness.Guest},
		{harness.Runc, harness.Guest, harness.Runc},
	} {
		ok("first "+order[0], fmt.Sprintf("one image, first a %s pod, then a %s pod, then a %s pod", order[0], order[1], order[2]), func(t *testing.T) {
			img := n.push(t, images.Spec{Name: order[0] + "-first", Layers: 5, User: "1000:1000"})
			for i, handler := range order {
				pod := fmt.Sprintf("%s-first-%d", order[0], i)
				n.run(t, n.Pod(pod, handler, main(img)))
				n.requireRuns(t, pod, "main", img)
				want := "1000:1000 1000 2000"
				if handler == harness.Guest && order[0] == harness.Guest && i == 0 {
					n.requireOnlyInGuest(t, img)
				}
				if handler == harness.Guest && i == 0 {
					want = "1000:1000 1000"
				}
				require.Contains(t, []string{want, "1000:1000 1000"}, ids(t, n.node, pod))
				n.requireNoWarnings(t, pod)
			}
		})
	}

	ok("users", "USER by name: the event has the securityContext that makes it run, and that does", func(t *testing.T) {
		img := n.push(t, images.Spec{Name: "by-name", Layers: 2, User: "app"})
		n.create(t, n.Pod("by-name", harness.Guest, main(img)))
		n.waitEvent(t, "by-name", "Warning", "app", "securityContext", "runAsUser", "runAsGroup")
		id := int64(1000)
		p := n.Pod("by-name-fixed", harness.Guest, main(img))
		p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &id, RunAsGroup: &id}
		n.run(t, p)
		require.Equal(t, "1000:1000 1000", ids(t, n.node, "by-name-fixed"))
	})

	ok("stats", "stats summary: CPU, memory and root file system of both kinds; the image file system is the right one; no pressure", func(t *testing.T) {
		require.EventuallyWithT(t, func(c *assert.CollectT) {
			var s summary
			require.NoError(c, n.Get(t.Context(), "/stats/summary", &s))
			found := 0
			for _, p := range s.Pods {
				if !strings.HasPrefix(p.PodRef.Name, "limits-") {
					continue
				}
				require.Len(c, p.Containers, 1)
				ct := p.Containers[0]
				require.NotNil(c, ct.CPU.UsageCoreNanoSeconds, p.PodRef.Name)
				require.NotZero(c, *ct.CPU.UsageCoreNanoSeconds, p.PodRef.Name)
				require.NotNil(c, ct.Memory.WorkingSetBytes, p.PodRef.Name)
				require.NotZero(c, *ct.Memory.WorkingSetBytes, p.PodRef.Name)
				require.LessOrEqual(c, *ct.Memory.WorkingSetBytes, uint64(64<<20), p.PodRef.Name)
				require.NotNil(c, ct.Rootfs, p.PodRef.Name)
				require.NotNil(c, ct.Rootfs.UsedBytes, p.PodRef.Name)
				found++
			}
			require.Equal(c, 2, found)
			fs := s.Node.Runtime.ImageFs
			require.NotNil(c, fs)
			require.NotNil(c, fs.CapacityBytes)
			require.Equal(c, strings.TrimSpace(n.sh(t, "stat -f -c '%b %S' "+cluster.ContainerdRoot+" | (read b s; echo $((b * s)))")), fmt.Sprint(*fs.CapacityBytes))
		}, podTimeout, 5*time.Second)
		for _, pressure := range []corev1.NodeConditionType{corev1.NodeDiskPressure, corev1.NodeMemoryPressure, corev1.NodePIDPressure} {
			require.Equal(t, corev1.ConditionFalse, n.condition(t, pressure), pressure)
		}
	})

	ok("eviction", "memory pressure on cgroup v2: pods of both kinds are evicted, and others run when it is over", func(t *testing.T) {
		img := n.push(t, images.Spec{Name: "evicted"})
		for _, handler := range []string{harness.Guest, harness.Runc} {
			n.run(t, n.Pod("evicted-"+handler, handler, main(img)))
		}
		n.sh(t, "cd /etc/kubernetes; cp kubelet.json saved.json; sed -i '1a \"evictionHard\": {\"memory.available\": \"99%\"},' kubelet.json; systemctl restart kubelet")
		for _, handler := range []string{harness.Guest, harness.Runc} {
			p := n.wait(t, "evicted-"+handler, "evicted", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodFailed })
			require.Equal(t, "Evicted", p.Status.Reason)
		}
		require.Equal(t, corev1.ConditionTrue, n.condition(t, corev1.NodeMemoryPressure))
		n.sh(t, "cd /etc/kubernetes; mv saved.json kubelet.json; systemctl restart kubelet")
		require.Eventually(t, func() bool { return n.condition(t, corev1.NodeMemoryPressure) == corev1.ConditionFalse },
			podTimeout, time.Second, "memory pressure stays")
		require.NoError(t, n.DeletePods(t.Context()))
	})

	var c *chaos
	for _, how := range []string{
		"systemctl kill --kill-who=main --signal=KILL containerd", "systemctl restart containerd", "systemctl restart kubelet containerd",
	} {
		ok(how, how+" while pods start, run and go away", func(t *testing.T) {
			if c == nil {
				c = newChaos(t, n.node)
			}
			c.check(t, func() { n.sh(t, how) })
		})
	}

	ok("upgrade", "the package is upgraded while pods run and start", func(t *testing.T) {
		next := nextVersion(t, n.deb)
		n.sh(t, "base64 -d >/root/next.deb <<END\n"+next+"END\n")
		const installed = "dpkg-query -W -f '${Version}' $(dpkg-query -S /usr/bin/containerd | cut -d: -f1)"
		version := n.sh(t, installed)
		pid := n.sh(t, pidOf)
		starting := c.pods(t, 1)
		n.sh(t, "dpkg --install /root/next.deb; rm /root/next.deb")
		require.Equal(t, version+"+next", n.sh(t, installed))
		require.NotEqual(t, pid, n.sh(t, pidOf), "containerd was not restarted")
		for _, pod := range starting {
			n.waitReady(t, pod)
			n.delete(t, pod)
		}
		c.requireSteady(t)
	})

	ok("reboot", "reboot: kubelet brings all pods back, images are there, nothing of the old boot is left", func(t *testing.T) {
		pulls := n.pulls(c.img)
		require.NoError(t, n.m.Reboot(t.Context()))
		require.NoError(t, n.m.Ready(t.Context()))
		for name, id := range c.steady {
			p := n.wait(t, name, "ready in a new container", func(p *corev1.Pod) bool {
				return isReady(p) && p.Status.ContainerStatuses[0].ContainerID != id
			})
			n.requireRuns(t, name, "main", c.img)
			require.EqualValues(t, 1, p.Status.ContainerStatuses[0].RestartCount)
		}
		require.Equal(t, pulls, n.pulls(c.img), "the image was pulled again")
		require.Empty(t, n.sh(t, "systemctl list-units --failed --plain --no-legend"))
		n.requireNoOrphans(t)
		fresh := c.pods(t, 1)
		for _, pod := range fresh {
			n.waitReady(t, pod)
		}
	})

	ok("pause, the other way", "the pause image first pulled for a runc pod, then used by a guest pod; nothing is left of anything before", func(t *testing.T) {
		n.requireEmpty(t)
		img := n.push(t, images.Spec{Name: "other-way"})
		for _, handler := range []string{harness.Runc, harness.Guest} {
			n.run(t, n.Pod("other-way-"+handler, handler, main(img)))
			n.requireRuns(t, "other-way-"+handler, "main", img)
		}
		n.requireEmpty(t)
	})

	ok("suites", "cases of containerd's CRI suite that need cgroup v2, swap, two memory nodes and a root with all capabilities: runc pods, guest pods", n.suite)

	ok("disable", "the handler is given back: pods are named while they are in the way, and then the node is as before", func(t *testing.T) {
		n.disable(t, n.push(t, images.Spec{Name: "last"}))
	})
}

// nextVersion is the package with another version, in base64.
func nextVersion(t *testing.T, deb string) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.CommandContext(t.Context(), "sh", "-ec", `
		dpkg-deb --raw-extract "$1" "$2/tree"
		sed -i 's/^Version: .*/&+next/' "$2/tree/DEBIAN/control"
		dpkg-deb --root-owner-group -Zgzip -z1 --build "$2/tree" "$2/next.deb" >/dev/null
		base64 "$2/next.deb"`, "sh", deb, dir).Output()
	require.NoError(t, err)
	return string(out)
}
