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
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it unpacks files of root")
	}
}

// fixture is a guest in a plain directory: what it prepares is not mounted.
type fixture struct {
	*Guest
	reg *registry.Registry
	cfg Config
}

func newFixture(t *testing.T, opts ...registry.Option) *fixture {
	t.Helper()
	reg, err := registry.Start(opts...)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, reg.Close()) })
	g, err := New(t.TempDir(), Pause{Program: "/bin/true", Name: "pause", Check: func() error { return nil }})
	require.NoError(t, err)
	cfg, err := LoadConfig("")
	require.NoError(t, err)
	return &fixture{Guest: g, reg: reg, cfg: cfg}
}

func (f *fixture) push(t *testing.T, as string, what remote.Taggable) string {
	t.Helper()
	_, err := f.reg.Push(as, what)
	require.NoError(t, err)
	return f.reg.Ref(as)
}

// request makes the request of a container with that config.json.
func request(t *testing.T, id, config string, options ...string) Request {
	t.Helper()
	bundle := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(bundle, "config.json"), []byte(config), 0o600))
	if len(options) == 0 {
		options = []string{option(goodJSON)}
	}
	return Request{Namespace: "test", ID: id, Bundle: bundle, Rootfs: []mount.Mount{guestMount(helper, options...)}}
}

func imageConfig(ref string) string {
	return `{"root":{"path":"/elsewhere","readonly":true},"annotations":{"io.kubernetes.cri.image-name":` + strconv.Quote(ref) + `}}`
}

// empty checks that nothing of a container or of a broken pull is left.
func (f *fixture) empty(t *testing.T, images int) {
	t.Helper()
	for dir, n := range map[string]int{"containers": 0, "images": images} {
		entries, err := os.ReadDir(filepath.Join(f.dir, dir))
		require.NoError(t, err)
		assert.Len(t, entries, n, dir)
	}
}

func chainID(t *testing.T, img v1.Image) string {
	t.Helper()
	cf, err := img.ConfigFile()
	require.NoError(t, err)
	var ids []digest.Digest
	for _, d := range cf.RootFS.DiffIDs {
		ids = append(ids, digest.Digest(d.String()))
	}
	return identity.ChainID(ids).String()
}

func TestPrepare(t *testing.T) {
	requireRoot(t)
	for _, encoding := range []images.Encoding{images.Gzip, images.Zstd, images.Uncompressed} {
		t.Run(string(encoding), func(t *testing.T) {
			f := newFixture(t)
			img, err := images.Build(images.Spec{Name: "demo", Layers: 3, Encoding: encoding})
			require.NoError(t, err)
			index, err := images.Index(img)
			require.NoError(t, err)
			ref := f.push(t, "demo:1", index)
			want, err := images.LayerDigests(img)
			require.NoError(t, err)

			opt, err := volume.GuestPull("dummy", map[string]string{volume.MetadataChainID: chainID(t, img)}).Option()
			require.NoError(t, err)
			c, err := f.Prepare(t.Context(), f.cfg, request(t, "one", imageConfig(ref), opt))
			require.NoError(t, err)

			r := c.Record
			assert.Equal(t, ref, r.Image.Name)
			assert.Equal(t, chainID(t, img), r.Image.ChainID)
			assert.Equal(t, chainID(t, img), r.HostChainID)
			assert.False(t, r.Image.Reused)
			assert.False(t, r.Sandbox)
			d, err := img.Digest()
			require.NoError(t, err)
			assert.Equal(t, d.String(), r.Image.Digest, "the manifest of this machine's platform")
			var got []string
			for _, l := range r.Image.Layers {
				got = append(got, l.Digest)
			}
			assert.Equal(t, want, got)
			assert.ElementsMatch(t, want, f.reg.Log().By(registry.Guest).Of(registry.Layer).References())
			assert.Empty(t, f.reg.Log().By(registry.Host))

			name, err := os.ReadFile(filepath.Join(r.Image.root, "etc/image-name"))
			require.NoError(t, err)
			assert.Equal(t, "demo\n", string(name))
			assert.Equal(t, "overlay", c.Rootfs.Type)

			// A second container of the pod asks what the name is, and fetches no
			// layer.
			f.reg.Reset()
			c2, err := f.Prepare(t.Context(), f.cfg, request(t, "two", imageConfig(ref)))
			require.NoError(t, err)
			assert.True(t, c2.Record.Image.Reused)
			assert.Equal(t, c.Rootfs.Options[0], c2.Rootfs.Options[0], "one lower directory")
			assert.NotEqual(t, c.Rootfs.Options[1], c2.Rootfs.Options[1], "each its upper directory")
			assert.Empty(t, f.reg.Log().Of(registry.Layer))

			_, err = f.Prepare(t.Context(), f.cfg, request(t, "two", imageConfig(ref)))
			require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
			assert.DirExists(t, strings.TrimPrefix(c2.Rootfs.Options[1], "upperdir="), "the container that had the ID keeps its files")

			require.NoError(t, f.Remove("one"))
			require.NoError(t, f.Remove("two"))
			require.NoError(t, f.Remove("two"), "again")
			f.empty(t, 1)
		})
	}
}

