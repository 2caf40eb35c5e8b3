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
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// A pod with all that pods have: kubelet pulls each container's image for the
// pod, with no annotation and no feature gate, and no layer reaches the host.
func TestCoreFunctional(t *testing.T) {
	n := newNode(t, options{})
	ctx := t.Context()

	t.Run("pod", func(t *testing.T) {
		record(t, functional, "init container, sidecar, shared volume, startup, readiness and liveness probes, exec, logs; no layer on the host")
		first := n.push(t, images.Spec{Name: "init", Layers: 2})
		side := n.push(t, images.Spec{Name: "sidecar", Layers: 3})
		app := n.push(t, images.Spec{Name: "app", Layers: 20, LayerSize: 1 << 10})

		always := corev1.ContainerRestartPolicyAlways
		shared := []corev1.VolumeMount{{Name: "shared", MountPath: "/shared"}}
		p := n.Pod("app", harness.Guest, corev1.Container{
			Name: "main", Image: app.Ref, VolumeMounts: shared,
			StartupProbe:   execProbe("test", "-e", "/shared/from-init"),
			ReadinessProbe: execProbe("test", "-e", "/shared/ready"),
			LivenessProbe:  execProbe("true"),
		})
		p.Spec.Volumes = []corev1.Volume{{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		p.Spec.InitContainers = []corev1.Container{
			{Name: "init", Image: first.Ref, VolumeMounts: shared, Command: []string{"sh", "-c", "cat /etc/image-name > /shared/from-init"}},
			{Name: "sidecar", Image: side.Ref, RestartPolicy: &always, VolumeMounts: shared},
		}
		n.create(t, p)

		n.wait(t, "app", "started and not ready", func(p *corev1.Pod) bool {
			s := p.Status.ContainerStatuses
			return len(s) == 1 && s[0].Started != nil && *s[0].Started && !s[0].Ready
		})
		require.Equal(t, "init\n", n.exec(t, "app", "main", "cat", "/shared/from-init"))
		n.exec(t, "app", "sidecar", "touch", "/shared/ready")
		n.waitReady(t, "app")
		n.requireRuns(t, "app", "main", app)
		n.requireRuns(t, "app", "sidecar", side)
		for _, img := range []image{first, side, app} {
			n.requireOnlyInGuest(t, img)
			require.Equal(t, 1, n.pulls(img))
		}
		n.requireNothingOnHost(t)
		_, err := control.API.Exec(ctx, "app", "main", "sh", "-c", "echo to stderr >&2; exit 3")
		require.ErrorContains(t, err, "exit code 3")
		require.ErrorContains(t, err, "to stderr")
	})

	t.Run("deletion", func(t *testing.T) {
		record(t, functional, "deletion: no snapshot of a container, no mount, no volume is left")
		n.delete(t, "app")
		require.Eventually(t, func() bool {
			containers, err := n.Node.Client.ContainerService().List(harness.CRI(ctx))
			return err == nil && len(containers) <= 1 // kubelet keeps the sandbox for up to a minute
		}, podTimeout, 100*time.Millisecond, "containers of the deleted pod")
		for _, name := range n.snapshots(t, harness.Snapshotter) {
			if strings.HasPrefix(name, "sha256:") {
				continue // a layer
			}
			c, err := n.Node.Client.ContainerService().Get(harness.CRI(ctx), name)
			require.NoError(t, err)
			require.Equal(t, "sandbox", c.Labels["io.cri-containerd.kind"])
		}
	})

	t.Run("crash", func(t *testing.T) {
		record(t, functional, "a container that crashes is restarted, without another pull by the host")
		img := n.push(t, images.Spec{Name: "crash", Layers: 3})
		p := n.Pod("crash", harness.Guest, corev1.Container{
			Name: "main", Image: img.Ref,
			Command:      []string{"sh", "-c", "[ -e /shared/once ] || { touch /shared/once /lost; exit 7; }; ls /; exec tail -f /dev/null"},
			VolumeMounts: []corev1.VolumeMount{{Name: "shared", MountPath: "/shared"}},
		})
		p.Spec.Volumes = []corev1.Volume{{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		n.create(t, p)
		p = n.wait(t, "crash", "restarted", func(p *corev1.Pod) bool {
			return isReady(p) && p.Status.ContainerStatuses[0].RestartCount == 1
		})
		require.EqualValues(t, 7, p.Status.ContainerStatuses[0].LastTerminationState.Terminated.ExitCode)
		require.NotContains(t, n.exec(t, "crash", "main", "ls", "/"), "lost", "the container has the root file system of the one before")
		require.Equal(t, 1, n.pulls(img))
		n.requireOnlyInGuest(t, img)
	})
	n.requireNothingOnHost(t)
}

func execProbe(cmd ...string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: cmd}},
		PeriodSeconds:    1,
		TimeoutSeconds:   10,
		FailureThreshold: 60,
	}
}

// One image, for pods of both kinds, in whatever order: the presence check of
// kubelet does not say for which snapshotter it asks, so an image that is there
// for the one must not look as if it were there for the other.
func TestCoreBothOrders(t *testing.T) {
	for _, discard := range []bool{false, true} {
		name := "default"
		if discard {
			name = "discard_unpacked_layers"
		}
		t.Run(name, func(t *testing.T) {
			n := newNode(t, options{Options: harness.Options{DiscardUnpackedLayers: discard}})
			t.Run("guest first", func(t *testing.T) {
				record(t, compatibility, "one image, first a guest pod, then a runc pod, then a guest pod ("+name+")")
				img := n.push(t, images.Spec{Name: "guest-first", Layers: 5})
				n.run(t, n.Pod("gf-guest", harness.Guest, main(img)))
				n.requireRuns(t, "gf-guest", "main", img)
				n.requireOnlyInGuest(t, img)
				n.run(t, n.Pod("gf-runc", harness.Runc, main(img)))
				n.requireRuns(t, "gf-runc", "main", img)
				require.ElementsMatch(t, img.Layers, n.reg.Log().By(registry.Host).Of(registry.Layer).OK().In(img.Name).References(),
					"layers that the host fetched for runc")
				n.run(t, n.Pod("gf-guest-again", harness.Guest, main(img)))
				n.requireRuns(t, "gf-guest-again", "main", img)
				n.requireRuns(t, "gf-guest", "main", img)
				for _, pod := range []string{"gf-guest", "gf-runc", "gf-guest-again"} {
					n.requireNoWarnings(t, pod)
				}
			})
			t.Run("runc first", func(t *testing.T) {
				record(t, compatibility, "one image, first a runc pod, then a guest pod, then a runc pod ("+name+")")
				img := n.push(t, images.Spec{Name: "runc-first", Layers: 5})
				n.run(t, n.Pod("rf-runc", harness.Runc, main(img)))
				n.requireRuns(t, "rf-runc", "main", img)
				n.run(t, n.Pod("rf-guest", harness.Guest, main(img)))
				n.requireRuns(t, "rf-guest", "main", img)
				require.ElementsMatch(t, img.Layers, n.reg.Log().By(registry.Guest).Of(registry.Layer).OK().In(img.Name).References(),
					"layers that the guest fetched")
				n.run(t, n.Pod("rf-runc-again", harness.Runc, main(img)))
				n.requireRuns(t, "rf-runc-again", "main", img)
				for _, pod := range []string{"rf-runc", "rf-guest", "rf-runc-again"} {
					n.requireNoWarnings(t, pod)
				}
			})
		})
	}
}

// The pause image is pulled by containerd itself, for whichever sandbox comes
// first, and must then do for the others too.
func TestCorePauseImage(t *testing.T) {
	for _, order := range [][]string{{harness.Guest, harness.Runc}, {harness.Runc, harness.Guest}} {
		t.Run(order[0]+" first", func(t *testing.T) {
			record(t, compatibility, "the pause image first pulled for a "+order[0]+" pod, then used by a "+order[1]+" pod")
			n := newNode(t, options{})
			for _, handler := range order {
				img := n.push(t, images.Spec{Name: "of-" + handler})
				n.run(t, n.Pod("pause-"+handler, handler, main(img)))
				n.requireRuns(t, "pause-"+handler, "main", img)
				n.requireNoWarnings(t, "pause-"+handler)
				if handler == harness.Guest {
					n.requireOnlyInGuest(t, img)
				}
			}
		})
	}
}

// An image volume is unpacked on the host. A pod on the host has it. For a pod in a
// guest it is refused, and the pod's event says why: nothing of it is fetched, and no
// container starts on an empty directory.
func TestCoreImageVolume(t *testing.T) {
	versions, err := cluster.Binaries(os.Getenv(binariesEnv)).Versions(t.Context())
	require.NoError(t, err)
	if version := versions["kubelet"]; strings.HasPrefix(version, "1.34.") && !featureGates(t)["ImageVolume"] {
		t.Skipf("kubelet %s has image volumes with the feature gate ImageVolume only", version)
	}
	record(t, compatibility, "an image volume: a runc pod has it, a guest pod's event says that it is refused")
	n := newNode(t, options{})
	pod := func(handler string) (*corev1.Pod, image) {
		data := n.push(t, images.Spec{Name: "data-of-" + handler, Layers: 2})
		c := main(n.push(t, images.Spec{Name: "with-data-" + handler}))
		c.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
		p := n.Pod("volume-"+handler, handler, c)
		p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: data.Ref}}}}
		return p, data
	}
	p, data := pod(harness.Runc)
	n.run(t, p)
	require.Equal(t, data.Name+"\n", n.exec(t, p.Name, "main", "cat", "/data/etc/image-name"))
	p, data = pod(harness.Guest)
	n.create(t, p)
	n.waitEvent(t, p.Name, "Warning", "image volume", data.Ref, "off the host")
	require.Empty(t, n.reg.Log().Of(registry.Layer).In(data.Name), "layers of the volume")
	got, err := control.API.Pod(t.Context(), p.Name)
	require.NoError(t, err)
	require.False(t, isReady(got))
}

// Containerd is killed while pods of both kinds deploy and run.
func TestCoreKill(t *testing.T) {
	record(t, stability, "SIGKILL to containerd while pods start, run and go away")
	n := newNode(t, options{})
	newChaos(t, n).round(t, syscall.SIGKILL)
}
