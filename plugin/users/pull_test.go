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
	"io"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
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
	pulled := func(r *registry) error { return u.LayersPrepared(t.Context(), r.descriptors(), r.diffIDs(), r.fetch) }
	var img registry
	img.add(t, "", makeTar(t, file("etc/passwd", "P")))

	refused := errors.New("connection refused")
	err = u.LayersPrepared(t.Context(), img.descriptors(), img.diffIDs(), func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) { return nil, refused })
	require.ErrorIs(t, err, refused)
	require.ErrorContains(t, err, "resolve_users")
	d := img.layers[0].Descriptor.Digest
	blob := img.blobs[d]
	img.blobs[d] = bytes.Replace(blob, []byte("P"), []byte("Q"), 1)
	require.ErrorIs(t, pulled(&img), errdefs.ErrDataLoss)
	img.blobs[d] = blob
	require.NoError(t, pulled(&img))
	require.NoError(t, pulled(&img))
	require.NoError(t, u.Forget(img.chain()))

	var encrypted registry
	encrypted.add(t, "encrypted", makeTar(t))
	needs := func() bool {
		needs, err := u.NeedsLayers(t.Context(), encrypted.chain())
		require.NoError(t, err)
		return needs
	}
	require.True(t, needs())
	require.NoError(t, pulled(&encrypted))
	require.False(t, needs(), "it would be pulled again for ever")
	_, known, err := u.known.get(encrypted.chain())
	require.NoError(t, err)
	require.False(t, known)
	// The same layers, stored in another way, can be read.
	encrypted.layers[0].Descriptor.MediaType = ocispec.MediaTypeImageLayer
	require.NoError(t, pulled(&encrypted))
	_, known, err = u.known.get(encrypted.chain())
	require.NoError(t, err)
	require.True(t, known)
	require.NoError(t, u.Forget(encrypted.chain()))
	require.True(t, needs())
	assert.Equal(t, []string{"failed", "failed", "read", "known", "unusable", "read"}, results)

	require.ErrorIs(t, u.LayersPrepared(t.Context(), img.descriptors(), append(img.diffIDs(), img.diffIDs()...), img.fetch), errdefs.ErrInvalidArgument)
	require.NoError(t, u.LayersPrepared(t.Context(), nil, nil, img.fetch))
}