// config.json goes through the guest: what it does not know, and numbers that a
// float64 does not hold, have to come out as they went in.
func TestPrepareRewritesTheSpec(t *testing.T) {
	requireRoot(t)
	f := newFixture(t)
	img, err := images.Build(images.Spec{Name: "demo"})
	require.NoError(t, err)
	ref := f.push(t, "demo:1", img)

	req := request(t, "c", `{"ociVersion":"1.0.2","process":{"args":["a"],"cwd":"/x","user":{"uid":1000,"gid":1000}},
		"root":{"path":"/elsewhere","readonly":true},"new":{"field":[1,null]},
		"linux":{"resources":{"memory":{"limit":9223372036854775807}}},
		"annotations":{"io.kubernetes.cri.image-name":"`+ref+`"}}`)
	_, err = f.Prepare(t.Context(), f.cfg, req)
	require.NoError(t, err)
	b, err := os.ReadFile(filepath.Join(req.Bundle, "config.json"))
	require.NoError(t, err)
	assert.JSONEq(t, `{"ociVersion":"1.0.2","process":{"args":["a"],"cwd":"/x","user":{"uid":1000,"gid":1000}},
		"root":{"path":"`+req.Bundle+`/rootfs","readonly":true},"new":{"field":[1,null]},
		"linux":{"resources":{"memory":{"limit":9223372036854775807}}},
		"annotations":{"io.kubernetes.cri.image-name":"`+ref+`"}}`, string(b))
	assert.Contains(t, string(b), "9223372036854775807")
}

func TestPrepareSandbox(t *testing.T) {
	requireRoot(t)
	f := newFixture(t)
	req := request(t, "sb", `{"process":{"args":["/host-pause"],"cwd":"/y","user":{"uid":65535}},"root":{"path":"rootfs"},
		"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"sb"}}`)
	c, err := f.Prepare(t.Context(), f.cfg, req)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, f.Remove("sb")); f.empty(t, 0) })

	assert.True(t, c.Record.Sandbox)
	assert.Equal(t, "sb", c.Record.SandboxID)
	assert.Nil(t, c.Record.Image)
	assert.Equal(t, "bind", c.Rootfs.Type)
	b, err := os.ReadFile(filepath.Join(req.Bundle, "config.json"))
	require.NoError(t, err)
	assert.JSONEq(t, `{"process":{"args":["/pause"],"cwd":"/","user":{"uid":65535}},"root":{"path":"`+req.Bundle+`/rootfs"},
		"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"sb"}}`, string(b))
	assert.Empty(t, f.reg.Log(), "a sandbox pulls nothing")
	program, err := os.ReadFile(filepath.Join(c.Rootfs.Source, "pause"))
	require.NoError(t, err)
	assert.NotEmpty(t, program)
}

