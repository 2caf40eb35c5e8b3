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
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// sandboxerNode starts a node whose guest pods have sandboxes that the shim makes.
func sandboxerNode(t *testing.T, o harness.Options) (*harness.Node, *registry.Registry) {
	t.Helper()
	o.Sandboxer = harness.SandboxerShim
	reg := newRegistry(t)
	o.Registry = reg
	return harness.New(t, o), reg
}

// With sandboxer = "shim" the shim makes the sandbox. Nothing runs the pause image
// and there is no snapshot for it; all else is as with a sandbox of containerd's own.
func TestSandboxerPods(t *testing.T) {
	for name, disable := range map[string]bool{"pause image pulled": false, "pause image not pulled": true} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := sandboxerNode(t, harness.Options{DisablePauseImagePull: disable})
			t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
			img := push(t, reg, images.Spec{Name: "app", Layers: 4})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			require.Equal(t, disable, len(reg.Log().By(registry.Host).In("pause")) == 0, "pulls of the pause image")
			snapshots, err := n.Snapshots(harness.CRI(ctx), harness.Snapshotter)
			require.NoError(t, err)
			for _, s := range snapshots {
				require.NotEqual(t, pod.ID, s.Name, "a snapshot for the sandbox")
			}

			var containers []*harness.Container
			for range 2 {
				c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
				requireRuns(t, c, img)
				requireInGuest(t, n, reg, c, img)
				containers = append(containers, c)
			}
			if n.StandIn() {
				sandbox, err := n.Record(harness.CRINamespace, pod.ID)
				require.NoError(t, err)
				require.True(t, sandbox.SandboxAPI)
				for _, c := range containers {
					r, err := n.Record(harness.CRINamespace, c.ID)
					require.NoError(t, err)
					require.Equal(t, sandbox.ShimPID, r.ShimPID, "the containers of a pod share its guest")
				}
			}

			stats, err := containers[0].Stats(ctx)
			require.NoError(t, err)
			require.NotZero(t, stats.GetMemory().GetUsageBytes().GetValue())
			// Of containers only: Kata's Rust shim has no statistics of a sandbox.
			list, err := n.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{
				Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: pod.ID},
			})
			require.NoError(t, err)
			require.Len(t, list.GetStats(), 2)

			// A container that goes leaves the others, and the sandbox, alone.
			require.NoError(t, containers[0].Stop(ctx, 10*time.Second))
			require.NoError(t, containers[0].Remove(ctx))
			requireRuns(t, containers[1], img)
			requireRuns(t, run(t, pod, harness.ContainerSpec{Image: img.Ref}), img)

			require.NoError(t, pod.Stop(ctx))
			status, err := pod.Status(ctx)
			require.NoError(t, err)
			require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_NOTREADY, status.State)
			require.NoError(t, pod.Remove(ctx))
			require.NoError(t, n.Empty(ctx))
			require.NoError(t, n.CheckEmpty(ctx))
		})
	}
}

// One image serves pods of both kinds, in both orders, also when the sandboxes of the
// one kind are not containerd's.
func TestSandboxerSameImageInEveryOrder(t *testing.T) {
	for name, disable := range map[string]bool{"pause image pulled": false, "pause image not pulled": true} {
		t.Run(name, func(t *testing.T) {
			n, reg := sandboxerNode(t, harness.Options{DisablePauseImagePull: disable})
			if !hasPatch(n, "0002") {
				t.Skip("one image for both kinds of pods needs patch 0002, which this containerd does not have")
			}
			for i, order := range [][]string{
				{harness.Guest, harness.Runc, harness.Guest},
				{harness.Runc, harness.Guest, harness.Runc},
			} {
				img := push(t, reg, images.Spec{Name: []string{"app-0", "app-1"}[i], Layers: 3})
				for _, handler := range order {
					pod := runPod(t, n, harness.PodSpec{Handler: handler})
					c, errs := start(t.Context(), pod, harness.ContainerSpec{Image: img.Ref}, 1)
					require.NotNil(t, c, "handler %s, in %v: %v", handler, order, errs)
					requireRuns(t, c, img)
				}
			}
		})
	}
}

