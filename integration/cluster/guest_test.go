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
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/cluster"
	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// The guest needs longer than kubelet waits for StartContainer. The pod's author, who
// sees neither kubelet's nor containerd's log, is told what takes so long and what to
// set; and what failed so often leaves nothing.
func TestImpatientKubelet(t *testing.T) {
	record(t, compatibility, "the guest's pull takes longer than runtimeRequestTimeout, three times: the event has the image's size and both settings to raise; then it runs, pulled once by the host")
	n := newNode(t, options{kubelet: cluster.KubeletOptions{Config: map[string]any{
		"runtimeRequestTimeout": "7s",
		"crashLoopBackOff":      map[string]any{"maxContainerRestartPeriod": "1s"},
	}}})
	img := n.push(t, images.Spec{Name: "large", Layers: 3, User: "1000:1000"})
	well := n.reg.Inject(registry.Fault{
		Match: func(q registry.Request) bool { return len(registry.Log{q}.By(registry.Guest).Of(registry.Layer)) == 1 },
		Do:    registry.Delay(12 * time.Second),
	})
	n.create(t, n.Pod("large", harness.Guest, main(img)))
	event := n.waitEvent(t, "large", "Warning Failed", "the guest pulls image", "MB compressed")
	for _, s := range []string{`"` + img.Ref + `"`, "was not done after ", "set runtimeRequestTimeout: 10m0s in kubelet's configuration",
		"create_container_timeout = 600 in that of Kata Containers"} {
		require.Contains(t, event, s)
	}
	n.wait(t, "large", "tried three times", func(p *corev1.Pod) bool {
		s := p.Status.ContainerStatuses
		return len(s) == 1 && s[0].RestartCount >= 2 && s[0].State.Running == nil
	})
	well()
	n.waitReady(t, "large")
	n.requireRuns(t, "large", "main", img)
	require.Equal(t, "1000:1000 1000", ids(t, n, "large"))
	require.Equal(t, 1, n.pulls(img), "pulls by the host")
	n.requireNothingOnHost(t)
	n.delete(t, "large")
}

// pin_image_digest holds for all that a pod has: each of its containers gets the image
// that the host resolved for it, although the tags have moved when the guest asks.
func TestPinnedImages(t *testing.T) {
	record(t, functional, "pin_image_digest: init container, sidecar, container and ephemeral container get what the host resolved, whatever their tags are by then")
	n := newNode(t, options{Options: harness.Options{ExtraConfig: `[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]
pin_image_digest = true
`}})
	p := n.Pod("pinned", harness.Guest)
	names := []string{"init", "sidecar", "main", "debug"}
	old := map[string]image{}
	var before []corev1.Container
	for _, name := range names {
		old[name] = n.push(t, images.Spec{Name: name, Layers: 2})
		before = append(before, corev1.Container{Name: name, Image: old[name].Ref})
	}
	// The host has them, from a pod before this one, and the tags move on.
	n.run(t, n.Pod("before", harness.Guest, before...))
	for _, name := range names {
		newer, err := images.Build(images.Spec{Name: "newer-" + name, Layers: 3})
		require.NoError(t, err)
		_, err = n.reg.Push(name+":1", newer)
		require.NoError(t, err)
	}
	always := corev1.ContainerRestartPolicyAlways
	p.Spec.InitContainers = []corev1.Container{
		{Name: "init", Image: old["init"].Ref, Command: []string{"cat", "/etc/image-name"}},
		{Name: "sidecar", Image: old["sidecar"].Ref, RestartPolicy: &always},
	}
	p.Spec.Containers = []corev1.Container{main(old["main"])}
	n.run(t, p)
	require.NoError(t, control.API.Debug(t.Context(), "pinned", corev1.EphemeralContainer{
		EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: old["debug"].Ref, ImagePullPolicy: corev1.PullIfNotPresent},
		TargetContainerName:      "main",
	}))
	n.waitLogs(t, "pinned", "init", "init\n")
	for _, name := range names[1:] {
		n.requireRuns(t, "pinned", name, old[name])
	}
	p, err := control.API.Pod(t.Context(), "pinned")
	require.NoError(t, err)
	for _, s := range append(append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...), p.Status.EphemeralContainerStatuses...) {
		digest, err := old[s.Name].Digest()
		require.NoError(t, err)
		id := strings.TrimPrefix(s.ContainerID, "containerd://")
		c, err := n.Node.Client.ContainerService().Get(harness.CRI(t.Context()), id)
		require.NoError(t, err)
		require.Contains(t, string(c.Spec.GetValue()), `"`+n.reg.Ref(s.Name+"@"+digest.String())+`"`, s.Name)
	}
	n.requireNothingOnHost(t)
	n.delete(t, "pinned")
	n.delete(t, "before")
}
