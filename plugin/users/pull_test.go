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

package users

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
)

func (r *registry) descriptors() (descs []ocispec.Descriptor) {
	for _, l := range r.layers {
		descs = append(descs, l.Descriptor)
	}
	return descs
}

func (r *registry) diffIDs() (ids []digest.Digest) {
	for _, l := range r.layers {
		ids = append(ids, l.DiffID)
	}
	return ids
}

func (r *registry) chain() string { return identity.ChainID(r.diffIDs()).String() }

// A registry that fails, or lies, fails the pull, which is tried again. An image
// that cannot be used does not: it would fail for ever.
func TestPullErrors(t *testing.T) {
	var results []string
	u, err := New(t.Context(), t.TempDir(), Config{Resolve: ResolveRegistry, Observe: func(r string) { results = append(results, r) }})
	require.NoError(t, err)
	defer u.Close()
	var img registry
	img.add(t, "", makeTar(t, file("etc/passwd", "P")))

	refused := errors.New("connection refused")
	err = u.LayersPrepared(t.Context(), img.descriptors(), img.diffIDs(), func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) { return nil, refused })
	require.ErrorIs(t, err, refused)
	require.ErrorContains(t, err, "resolve_users")
	d := img.layers[0].Descriptor.Digest
	blob := img.blobs[d]
	img.blobs[d] = bytes.Replace(blob, []byte("P"), []byte("Q"), 1)
	require.ErrorIs(t, pulled(t.Context(), u, &img), errdefs.ErrDataLoss)
	img.blobs[d] = blob
	require.NoError(t, pulled(t.Context(), u, &img))
	require.NoError(t, pulled(t.Context(), u, &img))
	require.NoError(t, u.Forget(img.chain()))

	var encrypted registry
	encrypted.add(t, "encrypted", makeTar(t))
	require.True(t, needs(t, u, &encrypted))
	require.NoError(t, pulled(t.Context(), u, &encrypted))
	require.False(t, needs(t, u, &encrypted), "it would be pulled again for ever")
	_, known, err := u.known.get(encrypted.chain())
	require.NoError(t, err)
	require.False(t, known)
	// The same layers, stored in another way, can be read.
	encrypted.layers[0].Descriptor.MediaType = ocispec.MediaTypeImageLayer
	require.NoError(t, pulled(t.Context(), u, &encrypted))
	_, known, err = u.known.get(encrypted.chain())
	require.NoError(t, err)
	require.True(t, known)
	require.NoError(t, u.Forget(encrypted.chain()))
	require.True(t, needs(t, u, &encrypted))
	assert.Equal(t, []string{"failed", "failed", "read", "known", "unusable", "read"}, results)

	require.ErrorIs(t, u.LayersPrepared(t.Context(), img.descriptors(), append(img.diffIDs(), img.diffIDs()...), img.fetch), errdefs.ErrInvalidArgument)
	require.NoError(t, u.LayersPrepared(t.Context(), nil, nil, img.fetch))
	require.NoError(t, u.LayersPrepared(t.Context(), img.descriptors(), img.diffIDs(), nil))
	require.True(t, needs(t, u, &img), "of the pull of a pause image nothing is known")
}

// newImages is an Images that reads layers.
func newImages(t *testing.T) *Images {
	u, err := New(t.Context(), t.TempDir(), Config{Resolve: ResolveRegistry})
	require.NoError(t, err)
	t.Cleanup(func() { u.Close() })
	return u
}

func needs(t *testing.T, u *Images, r *registry) bool {
	t.Helper()
	needs, err := u.NeedsLayers(t.Context(), r.descriptors(), r.diffIDs())
	require.NoError(t, err)
	return needs
}

func pulled(ctx context.Context, u *Images, r *registry) error {
	return u.LayersPrepared(ctx, r.descriptors(), r.diffIDs(), r.fetch)
}

// Whoever knows the diff IDs of somebody's image can make another one with the same
// chain ID. What is wrong with that one says nothing of the other.
func TestUnusableIsOfTheBytes(t *testing.T) {
	u := newImages(t)
	var honest registry
	honest.add(t, "gzip", makeTar(t, file("etc/passwd", "P")))
	as := func(encoding string, content []byte) *registry {
		var r registry
		r.add(t, encoding, content)
		r.layers[0].DiffID = honest.layers[0].DiffID
		return &r
	}
	for name, forged := range map[string]*registry{
		"encrypted": as("encrypted", []byte("x")),
		"garbage":   as("", bytes.Repeat([]byte("x"), 2048)),
		"directory": as("gzip", makeTar(t, dir("etc/passwd"))),
	} {
		err := pulled(t.Context(), u, forged)
		if name != "directory" {
			require.NoError(t, err, name)
			require.False(t, needs(t, u, forged), "%s: it would be pulled again for ever", name)
			fetched := len(forged.fetched)
			require.NoError(t, pulled(t.Context(), u, forged))
			require.Len(t, forged.fetched, fetched, "%s: the same bytes are not read twice", name)
		}
		require.True(t, needs(t, u, &honest), name)
		name, err := u.name(honest.chain())
		require.NoError(t, err)
		require.Equal(t, staticUsers, name)
	}
	for i := range 3 * maxUnusable {
		forged := as("encrypted", []byte{byte(i)})
		require.NoError(t, pulled(t.Context(), u, forged))
		require.False(t, needs(t, u, forged))
	}
	require.NoError(t, u.known.view(func(b *bolt.Bucket) error {
		require.LessOrEqual(t, b.Bucket([]byte(honest.chain())).Stats().KeyN, maxUnusable)
		return nil
	}))

	require.NoError(t, pulled(t.Context(), u, &honest))
	require.False(t, needs(t, u, &honest))
	require.NoError(t, pulled(t.Context(), u, as("encrypted", []byte("y"))))
	files, known, err := u.known.get(honest.chain())
	require.NoError(t, err)
	require.True(t, known, "right files are not forgotten for a wrong image")
	require.Equal(t, "P", string(files.Passwd))
}

