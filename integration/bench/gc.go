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

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/fs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// gcLayers is how many layers the images have that are collected. They share
// none.
const gcLayers = 5

// gc measures containerd's garbage collector, on a metadata store, a content
// store and a snapshotter that hold images: when there is nothing to collect,
// and when all of them have to go.
func (b *bench) gc(ctx context.Context) (err error) {
	b.begin("Garbage collection")
	ctx = namespace(ctx)
	n := b.scale.gcImages

	// Made once, where that is fast, and copied for each round.
	templates := filepath.Join(b.dir, "gc-templates")
	if err := os.Mkdir(templates, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", templates, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(templates, 0)) }()

	idle := map[string]series{}
	var contenders []contender
	for _, name := range []string{guestPull, overlayfs} {
		b.log("  making %d images for %s", n, name)
		template := filepath.Join(templates, name)
		if err := makeImages(ctx, name, template, n); err != nil {
			return err
		}
		contenders = append(contenders, contender{name, func() (float64, error) {
			nothing, everything, err := b.collect(ctx, name, template, n)
			idle[name] = append(idle[name], nothing)
			return everything, err
		}})
	}
	all, err := interleave(ctx, b.scale.gcRounds, contenders...)
	if err != nil {
		return err
	}
	b.compare(fmt.Sprintf("collect %d images of %d layers", n, gcLayers), overlayfs, "s", all[guestPull], all[overlayfs], nil)
	b.compare(fmt.Sprintf("collect nothing, with %d images of %d layers", n, gcLayers), overlayfs, "s",
		idle[guestPull][1:], idle[overlayfs][1:], nil) // the first one warms up
	return nil
}

// makeImages makes a node's stores below a directory, with images of which the
// snapshotter has the layers.
func makeImages(ctx context.Context, backendKind, dir string, n int) (err error) {
	backend, err := openBackend(ctx, backendKind, filepath.Join(dir, "root"), true)
	if err != nil {
		return err
	}
	s, err := openStore(ctx, dir, backend, true)
	if err != nil {
		return errors.Join(err, backend.Close())
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	store := metadata.NewImageStore(s.DB)
	for i := range n {
		img := newImage(fmt.Sprintf("gc-%d", i), gcLayers)
		if err := prepare(ctx, s.sn, img); err != nil {
			return err
		}
		var blobs []blob
		if backendKind != guestPull {
			for l := range gcLayers {
				blobs = append(blobs, newBlob(ocispec.MediaTypeImageLayerGzip, fmt.Sprintf("layer %d of %d", l, i)))
			}
		}
		config := newBlob(ocispec.MediaTypeImageConfig, img.chain)
		refs := map[string]string{"containerd.io/gc.ref.content.config": config.desc.Digest.String()}
		for l, layer := range blobs {
			refs[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", l)] = layer.desc.Digest.String()
		}
		config.labels = map[string]string{"containerd.io/gc.ref.snapshot." + backendName: img.top()}
		manifest := newBlob(ocispec.MediaTypeImageManifest, refs)
		manifest.labels = refs
		for _, blob := range append(blobs, config, manifest) {
			if err := blob.write(ctx, s.ContentStore()); err != nil {
				return err
			}
		}
		if _, err := store.Create(ctx, images.Image{Name: imageName(i), Target: manifest.desc}); err != nil {
			return err
		}
	}
	return nil
}

func imageName(i int) string { return fmt.Sprintf("registry.example/gc-%d:1", i) }

type blob struct {
	desc   ocispec.Descriptor
	data   []byte
	labels map[string]string
}

func newBlob(mediaType string, of any) blob {
	data, err := json.Marshal(of)
	if err != nil {
		panic(err) // strings, and lists and maps of them
	}
	return blob{desc: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data: data}
}

func (b blob) write(ctx context.Context, cs content.Store) error {
	return content.WriteBlob(ctx, cs, b.desc.Digest.String(), bytes.NewReader(b.data), b.desc, content.WithLabels(b.labels))
}

// collect runs the garbage collector on a copy of a template, before and after
// all images are removed, and returns the seconds of both.
func (b *bench) collect(ctx context.Context, backendKind, template string, n int) (nothing, everything float64, err error) {
	dir, err := os.MkdirTemp(b.dir, "gc-")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := fs.CopyDir(dir, template); err != nil {
		return 0, 0, err
	}
	unix.Sync() // what was copied is not to be flushed while the clock runs
	backend, err := openBackend(ctx, backendKind, filepath.Join(dir, "root"), false)
	if err != nil {
		return 0, 0, err
	}
	s, err := openStore(ctx, dir, backend, false)
	if err != nil {
		return 0, 0, errors.Join(err, backend.Close())
	}
	defer func() { err = errors.Join(err, s.Close()) }()

	run := func() error {
		_, err := s.GarbageCollect(ctx)
		return err
	}
	if nothing, err = timed(run); err != nil {
		return 0, 0, err
	}
	store := metadata.NewImageStore(s.DB)
	err = s.Update(func(tx *bolt.Tx) error {
		ctx := boltutil.WithTransaction(ctx, tx)
		for i := range n {
			if err := store.Delete(ctx, imageName(i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, 0, err
	}
	if everything, err = timed(run); err != nil {
		return 0, 0, err
	}
	return nothing, everything, s.requireEmpty(ctx)
}

// requireEmpty fails when the garbage collector has left anything.
func (s *store) requireEmpty(ctx context.Context) error {
	left := 0
	count := func() error {
		left++
		return nil
	}
	err := errors.Join(
		s.sn.Walk(ctx, func(context.Context, snapshots.Info) error { return count() }),
		s.ContentStore().Walk(ctx, func(content.Info) error { return count() }),
	)
	if err == nil && left > 0 {
		err = fmt.Errorf("%d snapshots and blobs are left after the garbage collection", left)
	}
	return err
}
