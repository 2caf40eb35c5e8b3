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

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

// A pod's annotation that has the name of the unpacker's label is an annotation:
// the sandbox runs, nothing is recorded under the name that the pod's author wrote
// there, and the image that has the name is what it was.
func TestPodIsNoLayer(t *testing.T) {
	const ref = "containerd.io/snapshot.ref"
	n, reg := newNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", Layers: 2})
	unknown := digest.FromString("nobody has this").String()

	// The digest of an image that comes only afterwards.
	for _, name := range []string{unknown, img.ChainID} {
		pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest, Annotations: map[string]string{ref: name}})
		snapshots, err := n.Snapshots(harness.CRI(t.Context()), harness.Snapshotter)
		require.NoError(t, err)
		for _, s := range snapshots {
			require.NotEqual(t, name, s.Name)
		}
		require.NoError(t, pod.Remove(t.Context()))
	}

	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)
	requireInGuest(t, n, reg, c, img)
	info, err := n.Client.SnapshotService(harness.Snapshotter).Stat(harness.CRI(t.Context()), img.ChainID)
	require.NoError(t, err)
	require.Equal(t, img.chain(t)[0], info.Parent)
}
