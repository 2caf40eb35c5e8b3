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
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// A pod's whole life in the calls that kubelet makes, in its order, each answered as
// kubelet needs it: an image that is there has an ID and a size, a container its
// image, logs, statistics of its own and an exit code, and afterwards there is
// nothing of either.
func TestPodLifeAsKubeletLivesIt(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := newNode(t, path.options)
			for _, spec := range []images.Spec{
				{Name: "small"},
				{Name: "many-layers", Layers: 30, LayerSize: 1 << 10},
				{Name: "zstd", Layers: 4, Encoding: images.Zstd},
			} {
				t.Run(spec.Name, func(t *testing.T) {
					img := push(t, reg, spec)
					pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
					status, err := pod.Status(ctx)
					require.NoError(t, err)
					require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, status.State)

					found, err := n.ImageStatus(ctx, img.Ref)
					require.NoError(t, err)
					require.Nil(t, found, "before the pull")
					id, err := pod.Pull(ctx, img.Ref)
					require.NoError(t, err)
					found, err = n.ImageStatus(ctx, img.Ref)
					require.NoError(t, err)
					require.Equal(t, id, found.GetId())
					require.Contains(t, found.GetRepoTags(), img.Ref)
					require.NotZero(t, found.GetSize())
					requireIncomplete(t, n, img)

					c, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.IfNotPresent})
					require.NoError(t, err)
					require.Empty(t, reg.Log().By(registry.Guest).In(img.Name), "the guest pulls when the container starts")
					require.NoError(t, c.Start(ctx))
					requireRuns(t, c, img)
					requireInGuest(t, n, reg, c, img)
					if n.StandIn() {
						record, err := n.Record(harness.CRINamespace, c.ID)
						require.NoError(t, err)
						require.Equal(t, img.Ref, record.Image.Name)
					}

					running, err := c.Status(ctx)
					require.NoError(t, err)
					require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, running.State)
					require.Equal(t, id, running.GetImageId())
					stats, err := c.Stats(ctx)
					require.NoError(t, err)
					require.NotZero(t, stats.GetCpu().GetUsageCoreNanoSeconds().GetValue())
					require.NotZero(t, stats.GetMemory().GetUsageBytes().GetValue())

					require.NoError(t, c.Stop(ctx, 10*time.Second))
					ended, err := c.Status(ctx)
					require.NoError(t, err)
					require.Equal(t, runtimeapi.ContainerState_CONTAINER_EXITED, ended.State)
					require.Zero(t, ended.ExitCode, "it was asked to end and could")
					_, err = c.Logs()
					require.NoError(t, err, "the log of a container that has ended")

					require.NoError(t, pod.Stop(ctx))
					status, err = pod.Status(ctx)
					require.NoError(t, err)
					require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_NOTREADY, status.State)
					require.NoError(t, pod.Remove(ctx))
					requireIncomplete(t, n, img)
					require.NoError(t, n.RemoveImage(ctx, img.Ref))
				})
			}
		})
	}
}

// requireIncomplete holds that ctr, too, says that the image's content is not
// there, and that it is unpacked nevertheless.
func requireIncomplete(t *testing.T, n *harness.Node, img image) {
	t.Helper()
	out, err := n.Ctr(t.Context(), "-n", harness.CRINamespace, "images", "check", "--snapshotter", harness.Snapshotter, "name=="+img.Ref)
	require.NoError(t, err)
	require.Contains(t, out, "incomplete")
	require.Contains(t, out, "true", "unpacked")
	require.Empty(t, n.Blobs(img.Layers...))
}

// An init container ends before the next one starts, and both may be of the same
// image, which the guest then has already.
func TestInitContainer(t *testing.T) {
	ctx := t.Context()
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 3})
	setup := push(t, reg, images.Spec{Name: "setup", Layers: 2})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for _, i := range []image{setup, img} {
		c := run(t, pod, harness.ContainerSpec{Image: i.Ref, Command: []string{"/bin/sh", "-c", "echo prepared; exit 0"}})
		code, err := c.Wait(ctx)
		require.NoError(t, err)
		require.Zero(t, code)
		logs, err := c.WaitLogs(ctx, "prepared\n")
		require.NoError(t, err)
		require.Equal(t, "prepared\n", logs)
	}
	failing := run(t, pod, harness.ContainerSpec{Image: setup.Ref, Command: []string{"/bin/sh", "-c", "exit 3"}})
	code, err := failing.Wait(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 3, code)

	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)
	requireInGuest(t, n, reg, c, img)
	require.Len(t, reg.Log().By(registry.Host).In("app").Of(registry.Config).OK(), 1)
}

// A tag may move between the host's pull and the guest's. The host tells the guest
// which layers it has resolved, so a guest that compares can refuse the others,
// and the pod's author, who named a digest, never meets the question.
func TestTagMovesBetweenHostAndGuest(t *testing.T) {
	for name, ignore := range map[string]bool{"compared": false, "not compared": true} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			n, reg := newNode(t, harness.Options{Guest: guest.Config{IgnoreChainID: ignore}})
			if !n.StandIn() {
				t.Skip("what a guest does with the chain ID is its own affair; RUNTIME names another than the stand-in")
			}
			img := push(t, reg, images.Spec{Name: "app", Layers: 3})
			digest, err := reg.Digest("app:1")
			require.NoError(t, err)
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			c, err := pod.Create(ctx, harness.ContainerSpec{Image: img.Ref})
			require.NoError(t, err)

			moved, err := images.Build(images.Spec{Name: "moved", Layers: 2})
			require.NoError(t, err)
			_, err = reg.Push("app:1", moved)
			require.NoError(t, err)
			err = c.Start(ctx)
			if ignore {
				require.NoError(t, err)
				// The command is of the image that the host resolved, and the
				// files are of the other: why a guest should compare.
				out, err := c.Exec(ctx, "cat", "/etc/image-name")
				require.NoError(t, err)
				require.Equal(t, "moved\n", out)
			} else {
				// The chain ID is all that a containerd without patches says.
				requireHasOneOf(t, err, img.ChainID, digest.String())
				require.ErrorContains(t, err, img.Ref)
			}
			require.NoError(t, c.Remove(ctx))

			pinned := run(t, pod, harness.ContainerSpec{Image: reg.Ref("app@" + digest.String())})
			requireRuns(t, pinned, img)
			// Another pull is what it takes: both sides resolve the tag anew.
			fresh := run(t, pod, harness.ContainerSpec{Image: img.Ref, PullPolicy: harness.Always})
			_, err = fresh.WaitLogs(ctx, "hello from moved\n")
			require.NoError(t, err)
		})
	}
}
