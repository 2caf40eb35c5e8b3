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

package guest

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

const cdhTOML = `
[kbc]
name = "offline_fs_kbc"

[image.registry_config]
unqualified-search-registries = ["docker.io", "second.example"]

[[image.registry_config.registry]]
prefix = "banned.example/x"
blocked = true

[[image.registry_config.registry]]
prefix = "a.example"
location = "moved.example/a"
[[image.registry_config.registry.mirror]]
location = "m0.example/for-a"
[[image.registry_config.registry.mirror]]
location = "m1.example"
insecure = true

[[image.registry_config.registry]]
prefix = "a.example/deeper"

[[image.registry_config.registry]]
location = "plain.example:5000"
insecure = true

[[image.registry_config.registry]]
prefix = "useless.example"
insecure = true

[[image.registry_config.registry]]
prefix = "*.wild.example"
location = "tame.example"

[[image.registry_config.registry]]
location = "docker.io"
[[image.registry_config.registry.mirror]]
location = "hub.example"
`

// The places that a real guest tries, and their order.
func TestCDHTasks(t *testing.T) {
	c, err := parseCDH([]byte(cdhTOML))
	require.NoError(t, err)
	for image, want := range map[string][]pullTask{
		"other.example/app:1":       {{reference: "other.example/app:1"}},
		"a.example/app:1":           {{reference: "m0.example/for-a/app:1"}, {reference: "m1.example/app:1", http: true}, {reference: "moved.example/a/app:1"}},
		"a.example/deeper/app:1":    {{reference: "a.example/deeper/app:1"}},
		"plain.example:5000/app:1":  {{reference: "plain.example:5000/app:1", http: true}},
		"useless.example/app:1":     {{reference: "useless.example/app:1"}},
		"x.wild.example/app:1":      {{reference: "tame.example/app:1"}},
		"nota.example/app:1":        {{reference: "m0.example/for-a/app:1"}, {reference: "m1.example/app:1", http: true}, {reference: "moved.example/a/app:1"}},
		"a.example.com/app:1":       {{reference: "a.example.com/app:1"}},
		"nginx:1":                   {{reference: "hub.example/library/nginx:1"}, {reference: "docker.io/library/nginx:1"}, {reference: "second.example/nginx:1"}},
		"docker.io/library/nginx:1": {{reference: "hub.example/library/nginx:1"}, {reference: "docker.io/library/nginx:1"}, {reference: "second.example/nginx:1"}},
	} {
		got, err := c.tasks(image)
		require.NoError(t, err, image)
		assert.Equal(t, want, got, image)
	}
	_, err = c.tasks("banned.example/x/app:1")
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
}

// What a real guest does not start with is refused.
func TestCDHRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"no TOML":         "[image",
		"an empty rule":   "[[image.registry_config.registry]]\n",
		"a bare wildcard": "[[image.registry_config.registry]]\nprefix = \"*.x\"\n",
		"an empty mirror": "[[image.registry_config.registry]]\nprefix = \"x\"\n[[image.registry_config.registry.mirror]]\nlocation = \"\"\n",
		"no certificate":  "[image]\nextra_root_certificates = [\"x\"]\n",
		"credentials":     "[image]\nauthenticated_registry_credentials_uri = \"kbs:///a/b/c\"\n",
	} {
		_, err := parseCDH([]byte(text))
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	pack := func(text string) string {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, err := z.Write([]byte(text))
		require.NoError(t, err)
		require.NoError(t, z.Close())
		return base64.StdEncoding.EncodeToString(b.Bytes())
	}
	for name, value := range map[string]string{
		"no base64":    "%",
		"no gzip":      base64.StdEncoding.EncodeToString([]byte("version")),
		"no TOML":      pack("x"),
		"version":      pack("version = \"0.2.0\"\nalgorithm = \"sha256\"\n[data]\n"),
		"algorithm":    pack("version = \"0.1.0\"\nalgorithm = \"md5\"\n[data]\n"),
		"cdh, no kbc":  pack("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"cdh.toml\" = \"[image]\"\n"),
		"cdh, no TOML": pack("version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"cdh.toml\" = \"[image\"\n"),
	} {
		_, err := parseInitData(value)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	c, err := parseInitData(pack("version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n\"aa.toml\" = \"\"\n"))
	require.NoError(t, err)
	assert.Nil(t, c)
}

// A guest that is configured so talks plain HTTP only where it is told to.
func TestCDHKeepsToHTTPS(t *testing.T) {
	reg, err := registry.Start()
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, reg.Close()) })
	img, err := images.Build(images.Spec{Name: "app", Layers: 1})
	require.NoError(t, err)
	ref, err := reg.Push("app:1", img)
	require.NoError(t, err)
	s, err := newStore(t.TempDir())
	require.NoError(t, err)
	cfg, err := LoadConfig("")
	require.NoError(t, err)

	strict, err := parseCDH(nil)
	require.NoError(t, err)
	_, err = s.pull(t.Context(), cfg, strict, ref, expected{})
	require.ErrorContains(t, err, "server gave HTTP response to HTTPS client")
	told, err := parseCDH([]byte("[[image.registry_config.registry]]\nlocation = \"" + reg.Host() + "\"\ninsecure = true\n"))
	require.NoError(t, err)
	_, err = s.pull(t.Context(), cfg, told, ref, expected{})
	require.NoError(t, err)
}
