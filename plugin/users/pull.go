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
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// LayerObserver is what a patched containerd tells of its pulls: an interface of
// its own (core/unpack/unpacker.go, after patches/containerd) that the plugin has
// to implement.
type LayerObserver interface {
	// LayersPrepared is called in a pull when all layers of an image, the lowest
	// first, have been prepared. fetch opens one of them, with the pull's own
	// credentials and hosts, and must not be used after LayersPrepared has
	// returned. It is nil if nobody needs what is in the layers: in the pull of
	// the pause image for a sandbox. An error fails the pull.
	LayersPrepared(ctx context.Context, layers []ocispec.Descriptor, diffIDs []digest.Digest,
		fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) error
	// NeedsLayers tells whether an image has to be pulled again before a
	// container of it can be created: LayersPrepared was not called with these
	// layers, or what came of it was lost.
	NeedsLayers(ctx context.Context, layers []ocispec.Descriptor, diffIDs []digest.Digest) (bool, error)
}

var _ LayerObserver = (*Images)(nil)

// image is an image that is being pulled.
type image struct {
	chain  string
	stored string // what the chain ID does not say: which bytes its layers are stored as
	layers []Layer
	size   int64 // of all of them, as the manifest says
}

func newImage(descs []ocispec.Descriptor, diffIDs []digest.Digest) (*image, error) {
	i := &image{chain: identity.ChainID(diffIDs).String(), layers: make([]Layer, len(descs))}
	if len(descs) != len(diffIDs) {
		return nil, fmt.Errorf("users of the image with chain ID %s: there are %d layers and %d diff IDs: %w",
			i.chain, len(descs), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	stored := sha256.New()
	for k, desc := range descs {
		fmt.Fprintf(stored, "%q %s %d\n", desc.MediaType, desc.Digest, desc.Size)
		i.layers[k] = Layer{Descriptor: desc, DiffID: diffIDs[k]}
		i.size += min(max(desc.Size, 0), math.MaxInt64-i.size)
	}
	i.stored = fmt.Sprintf("%x", stored.Sum(nil))
	return i, nil
}

func (i *image) key() string { return i.chain + " " + i.stored }

// LayersPrepared reads the users and groups of an image that was left to the
// guest, unless they are known. That the image has none that can be used is not
// an error: containers that need them are told when they are created.
func (u *Images) LayersPrepared(ctx context.Context, descs []ocispec.Descriptor, diffIDs []digest.Digest,
	fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error),
) error {
	if u.known == nil || len(diffIDs) == 0 || fetch == nil {
		return nil
	}
	img, err := newImage(descs, diffIDs)
	if err != nil {
		return err
	}
	result, err := u.read(ctx, img, fetch)
	if err != nil {
		u.observe("failed")
		return fmt.Errorf("the users and groups of the image with chain ID %s, as resolve_users = %q says: %w", img.chain, ResolveRegistry, err)
	}
	u.observe(result)
	return nil
}

// read makes the image's users known, or known to be unusable. It says what came
// of it in the words of Config.Observe.
//
// What it finds out is kept only if it is certain. The files are certain for all
// images with this chain ID, as their layers were held against the diff IDs.
// That they are unusable is certain for these bytes only: whoever knows the diff IDs
// of somebody's image can make another one with the same chain ID and no users. An
// error of the registry, or of ours, is certain for nothing.
func (u *Images) read(ctx context.Context, img *image, fetch Fetch) (string, error) {
	done, err := u.share(ctx, img)
	if err != nil {
		return "", err
	}
	defer done()
	switch known, unusable, err := u.known.state(img.chain, img.stored); {
	case err != nil:
		return "", err
	case known:
		return "known", nil
	case unusable:
		return "unusable", nil
	}

	ctx, turn, done, err := u.queue.take(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	files, stats, err := Read(ctx, img.layers, turn.counted(fetch))
	logger := log.G(ctx).WithFields(log.Fields{
		"chainID": img.chain, "layers": len(img.layers), "layersRead": stats.Layers,
		"size": img.size, "bytesRead": stats.Bytes, "duration": time.Since(turn.start).Round(time.Microsecond),
	})
	switch {
	case errors.Is(err, errRefused):
		logger.WithError(err).Warn("the layers of a guest-pulled image may not be read for its users and groups")
		u.refuse(img)
		return "refused", nil
	case isUnusable(err):
		logger.WithError(err).Warn("the users and groups of a guest-pulled image are not known to the host: " +
			"names do not work as its user, use numbers or list the names in the snapshotter's users")
		return "unusable", u.known.putUnusable(img.chain, img.stored, err.Error())
	case err != nil:
		return "", err
	}
	if err := u.known.put(img.chain, files); err != nil {
		return "", err
	}
	logger.Info("read the users and groups of a guest-pulled image")
	return "read", nil
}

// NeedsLayers tells that the users of an image were not read yet: the option was
// set after the pull, or the store was lost. Without this, a container would have
// other IDs than the ones before it, and nobody would notice.
func (u *Images) NeedsLayers(_ context.Context, descs []ocispec.Descriptor, diffIDs []digest.Digest) (bool, error) {
	if u.known == nil || len(diffIDs) == 0 {
		return false, nil
	}
	img, err := newImage(descs, diffIDs)
	if err != nil {
		return false, err
	}
	known, unusable, err := u.known.state(img.chain, img.stored)
	return !known && !unusable && !u.wasRefused(img), err
}

// refusedFor is how long it is remembered that a fetch was refused by the node's
// configuration (disable_layer_fetch): for the container that the pull was for.
// Others may have a runtime handler for which it would not be.
const refusedFor = time.Minute

func (u *Images) refuse(img *image) {
	u.readMu.Lock()
	defer u.readMu.Unlock()
	maps.DeleteFunc(u.refused, func(_ string, at time.Time) bool { return time.Since(at) > refusedFor })
	u.refused[img.key()] = time.Now()
}

func (u *Images) wasRefused(img *image) bool {
	u.readMu.Lock()
	defer u.readMu.Unlock()
	at, ok := u.refused[img.key()]
	return ok && time.Since(at) <= refusedFor
}

// share makes sure that an image is read once, however often it is pulled at the
// same time: it waits for another pull that reads the same bytes, but not for ever,
// as that one's registry may be slower than this one's.
func (u *Images) share(ctx context.Context, img *image) (done func(), _ error) {
	key := img.key()
	enough := time.NewTimer(u.maxShared)
	defer enough.Stop()
	for {
		u.readMu.Lock()
		other, ok := u.reading[key]
		if !ok {
			mine := make(chan struct{})
			u.reading[key] = mine
			u.readMu.Unlock()
			return func() {
				u.readMu.Lock()
				delete(u.reading, key)
				u.readMu.Unlock()
				close(mine)
			}, nil
		}
		u.readMu.Unlock()
		select {
		case <-other:
		case <-enough.C:
			return func() {}, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
