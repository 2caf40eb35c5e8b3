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

package images

import (
	"io"
	"runtime"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// requireValid holds that the image is one for whoever pulls it: digests, sizes
// and diff IDs agree with the contents.
func requireValid(t *testing.T, img v1.Image) {
	t.Helper()
	reg, err := registry.Start()
	require.NoError(t, err)
	defer reg.Close()
	as, err := reg.Push("image:1", img)
	require.NoError(t, err)
	ref, err := name.ParseReference(as)
	require.NoError(t, err)
	pulled, err := remote.Image(ref)
	require.NoError(t, err)
	require.NoError(t, validate.Image(pulled))
}

func build(t *testing.T, s Spec) v1.Image {
	t.Helper()
	img, err := Build(s)
	require.NoError(t, err)
	return img
}

// Images are what they say, byte for byte the same each time, and share with
// others only the layer with the shell.
func TestBuild(t *testing.T) {
	for _, n := range []int{1, 5, 60} {
		img := build(t, Spec{Name: "a", Layers: n, LayerSize: 512})
		requireValid(t, img)
		layers, err := LayerDigests(img)
		require.NoError(t, err)
		require.Len(t, layers, n)

		d1, err := img.Digest()
		require.NoError(t, err)
		d2, err := build(t, Spec{Name: "a", Layers: n, LayerSize: 512}).Digest()
		require.NoError(t, err)
		require.Equal(t, d1, d2)

		other, err := LayerDigests(build(t, Spec{Name: "b", Layers: n, LayerSize: 512}))
		require.NoError(t, err)
		for i := range n {
			require.Equal(t, i == 0 && n > 1, layers[i] == other[i], "layer %d of %d", i, n)
		}
	}
	_, err := Build(Spec{})
	require.ErrorContains(t, err, "name")
}

func TestLayerSize(t *testing.T) {
	size, err := LayersSize(build(t, Spec{Name: "a", Layers: 2, LayerSize: 4 << 20}))
	require.NoError(t, err)
	require.Greater(t, size, int64(4<<20), "the layers compress")
}

func TestEncodings(t *testing.T) {
	for enc, want := range map[Encoding]types.MediaType{
		"":           types.OCILayer,
		Gzip:         types.OCILayer,
		Zstd:         types.OCILayerZStd,
		Uncompressed: types.OCIUncompressedLayer,
		Encrypted:    types.OCILayer + "+encrypted",
	} {
		img := build(t, Spec{Name: "a", Layers: 2, Encoding: enc})
		m, err := img.Manifest()
		require.NoError(t, err)
		for _, l := range m.Layers {
			require.Equal(t, want, l.MediaType)
		}
	}
	_, err := Build(Spec{Name: "a", Encoding: "lzma"})
	require.ErrorContains(t, err, "lzma")
}

func TestConfig(t *testing.T) {
	s := Spec{
		Name: "a", User: "app", Env: []string{"A=b"}, Entrypoint: []string{"/x"}, Cmd: []string{"y"},
		WorkingDir: "/tmp", Volumes: []string{"/data"}, Labels: map[string]string{"l": "v"}, Passwd: "only:x:1:1::/:\n",
	}
	img := build(t, s)
	c, err := img.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, v1.Config{
		User: "app", Env: []string{"PATH=/bin", "A=b"}, Entrypoint: []string{"/x"}, Cmd: []string{"y"},
		WorkingDir: "/tmp", Volumes: map[string]struct{}{"/data": {}}, Labels: map[string]string{"l": "v"},
	}, c.Config)
	rc := mutate.Extract(img)
	defer rc.Close()
	contents, err := io.ReadAll(rc)
	require.NoError(t, err)
	require.Contains(t, string(contents), s.Passwd)
}

func TestIndex(t *testing.T) {
	img := build(t, Spec{Name: "a"})
	index, err := Index(img)
	require.NoError(t, err)
	want, err := img.Digest()
	require.NoError(t, err)
	m, err := index.IndexManifest()
	require.NoError(t, err)
	platforms := map[string]int{}
	for _, d := range m.Manifests {
		platforms[d.Platform.Architecture]++
		if d.Platform.Architecture == runtime.GOARCH {
			require.Equal(t, want, d.Digest)
		}
	}
	require.Equal(t, 1, platforms[runtime.GOARCH])
	require.Greater(t, platforms["unknown"], 1, "attestations")
	require.Greater(t, len(platforms), 3)
}

func TestPause(t *testing.T) {
	img, err := Pause()
	require.NoError(t, err)
	requireValid(t, img)
}

// A shell that needs libraries would fail in the guest, with an error that says
// nothing; one that is missing has a package.
func TestBusybox(t *testing.T) {
	_, err := staticBinary("/does/not/exist")
	require.ErrorContains(t, err, "apt-get install busybox-static")
	_, err = staticBinary("/etc/passwd")
	require.ErrorContains(t, err, "busybox-static")
	_, err = staticBinary("/usr/bin/env")
	require.ErrorContains(t, err, "linked dynamically")
}