// What an earlier version kept of images that it had read in vain was not certain.
func TestUnusableOfEarlierVersion(t *testing.T) {
	u := newImages(t)
	var img registry
	img.add(t, "", makeTar(t, file("etc/passwd", "P")))
	require.NoError(t, u.known.update(func(b *bolt.Bucket) error {
		b, err := b.CreateBucket([]byte(img.chain()))
		require.NoError(t, err)
		return b.Put([]byte("unusable"), []byte("why"))
	}))
	require.True(t, needs(t, u, &img))
	require.NoError(t, pulled(t.Context(), u, &img))
	require.False(t, needs(t, u, &img))
}

// An error that is the registry's, or the node's, is kept nowhere. A layer that is
// not fetched because the runtime handler has disable_layer_fetch does not fail the
// pull, and the container of that pull is created.
func TestNothingIsKeptOfErrors(t *testing.T) {
	u := newImages(t)
	var img registry
	img.add(t, "", makeTar(t, file("etc/passwd", strings.Repeat("P", 4096))))
	var fetch Fetch
	pull := func() error {
		return u.LayersPrepared(t.Context(), img.descriptors(), img.diffIDs(), func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) { return fetch(ctx, d) })
	}
	content := img.blobs[img.layers[0].Descriptor.Digest]
	for name, f := range map[string]Fetch{
		"not found": func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) { return nil, errdefs.ErrNotFound },
		// As containerd's docker client does when a registry sends too much.
		"reading": func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(content[:700]), iotest.ErrReader(errdefs.ErrFailedPrecondition))), nil
		},
		"other bytes": func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(makeTar(t, dir("etc/passwd")))), nil
		},
	} {
		fetch = f
		require.Error(t, pull(), name)
		require.True(t, needs(t, u, &img), name)
	}
	fetch = func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
		return nil, fmt.Errorf("disable_layer_fetch: %w", errdefs.ErrFailedPrecondition)
	}
	require.NoError(t, pull())
	require.False(t, needs(t, u, &img))
	for key := range u.refused {
		u.refused[key] = time.Now().Add(-2 * refusedFor)
	}
	require.True(t, needs(t, u, &img), "for another runtime handler it may not be refused")
	known, err := u.Known()
	require.NoError(t, err)
	require.Empty(t, known)
}

// stalled is a registry that answers and then says nothing more until the request
// is given up. started counts the requests.
func stalled(started *atomic.Int32) Fetch {
	return func(ctx context.Context, _ ocispec.Descriptor) (io.ReadCloser, error) {
		started.Add(1)
		r, w := io.Pipe()
		context.AfterFunc(ctx, func() { w.CloseWithError(context.Cause(ctx)) })
		return r, nil
	}
}

// A registry that stalls keeps nobody waiting: not those who pull the same image from
// elsewhere, nor those who pull another one.
func TestStalledRegistry(t *testing.T) {
	u := newImages(t)
	u.maxShared = 200 * time.Millisecond
	u.queue.grace, u.queue.between = 300*time.Millisecond, 50*time.Millisecond
	var img, other registry
	img.add(t, "", makeTar(t, file("etc/passwd", "P")))
	other.add(t, "", makeTar(t, file("etc/passwd", "other")))

	var started atomic.Int32
	slow := make(chan error, DefaultConcurrency)
	for i := range DefaultConcurrency {
		var r registry
		r.add(t, "", makeTar(t, file("etc/passwd", "P")))
		if i > 0 {
			r.add(t, "", makeTar(t, file("a", "P")))
		}
		go func() { slow <- u.LayersPrepared(t.Context(), r.descriptors(), r.diffIDs(), stalled(&started)) }()
	}
	require.Eventually(t, func() bool { return started.Load() == DefaultConcurrency }, 10*time.Second, time.Millisecond)

	begun := time.Now()
	require.NoError(t, pulled(t.Context(), u, &img))
	require.NoError(t, pulled(t.Context(), u, &other))
	require.Less(t, time.Since(begun), 10*time.Second)
	require.Equal(t, []int{0}, img.fetched, "by itself, as nobody else has come to an end")
	err := <-slow
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "others wait")

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var again registry
	again.add(t, "", makeTar(t, file("b", "")))
	require.ErrorIs(t, u.LayersPrepared(ctx, again.descriptors(), again.diffIDs(), stalled(&started)), context.DeadlineExceeded)

	u.queue.maxIdle = 50 * time.Millisecond
	err = u.LayersPrepared(t.Context(), again.descriptors(), again.diffIDs(), stalled(&started))
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "sent nothing for 50ms")
}

// A wait for a turn ends, and says what for.
func TestWaitForTurn(t *testing.T) {
	q := newQueue(1)
	q.maxWait = 50 * time.Millisecond
	ctx, turn, done, err := q.take(t.Context())
	require.NoError(t, err)
	_, _, _, err = q.take(t.Context())
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "1 other images")
	require.NoError(t, ctx.Err(), "within the grace")
	turn.fetched.Add(1 << 40)
	q.grace = 0
	q.hurry()
	require.NoError(t, ctx.Err(), "fast enough")
	done()
	require.Error(t, ctx.Err())
	_, _, done, err = q.take(t.Context())
	require.NoError(t, err)
	done()
}
