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

package metrics

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxManifest bounds what is read: registries accept no larger manifests.
	maxManifest = 4 << 20
	// maxManifests bounds what is remembered: more images than are pulled at
	// once.
	maxManifests = 32
)

// sizes knows the sizes of layers from the manifests in containerd's content
// store. A snapshotter is not told them, but it is told the manifest's digest
// (pkg/snapshotters/annotations.go).
type sizes struct {
	blobs content.Provider

	mu        sync.Mutex
	manifests map[digest.Digest]map[digest.Digest]int64
}

// of returns the size in bytes of a layer of a manifest. It fails with
// errdefs.ErrNotFound when it is not known.
func (s *sizes) of(ctx context.Context, manifest, layer digest.Digest) (int64, error) {
	if s.blobs == nil || manifest.Validate() != nil {
		return 0, errdefs.ErrNotFound
	}
	s.mu.Lock()
	layers, ok := s.manifests[manifest]
	s.mu.Unlock()
	if !ok {
		var err error
		if layers, err = s.read(ctx, manifest); err != nil {
			return 0, err
		}
		s.mu.Lock()
		if s.manifests == nil || len(s.manifests) >= maxManifests {
			s.manifests = map[digest.Digest]map[digest.Digest]int64{}
		}
		s.manifests[manifest] = layers
		s.mu.Unlock()
	}
	size, ok := layers[layer]
	if !ok {
		return 0, fmt.Errorf("layer %s is not in manifest %s: %w", layer, manifest, errdefs.ErrNotFound)
	}
	return size, nil
}

func (s *sizes) read(ctx context.Context, d digest.Digest) (map[digest.Digest]int64, error) {
	ra, err := s.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	if ra.Size() > maxManifest {
		return nil, fmt.Errorf("manifest %s has %d bytes: %w", d, ra.Size(), errdefs.ErrInvalidArgument)
	}
	b := make([]byte, ra.Size())
	if n, err := ra.ReadAt(b, 0); n < len(b) {
		return nil, fmt.Errorf("read manifest %s: %w", d, err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("read manifest %s: %w: %w", d, errdefs.ErrInvalidArgument, err)
	}
	layers := map[digest.Digest]int64{}
	for _, l := range m.Layers {
		// A size is what the image's author says.
		layers[l.Digest] = max(l.Size, 0)
	}
	return layers, nil
}
