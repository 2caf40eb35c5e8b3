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
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LayerObserver is what a patched containerd tells of its pulls: an interface of
// its own (core/unpack/observer.go, after patches/containerd) that the plugin has
// to implement.
type LayerObserver interface {
	// LayersPrepared is called in a pull when all layers of an image, the lowest
	// first, have been prepared. fetch opens one of them, with the pull's own
	// credentials and hosts, and must not be used after LayersPrepared has
	// returned. An error fails the pull.
	LayersPrepared(ctx context.Context, layers []ocispec.Descriptor, diffIDs []digest.Digest,
		fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) error
	// NeedsLayers tells whether an image has to be pulled again before a
	// container of it can be created: LayersPrepared was not called for it, or
	// what came of it was lost.
	NeedsLayers(ctx context.Context, chainID string) (bool, error)
}

var _ LayerObserver = (*Images)(nil)

// LayersPrepared reads the users and groups of an image that was left to the
// guest, unless they are known. That the image has none that can be used is not
// an error: containers that need them are told when they are created.
func (u *Images) LayersPrepared(ctx context.Context, descs []ocispec.Descriptor, diffIDs []digest.Digest,
	fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error),
) error {
	if u.known == nil || len(diffIDs) == 0 {
		return nil
	}
	chain := identity.ChainID(diffIDs).String()
	done, err := u.lock(ctx, chain)
	if err != nil {
		return err
	}
	defer done()
	if _, ok, err := u.known.get(chain); err != nil || ok {
		if ok {
			u.observe("known")
		}
		return err
	}

	if len(descs) != len(diffIDs) {
		return fmt.Errorf("users of the image with chain ID %s: there are %d layers and %d diff IDs: %w",
			chain, len(descs), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	layers := make([]Layer, len(descs))
	var size int64
	for i, desc := range descs {
		layers[i] = Layer{Descriptor: desc, DiffID: diffIDs[i]}
		size += desc.Size
	}

	start := time.Now()
	files, stats, err := Read(ctx, layers, fetch)
	logger := log.G(ctx).WithFields(log.Fields{
		"chainID": chain, "layers": len(layers), "layersRead": stats.Layers,
		"size": size, "bytesRead": stats.Bytes, "duration": time.Since(start).Round(time.Microsecond),
	})
	switch {
	case errdefs.IsFailedPrecondition(err):
		u.observe("unusable")
		logger.WithError(err).Warn("the users and groups of a guest-pulled image are not known to the host: " +
			"names do not work as its user, use numbers or list the names in the snapshotter's users")
		if err := u.known.putUnusable(chain, err.Error()); err != nil {
			return fmt.Errorf("keep that the users of the image with chain ID %s cannot be read: %w", chain, err)
		}
		return nil
	case err != nil:
		u.observe("failed")
		return fmt.Errorf("read the users and groups of the image with chain ID %s, as resolve_users = %q says: %w", chain, ResolveRegistry, err)
	}
	if err := u.known.put(chain, files); err != nil {
		u.observe("failed")
		return fmt.Errorf("keep the users and groups of the image with chain ID %s: %w", chain, err)
	}
	u.observe("read")
	logger.Info("read the users and groups of a guest-pulled image")
	return nil
}

// NeedsLayers tells that the users of an image were not read yet: the option was
// set after the pull, or the store was lost. Without this, a container would have
// other IDs than the ones before it, and nobody would notice.
func (u *Images) NeedsLayers(_ context.Context, chainID string) (bool, error) {
	if u.known == nil {
		return false, nil
	}
	found, err := u.known.has(chainID)
	return !found, err
}

// lock makes sure that an image is read once, however often it is pulled at the
// same time.
func (u *Images) lock(ctx context.Context, chain string) (unlock func(), _ error) {
	for {
		u.readMu.Lock()
		other, ok := u.reading[chain]
		if !ok {
			mine := make(chan struct{})
			u.reading[chain] = mine
			u.readMu.Unlock()
			return func() {
				u.readMu.Lock()
				delete(u.reading, chain)
				u.readMu.Unlock()
				close(mine)
			}, nil
		}
		u.readMu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