func TestPrepareRefuses(t *testing.T) {
	requireRoot(t)
	f := newFixture(t)
	img, err := images.Build(images.Spec{Name: "demo"})
	require.NoError(t, err)
	ref := f.push(t, "demo:1", img)
	secret, err := images.Build(images.Spec{Name: "secret", Encoding: images.Encrypted})
	require.NoError(t, err)
	encrypted := f.push(t, "secret:1", secret)

	for _, tc := range []struct {
		name    string
		req     Request
		err     string
		is      error
		fetched bool
	}{
		{name: "volume", req: request(t, "c", imageConfig(ref), "x"), err: "mount option", is: errdefs.ErrInvalidArgument},
		{name: "no image", req: request(t, "c", `{}`), err: annotationImageName, is: errdefs.ErrInvalidArgument},
		{name: "config.json", req: request(t, "c", `null`), err: "config.json", is: errdefs.ErrInvalidArgument},
		{name: "config.json is cut off", req: request(t, "c", `{"root":`), err: "config.json", is: errdefs.ErrInvalidArgument},
		{name: "reference", req: request(t, "c", imageConfig("UPPER CASE")), err: "UPPER CASE", is: errdefs.ErrInvalidArgument},
		{name: "unknown image", req: request(t, "c", imageConfig(f.reg.Ref("none:1"))), err: "none:1"},
		{name: "encrypted", req: request(t, "c", imageConfig(encrypted)), err: "encrypted"},
		{
			name: "another manifest",
			req:  request(t, "c", imageConfig(ref), option(`{"volume_type":"image_guest_pull","source":"d","image_pull":{"metadata":{"`+volume.MetadataManifestDigest+`":"sha256:other"}}}`)),
			err:  "the host resolved sha256:other", is: errdefs.ErrFailedPrecondition,
		},
		{
			name: "no space",
			req:  request(t, "c", imageConfig(ref), option(`{"volume_type":"image_guest_pull","source":"d","image_pull":{"metadata":{"`+volume.MetadataLayersSize+`":"1152921504606846976"}}}`)),
			err:  "its layers have 1152921504606846976 bytes, and the guest has space for", is: errdefs.ErrResourceExhausted,
		},
		{
			name: "no size",
			req:  request(t, "c", imageConfig(ref), option(`{"volume_type":"image_guest_pull","source":"d","image_pull":{"metadata":{"`+volume.MetadataLayersSize+`":"-1"}}}`)),
			err:  "the size of its layers", is: errdefs.ErrInvalidArgument,
		},
		{
			name: "another chain ID", fetched: true,
			req: request(t, "c", imageConfig(ref), option(`{"volume_type":"image_guest_pull","source":"d","image_pull":{"metadata":{"`+volume.MetadataChainID+`":"sha256:other"}}}`)),
			err: "the host resolved sha256:other", is: errdefs.ErrFailedPrecondition,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.reg.Reset()
			_, err := f.Prepare(t.Context(), f.cfg, tc.req)
			require.ErrorContains(t, err, tc.err)
			if tc.is != nil {
				assert.ErrorIs(t, err, tc.is)
			}
			if !tc.fetched {
				assert.Empty(t, f.reg.Log().Of(registry.Layer))
				f.empty(t, 0)
			}
		})
	}

	cfg := f.cfg
	cfg.IgnoreChainID = true
	c, err := f.Prepare(t.Context(), cfg, request(t, "c", imageConfig(ref), option(`{"volume_type":"image_guest_pull","source":"d","image_pull":{"metadata":{"`+volume.MetadataChainID+`":"sha256:other","`+volume.MetadataManifestDigest+`":"sha256:other"}}}`)))
	require.NoError(t, err)
	assert.Equal(t, "sha256:other", c.Record.HostChainID)
}

// A layer is only as good as its digest, and a pull that broke off has to leave
// nothing that the next one takes for an image.
func TestPullFaults(t *testing.T) {
	requireRoot(t)
	for name, action := range map[string]registry.Action{
		"corrupt":  registry.Corrupt(),
		"truncate": registry.Truncate(100),
		"refused":  registry.Status(403),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			img, err := images.Build(images.Spec{Name: "demo", Layers: 2})
			require.NoError(t, err)
			ref := f.push(t, "demo:1", img)
			remove := f.reg.Inject(registry.Fault{Match: registry.Kinds(registry.Layer), Do: action})
			_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
			require.ErrorContains(t, err, ref)
			f.empty(t, 0)
			remove()
			_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
			require.NoError(t, err)
		})
	}
}

func TestPullTimeout(t *testing.T) {
	f := newFixture(t)
	img, err := images.Build(images.Spec{Name: "demo"})
	require.NoError(t, err)
	ref := f.push(t, "demo:1", img)
	f.reg.Inject(registry.Fault{Match: registry.Kinds(registry.Config), Do: registry.Hang()})
	f.cfg.PullTimeout = Duration(300 * time.Millisecond)
	_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.ErrorContains(t, err, "pull_timeout")
	f.empty(t, 0)
}