// Sandboxes of the shim outlive containerd, and containers start in them after it.
func TestSandboxerRestart(t *testing.T) {
	ctx := t.Context()
	n, reg := sandboxerNode(t, harness.Options{})
	t.Cleanup(func() { requireNoLayersOnHost(t, reg) })
	img := push(t, reg, images.Spec{Name: "app", Layers: 3})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	stays := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, stays, img)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		created, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
		require.NoError(t, err)
		require.NoError(t, n.Signal(signal))
		require.NoError(t, n.Up(ctx))

		status, err := pod.Status(ctx)
		require.NoError(t, err)
		require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, status.State)
		requireRuns(t, stays, img)
		require.NoError(t, created.Start(ctx))
		requireRuns(t, created, img)
		requireRuns(t, run(t, pod, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Never}), img)
	}
	require.NoError(t, pod.Stop(ctx))
	require.NoError(t, pod.Remove(ctx))
}

// The virtual machine of a sandbox may end, and its shim may be killed. containerd
// notices, and the pod can be removed without a trace.
func TestSandboxerLosesItsMachine(t *testing.T) {
	for name, victim := range map[string]func(guest.Record) int{
		"machine": func(r guest.Record) int { return r.MachinePID },
		"shim":    func(r guest.Record) int { return r.ShimPID },
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := sandboxerNode(t, harness.Options{})
			if !n.StandIn() {
				t.Skip("the virtual machine of another runtime than the stand-in is its own affair")
			}
			version, err := n.Client.Version(ctx)
			require.NoError(t, err)
			if name == "shim" && strings.HasPrefix(version.Version, "v2.3.") {
				t.Skip("containerd 2.3 does not have the containers of a dead shim cleaned up when the sandbox was the shim's; with a virtual machine there is nothing to clean up")
			}
			img := push(t, reg, images.Spec{Name: "app"})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, c, img)
			r, err := n.Record(harness.CRINamespace, pod.ID)
			require.NoError(t, err)

			require.NoError(t, syscall.Kill(victim(r), syscall.SIGKILL))
			_, err = c.Wait(ctx)
			require.NoError(t, err)
			require.Eventually(t, func() bool {
				status, err := pod.Status(ctx)
				return err == nil && status.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
			}, 10*time.Second, 50*time.Millisecond, "the sandbox is still ready")
			require.NoError(t, pod.Stop(ctx))
			require.NoError(t, pod.Remove(ctx))
		})
	}
}

// containerd starts the shim of such a sandbox by the handler's type alone, and gives
// it no runtime options: `containerd guest-pull check` says so, and why.
func TestSandboxerIgnoresPathAndOptions(t *testing.T) {
	ctx := t.Context()
	n, _ := sandboxerNode(t, harness.Options{ExtraConfig: `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.path]
runtime_type = "io.containerd.nosuch.v2"
runtime_path = "/bin/true"
snapshotter = "guest-pull"
sandboxer = "shim"
disable_pause_image_pull = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.options]
runtime_type = "io.containerd.guest.v2"
snapshotter = "guest-pull"
sandboxer = "shim"
disable_pause_image_pull = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.options.options]
ConfigPath = "/no/such/configuration"
`})
	if !n.StandIn() {
		t.Skip("the handlers are those of the stand-in guest, and RUNTIME names another")
	}
	_, err := n.RunPod(ctx, harness.PodSpec{Handler: "path"})
	require.ErrorContains(t, err, `"io.containerd.nosuch.v2"`)
	pod := runPod(t, n, harness.PodSpec{Handler: "options"})
	require.NoError(t, pod.Remove(ctx))
}

// What TestKills does, with sandboxes of the shim.
func TestSandboxerKills(t *testing.T) {
	rounds := envNumber(t, "GUEST_PULL_KILLS", 20) / 5
	seed := envNumber(t, "GUEST_PULL_SEED", rand.Uint64())
	kills(t, harness.Options{Sandboxer: harness.SandboxerShim}, harness.Guest, rounds, seed)
}
