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

package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

// testImage is an image of one layer, as a registry has it.
type testImage struct {
	layers  []ocispec.Descriptor
	diffIDs []digest.Digest
	blob    []byte
	fetched atomic.Int32
	err     error
}

func newTestImage(t testing.TB, files map[string]string) *testImage {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}))
		_, err := io.WriteString(w, content)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	d := digest.FromBytes(b.Bytes())
	return &testImage{
		layers:  []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: d, Size: int64(b.Len())}},
		diffIDs: []digest.Digest{d},
		blob:    b.Bytes(),
	}
}

func (i *testImage) chain() string { return identity.ChainID(i.diffIDs).String() }

func (i *testImage) fetch(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	i.fetched.Add(1)
	return io.NopCloser(bytes.NewReader(i.blob)), i.err
}

// pulled does what a patched containerd does at the end of a pull.
func pulled(t *testing.T, s snapshots.Snapshotter, i *testImage) error {
	return s.(users.LayerObserver).LayersPrepared(t.Context(), i.layers, i.diffIDs, i.fetch)
}

// lookUp reads a file in the lowest directory of a guest mount, "" if it is not
// there.
func lookUp(t *testing.T, mounts []mount.Mount, name string) string {
	t.Helper()
	require.Len(t, mounts, 1)
	for _, o := range mounts[0].Options {
		if lower, ok := strings.CutPrefix(o, "lowerdir="); ok {
			dirs := strings.Split(lower, ":")
			content, err := os.ReadFile(filepath.Join(dirs[len(dirs)-1], "etc", name))
			if !errors.Is(err, os.ErrNotExist) {
				require.NoError(t, err)
			}
			return string(content)
		}
	}
	require.Fail(t, "no lowerdir")
	return ""
}

var fromRegistry = Config{Users: users.Config{Resolve: users.ResolveRegistry}}

// containerd's garbage collector is what forgets an image's users: it is shown
// the image's top layer among the snapshots, and removes it with the image, but
// not as long as a container is made of it.
func TestUsersAreCollected(t *testing.T) {
	root := t.TempDir()
	s, err := New(t.Context(), root, fromRegistry)
	require.NoError(t, err)
	defer s.Close()
	db, ms := metadataStore(t, s)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	img := newTestImage(t, map[string]string{"etc/passwd": "P", "etc/group": "G"})
	other := newTestImage(t, map[string]string{"etc/passwd": "other"})
	known := func() (chains []string) {
		chains, err := s.(*snapshotter).users.Known()
		require.NoError(t, err)
		return chains
	}

	for _, i := range []*testImage{img, other} {
		require.NoError(t, pull(ctx, ms, []string{i.chain()}))
		require.NoError(t, pulled(t, s, i))
	}
	mounts, err := ms.Prepare(ctx, "container", img.chain())
	require.NoError(t, err)
	assert.Equal(t, "P", lookUp(t, mounts, "passwd"))
	assert.Equal(t, "G", lookUp(t, mounts, "group"))
	view, err := ms.View(ctx, "view", other.chain())
	require.NoError(t, err)
	assert.Equal(t, "other", lookUp(t, view, "passwd"))
	assert.Empty(t, lookUp(t, view, "group"))
	require.NoError(t, ms.Remove(ctx, "view"))

	// A namespace of its own has no say in what another needs.
	elsewhere := namespaces.WithNamespace(t.Context(), "default")
	require.NoError(t, pull(elsewhere, ms, []string{other.chain()}))
	require.NoError(t, ms.Remove(ctx, other.chain()))
	_, err = db.GarbageCollect(ctx)
	require.NoError(t, err)
	// Nothing keeps these two: they have no lease and no image. The container
	// that is in the store has no container record either.
	assert.Empty(t, known())

	for _, i := range []*testImage{img, other} {
		require.NoError(t, pull(ctx, ms, []string{i.chain()}))
		require.NoError(t, pulled(t, s, i))
	}
	_, err = ms.Update(ctx, snapshots.Info{Name: img.chain(), Labels: map[string]string{"containerd.io/gc.root": "yes"}}, "labels.containerd.io/gc.root")
	require.NoError(t, err)
	require.NoError(t, ms.Remove(ctx, other.chain()))
	_, err = db.GarbageCollect(ctx)
	require.NoError(t, err)
	assert.Equal(t, []string{img.chain()}, known())
	assert.EqualValues(t, 2, img.fetched.Load())
}

