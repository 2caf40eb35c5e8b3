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

// Package manifests checks the files for Kubernetes that the packages carry.
package manifests

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"
)

const dir = "../../builder/package/kubernetes"

func read(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	require.NoError(t, err)
	return b
}

// decode refuses what the API server would refuse with fieldValidation=Strict:
// unknown and duplicate fields, and values of another type.
func decode(t *testing.T, name string, into metav1.Object, want metav1.TypeMeta, got *metav1.TypeMeta) {
	t.Helper()
	require.NoError(t, yaml.UnmarshalStrict(read(t, name), into), name)
	assert.Equal(t, want, *got, name)
	assert.Empty(t, validation.IsDNS1123Subdomain(into.GetName()), name)
}

func selector(t *testing.T, name string, labels map[string]string) {
	t.Helper()
	require.NotEmpty(t, labels, name)
	for k, v := range labels {
		assert.Empty(t, validation.IsQualifiedName(k), name)
		assert.Empty(t, validation.IsValidLabelValue(v), name)
		// The notes tell how to set it.
		assert.Contains(t, string(read(t, "README.md")), k+"="+v, name)
	}
}

// Each file names things that another one has to have: the class of the pod, the
// handler in containerd's configuration, the label in the notes.
func TestManifests(t *testing.T) {
	var class nodev1.RuntimeClass
	decode(t, "runtimeclass.yaml", &class, metav1.TypeMeta{APIVersion: "node.k8s.io/v1", Kind: "RuntimeClass"}, &class.TypeMeta)
	assert.Empty(t, validation.IsDNS1123Label(class.Handler))
	require.NotNil(t, class.Scheduling)
	selector(t, "runtimeclass.yaml", class.Scheduling.NodeSelector)
	require.NotNil(t, class.Overhead)
	for _, resource := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		q := class.Overhead.PodFixed[resource]
		assert.Positive(t, q.Sign(), resource)
	}

	dropIn, err := os.ReadFile("../../builder/package/50-guest-pull.toml")
	require.NoError(t, err)
	assert.Contains(t, string(dropIn), ".containerd.runtimes."+class.Handler+"]\n")

	var pod corev1.Pod
	decode(t, "pod.yaml", &pod, metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, &pod.TypeMeta)
	require.NotNil(t, pod.Spec.RuntimeClassName)
	assert.Equal(t, class.Name, *pod.Spec.RuntimeClassName)
	require.NotEmpty(t, pod.Spec.Containers)
	for _, c := range pod.Spec.Containers {
		assert.Empty(t, validation.IsDNS1123Label(c.Name))
		assert.NotEmpty(t, c.Image)
		for name, limit := range c.Resources.Limits {
			request := c.Resources.Requests[name]
			assert.LessOrEqual(t, request.Cmp(limit), 0, "requests more of %s than its limit", name)
		}
	}
	// What makes the pod a guest-pulled one is its class, and no annotation.
	assert.Empty(t, pod.Annotations)

	// No file is left out.
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	require.NoError(t, err)
	assert.Len(t, files, 3)
}

// values is the part of the values of kata-deploy's chart that is used here, as
// of 4.1.0 (kata-containers, tools/packaging/kata-deploy/helm-chart/kata-deploy/values.yaml).
type values struct {
	NodeSelector map[string]string `json:"nodeSelector"`
	Snapshotter  struct {
		Setup []string `json:"setup"`
	} `json:"snapshotter"`
	Shims map[string]struct {
		Containerd struct {
			Snapshotter string `json:"snapshotter"`
		} `json:"containerd"`
	} `json:"shims"`
}

// Every shim that the chart maps to nydus has to be mapped to guest-pull: setup is
// empty, so a shim that still asks for nydus would fail on every node.
func TestKataDeployValues(t *testing.T) {
	var v values
	require.NoError(t, yaml.UnmarshalStrict(read(t, "kata-deploy.values.yaml"), &v))
	selector(t, "kata-deploy.values.yaml", v.NodeSelector)
	require.NotNil(t, v.Snapshotter.Setup, "an absent list would leave the chart's own: nydus")
	assert.Empty(t, v.Snapshotter.Setup)

	got := map[string]bool{}
	for shim, s := range v.Shims {
		assert.Equal(t, "guest-pull", s.Containerd.Snapshotter, shim)
		got[shim] = true
	}
	want := map[string]bool{"remote": true}
	for _, shim := range []string{"qemu-coco-dev", "qemu-snp", "qemu-tdx", "qemu-se", "qemu-nvidia-gpu-snp", "qemu-nvidia-gpu-tdx"} {
		want[shim], want[shim+"-runtime-rs"] = true, true
	}
	assert.Equal(t, want, got)
	assert.False(t, strings.Contains(string(read(t, "kata-deploy.values.yaml")), "\t"), "no tabs in YAML")
}