func TestPullWithCredentialsOverTLS(t *testing.T) {
	requireRoot(t)
	f := newFixture(t, registry.WithTLS(), registry.WithTokenAuth("user", "secret"))
	img, err := images.Build(images.Spec{Name: "demo"})
	require.NoError(t, err)
	ref := f.push(t, "demo:1", img)
	_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
	require.Error(t, err, "the authority is not known")

	f.cfg.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(f.cfg.CAFile, f.reg.CA(), 0o600))
	_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
	require.ErrorContains(t, err, "UNAUTHORIZED")

	f.cfg.Registries = map[string]Registry{f.reg.Host(): {Username: "user", Password: "hunter2"}}
	_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
	require.Error(t, err)
	assert.NotContains(t, err.Error(), "hunter2")

	f.cfg.Registries = map[string]Registry{f.reg.Host(): {Username: "user", Password: "secret"}}
	_, err = f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
	require.NoError(t, err)
}

// Layers are applied to one directory, so whiteouts have to delete there, and an
// opaque directory has to lose what lower layers put into it, and only that.
func TestWhiteouts(t *testing.T) {
	requireRoot(t)
	f := newFixture(t)
	img := mutate.MediaType(empty.Image, "application/vnd.oci.image.manifest.v1+json")
	img, err := mutate.AppendLayers(img,
		tarLayer(t, "keep", "gone", "dir/", "dir/old", "other/", "other/gone", "other/keep"),
		tarLayer(t, ".wh.gone", "dir/new", "dir/.wh..wh..opq", "other/.wh.gone"))
	require.NoError(t, err)
	cf, err := img.ConfigFile()
	require.NoError(t, err)
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	img, err = mutate.ConfigFile(img, cf)
	require.NoError(t, err)
	ref := f.push(t, "wh:1", img)

	c, err := f.Prepare(t.Context(), f.cfg, request(t, "c", imageConfig(ref)))
	require.NoError(t, err)
	var got []string
	root := os.DirFS(c.Record.Image.root)
	for _, pattern := range []string{"*", "*/*"} {
		entries, err := fs.Glob(root, pattern)
		require.NoError(t, err)
		got = append(got, entries...)
	}
	assert.ElementsMatch(t, []string{"keep", "dir", "other", "dir/new", "other/keep"}, got)
}

// Two containers that start at once share one pull.
func TestConcurrentContainers(t *testing.T) {
	requireRoot(t)
	f := newFixture(t)
	img, err := images.Build(images.Spec{Name: "demo", Layers: 4})
	require.NoError(t, err)
	ref := f.push(t, "demo:1", img)

	const n = 8
	var reqs []Request
	for i := range n {
		reqs = append(reqs, request(t, strconv.Itoa(i), imageConfig(ref)))
	}
	errs := make(chan error, n)
	for _, r := range reqs {
		go func() {
			_, err := f.Prepare(t.Context(), f.cfg, r)
			errs <- err
		}()
	}
	var all error
	for range n {
		all = errors.Join(all, <-errs)
	}
	require.NoError(t, all)
	assert.Len(t, f.reg.Log().Of(registry.Layer).OK(), 4)
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	want := Record{
		Namespace: "ns", ID: "c", Flavour: FlavourGo, ShimPID: 1,
		Mount:  mount.Mount{Type: helper, Source: "overlay", Options: []string{"a"}},
		Volume: Volume{ImagePull: &ImagePull{Metadata: map[string]string{"k": "v"}}},
		Image:  &Image{Name: "n", Layers: []Layer{{Digest: "sha256:a", Size: 1}}},
	}
	require.NoError(t, want.Write(dir))
	got, err := ReadRecord(dir, "ns", "c")
	require.NoError(t, err)
	assert.Equal(t, want, got)
	_, err = ReadRecord(dir, "ns", "other")
	assert.ErrorIs(t, err, os.ErrNotExist)
	assert.NoError(t, want.Write(""), "no records are wanted")
}

func tarLayer(t *testing.T, names ...string) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, n := range names {
		h := &tar.Header{Name: n, Typeflag: tar.TypeReg, Mode: 0o644}
		if strings.HasSuffix(n, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		require.NoError(t, tw.WriteHeader(h))
	}
	require.NoError(t, tw.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	require.NoError(t, err)
	return l
}