// Directories are made of what is known: they may go missing or be damaged at any
// time, and the leftovers of a crash are removed.
func TestUserDirectories(t *testing.T) {
	root := t.TempDir()
	s := newSnapshotter(t, root, Config{Users: users.Config{Users: map[string]string{"nginx": "101:102"}}})
	ctx := t.Context()
	layer := chain("image", 1)[0]
	mounts, err := s.Prepare(ctx, "k8s.io/1/c", layer)
	require.NoError(t, err)
	const want = "root:x:0:0::/:\nnginx:x:101:102::/:\n"
	require.Equal(t, want, lookUp(t, mounts, "passwd"))

	dir := filepath.Join(root, "users", "static")
	for name, damage := range map[string]func() error{
		"missing": func() error { return os.RemoveAll(filepath.Dir(dir)) },
		"file":    func() error { return os.Remove(filepath.Join(dir, "etc", "group")) },
		"empty":   func() error { return os.Truncate(filepath.Join(dir, "etc", "passwd"), 0) },
		"other": func() error {
			return os.WriteFile(filepath.Join(dir, "etc", "passwd"), []byte("root:x:1:1::/:\n"), 0o644)
		},
		"no directory": func() error {
			return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o644))
		},
	} {
		require.NoError(t, damage(), name)
		mounts, err := s.Mounts(ctx, "k8s.io/1/c")
		require.NoError(t, err, name)
		require.Equal(t, want, lookUp(t, mounts, "passwd"), name)
		require.Equal(t, "root:x:0:\n", lookUp(t, mounts, "group"), name)
	}

	require.NoError(t, os.MkdirAll(filepath.Join(root, "users", "new-1", "etc"), 0o755))
	require.NoError(t, s.(snapshots.Cleaner).Cleanup(ctx))
	assert.NoDirExists(t, filepath.Join(root, "users", "new-1"))
	assert.DirExists(t, dir, "the container needs it")

	// A snapshot on top of a committed one sees the same users.
	require.NoError(t, s.Commit(ctx, "k8s.io/2/committed", "k8s.io/1/c"))
	mounts, err = s.Prepare(ctx, "k8s.io/3/c", "k8s.io/2/committed")
	require.NoError(t, err)
	assert.Equal(t, want, lookUp(t, mounts, "passwd"))
	require.NoError(t, s.Remove(ctx, "k8s.io/3/c"))
	require.NoError(t, s.Remove(ctx, "k8s.io/2/committed"))
	require.NoError(t, s.(snapshots.Cleaner).Cleanup(ctx))
	assert.NoDirExists(t, dir)

	// Containers of images that were unpacked here are none of this.
	_, err = s.Prepare(ctx, "k8s.io/4/plain", "")
	require.NoError(t, err)
	require.NoError(t, s.Remove(ctx, "k8s.io/4/plain"))
	assert.NoDirExists(t, dir)
}

// An image's own users come before the listed ones, also when it has none: the
// list must not give a name a meaning that it does not have in the image.
func TestOwnUsersComeFirst(t *testing.T) {
	s := newSnapshotter(t, t.TempDir(), Config{Users: users.Config{Resolve: users.ResolveRegistry, Users: map[string]string{"nginx": "1"}}})
	none := newTestImage(t, map[string]string{"bin/sh": ""})
	require.NoError(t, pulled(t, s, none))
	mounts, err := s.Prepare(t.Context(), "k8s.io/1/c", none.chain())
	require.NoError(t, err)
	assert.Empty(t, lookUp(t, mounts, "passwd"))
	mounts, err = s.Prepare(t.Context(), "k8s.io/2/c", chain("unknown", 1)[0])
	require.NoError(t, err)
	assert.Contains(t, lookUp(t, mounts, "passwd"), "nginx")
	for _, key := range []string{"k8s.io/1/c", "k8s.io/2/c", none.chain()} {
		require.NoError(t, s.Remove(t.Context(), key))
	}
}

// The same image pulled many times at once is read once. Run with -race.
func TestConcurrentReads(t *testing.T) {
	s := newSnapshotter(t, t.TempDir(), fromRegistry)
	images := []*testImage{newTestImage(t, map[string]string{"etc/passwd": "1"}), newTestImage(t, map[string]string{"etc/passwd": "2"})}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			img := images[i%2]
			if !assert.NoError(t, pulled(t, s, img)) {
				return
			}
			key := fmt.Sprintf("k8s.io/%d/c", i)
			mounts, err := s.Prepare(t.Context(), key, img.chain())
			if assert.NoError(t, err) {
				assert.Equal(t, fmt.Sprint(i%2+1), lookUp(t, mounts, "passwd"))
			}
			assert.NoError(t, s.(snapshots.Cleaner).Cleanup(t.Context()))
			mounts, err = s.Mounts(t.Context(), key)
			if assert.NoError(t, err) {
				assert.Equal(t, fmt.Sprint(i%2+1), lookUp(t, mounts, "passwd"))
			}
			assert.NoError(t, s.Remove(t.Context(), key))
		})
	}
	wg.Wait()
	for _, img := range images {
		assert.EqualValues(t, 1, img.fetched.Load())
		require.NoError(t, s.Remove(t.Context(), img.chain()))
	}
}

// Without the option, no layer is read and nothing stays of the time with it.
func TestResolveUsersOff(t *testing.T) {
	root := t.TempDir()
	img := newTestImage(t, map[string]string{"etc/passwd": "P"})
	s, err := New(t.Context(), root, fromRegistry)
	require.NoError(t, err)
	require.NoError(t, pulled(t, s, img))
	require.NoError(t, s.Close())
	require.FileExists(t, filepath.Join(root, "users.db"))

	s = newSnapshotter(t, root, Config{Users: users.Config{Resolve: users.ResolveOff}})
	require.NoFileExists(t, filepath.Join(root, "users.db"))
	require.NoError(t, pulled(t, s, img))
	require.EqualValues(t, 1, img.fetched.Load())
	needs, err := s.(users.LayerObserver).NeedsLayers(t.Context(), img.layers, img.diffIDs)
	require.NoError(t, err)
	require.False(t, needs)
}
