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
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"runtime"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// However an image is written down, it is the same one for whoever can read it, byte
// for byte the same each time, and what it needs is all that it names.
func TestShapes(t *testing.T) {
	for name, s := range map[string]Shape{
		"plain":             {},
		"layers":            {More: 3, SameTwice: true},
		"Docker's":          {More: 1, Docker: true},
		"zstd":              {More: 1, Encoding: Zstd},
		"Docker's zstd":     {More: 1, Encoding: Zstd, Docker: true},
		"uncompressed":      {More: 1, Encoding: Uncompressed},
		"annotated":         {Annotations: map[string]string{"a": "b"}},
		"a large config":    {ConfigSize: 100 << 10},
		"index":             {Indexes: 1, OtherPlatforms: true, Attestations: true, Companion: true},
		"index of indexes":  {Indexes: 3, OtherPlatforms: true},
		"no platform named": {Indexes: 1, NoPlatform: true},
		"twins":             {More: 2, Indexes: 1, Twin: Zstd},
		"twins, turned":     {More: 2, Indexes: 1, Twin: Uncompressed, TwinFirst: true, Docker: true},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := s.Build("image")
			require.NoError(t, err)
			again, err := s.Build("image")
			require.NoError(t, err)
			require.Equal(t, c.Root, again.Root)

			reg, img := pull(t, c)
			requireUnpacks(t, img)
			d, err := img.Digest()
			require.NoError(t, err)
			require.Equal(t, c.Images[0].Digest.String(), d.String())
			require.True(t, c.Needed[d.String()])
			config, err := img.ConfigName()
			require.NoError(t, err)
			require.True(t, c.Needed[config.String()])
			for _, r := range reg.Log().Of(registry.Layer).References() {
				require.Contains(t, c.Layers, r)
				require.False(t, c.Needed[r])
			}

			var archive bytes.Buffer
			require.NoError(t, c.WriteArchive(&archive, "example/image:1"))
			files := map[string]bool{}
			for tr := tar.NewReader(&archive); ; {
				h, err := tr.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				require.NoError(t, err)
				files[h.Name] = true
			}
			require.True(t, files["oci-layout"])
			require.True(t, files["index.json"])
			require.True(t, files["blobs/sha256/"+d.Hex])
			require.True(t, files["blobs/sha256/"+config.Hex])
		})
	}
}

// requireUnpacks holds that the layers are what the config says. (The validation of
// go-containerregistry takes all layers for gzip, and knows no zstd of Docker's.)
func requireUnpacks(t *testing.T, img v1.Image) {
	t.Helper()
	m, err := img.Manifest()
	require.NoError(t, err)
	config, err := img.ConfigFile()
	require.NoError(t, err)
	var diffIDs []v1.Hash
	for _, desc := range m.Layers {
		l, err := img.LayerByDigest(desc.Digest)
		require.NoError(t, err)
		rc, err := l.Uncompressed()
		require.NoError(t, err)
		id, _, err := v1.SHA256(rc)
		require.NoError(t, err)
		diffIDs = append(diffIDs, id)
	}
	require.Equal(t, config.RootFS.DiffIDs, diffIDs)
}

// What an image claims is in its config, whatever is in its layers.
func TestShapeClaims(t *testing.T) {
	c, err := Shape{OS: "windows", Architecture: "arm", Variant: "v7", OSFeatures: []string{"win32k"}, User: "7"}.Build("image")
	require.NoError(t, err)
	_, img := pull(t, c)
	config, err := img.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, v1.Platform{OS: "windows", Architecture: "arm", Variant: "v7", OSFeatures: []string{"win32k"}},
		v1.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant, OSFeatures: config.OSFeatures})
	require.Equal(t, "7", config.Config.User)

	c, err = Shape{LayerType: "text/plain", Blobs: []string{"application/json"}, ConfigType: "application/x-config", More: 1}.Build("image")
	require.NoError(t, err)
	_, img = pull(t, c)
	m, err := img.Manifest()
	require.NoError(t, err)
	require.EqualValues(t, "application/x-config", m.Config.MediaType)
	require.Len(t, m.Layers, 3)
	require.EqualValues(t, "text/plain", m.Layers[1].MediaType)
	require.EqualValues(t, "application/json", m.Layers[2].MediaType)

	c, err = Shape{ArtifactType: "application/x-model", NoLayers: true, Blobs: []string{"application/x-weights"}}.Build("image")
	require.NoError(t, err)
	require.Empty(t, c.ChainID)
	require.Len(t, c.Layers, 1)
	_, img = pull(t, c)
	raw, err := img.RawConfigFile()
	require.NoError(t, err)
	require.Equal(t, "{}", string(raw))

	c, err = Shape{Indexes: 1, OnlyOthers: true}.Build("image")
	require.NoError(t, err)
	require.Empty(t, c.Images)
}

// pull reads an image from a registry, as a client of this machine's platform.
func pull(t *testing.T, c *Content) (*registry.Registry, v1.Image) {
	t.Helper()
	reg, err := registry.Start()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, reg.Close()) })
	require.NoError(t, c.Put(reg, "image", "1"))
	ref, err := name.ParseReference(reg.Ref("image:1"))
	require.NoError(t, err)
	img, err := remote.Image(ref, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	require.NoError(t, err)
	return reg, img
}
